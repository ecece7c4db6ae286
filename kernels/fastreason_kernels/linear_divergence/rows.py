"""Divergence of rows of student and teacher logits, and its gradient: the arithmetic between the products.

It owns the work buffers of the ATen path and the choice between ATen and Triton. It refuses to know about heads and
losses: rows of logits go in, divergences come out, gradients are written over the student's logits.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fastreason_kernels import rows as softmax_rows
from fastreason_kernels.linear_divergence.topk import DivergenceSpec
from fastreason_kernels.partials import finish
from fastreason_kernels.row_kernels import launch
from fastreason_kernels.rows import LOG_ZERO
from fastreason_kernels.transform import Transform

# p, q, their log-ratio and one spare; the reverse gradient keeps p * ratio too, the mixture m and another spare.
NUM_BUFFERS = {"forward": 4, "reverse": 5, "jsd": 6}

# A sum this large holds the logarithm of a removed column's probability, 0.
INFINITE = 1e15


class DivergenceRows(Protocol):
    """Divergence and gradients of up to `rows` rows of logits, student [R, C] and teacher [R, C]."""

    rows: int

    def load(
        self, student: Tensor, teacher: Tensor, temperature: Tensor | None, teacher_temperature: Tensor | None
    ) -> Tensor:
        """[R] divergence in nats; write_dlogits follows for the same rows, if at all."""
        ...

    def write_dlogits(self, student: Tensor, out: Tensor, weight: Tensor) -> None:
        """Overwrites out [R, C] with the gradient of weight [R] * divergence with respect to the student's raw logits.

        out may lie in the memory of student, each row at its own place.
        """
        ...


class AtenDivergence:
    """The divergence in ATen, in four to six `[rows, C]` buffers, so few rows at a time that they stay in the cache.

    Each KL(a||b) is summed as a (e^x - 1 - x), x = log(b / a), whose terms are all >= 0, from x taken as a difference of
    logits before anything is normalised. So nothing cancels: equal logits give exactly 0, small divergences keep their
    digits, and an error in a normaliser counts in second order only. `removed`: a bias may hold -inf.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        spec: DivergenceSpec,
        transforms: tuple[Transform, Transform],
        removed: bool,
    ) -> None:
        count = NUM_BUFFERS[spec.direction]
        self.rows = _block_rows(num_rows, width, dtype, device, count)
        self._buffers = [torch.empty(self.rows, width, dtype=dtype, device=device) for _ in range(count)]
        self._direction, self._beta, self._removed = spec.direction, spec.beta, removed
        self._transform, self._teacher_transform = transforms
        # Beyond this log-ratio, the smaller probability is nothing beside the rounding of the larger.
        self._ratio_bound = 4 - math.log(torch.finfo(dtype).eps)

    def load(
        self, student: Tensor, teacher: Tensor, temperature: Tensor | None, teacher_temperature: Tensor | None
    ) -> Tensor:
        p, q, spare, log_ratio, *more = (buffer[: student.shape[0]] for buffer in self._buffers)
        _read(student, spare, self._transform, temperature)
        _read(teacher, log_ratio, self._teacher_transform, teacher_temperature)
        if self._removed:
            # Where both lack a column, the difference is then 0 instead of NaN.
            for z in (spare, log_ratio):
                z.clamp_(min=LOG_ZERO)
        shift = _softmax(spare, p) - _softmax(log_ratio, q)
        log_ratio.sub_(spare).add_(shift[:, None])
        self._temperature = temperature
        # The gradient is scale * (base * sum(product) - product).
        if self._direction == "jsd":
            value = self._mixture(p, q, spare, log_ratio, *more)
            self._base, self._product, self._scale = p, spare.mul_(p), 1 - self._beta
        elif self._direction == "reverse":
            half = log_ratio.mul_(0.5)
            self._base, self._product, self._scale = p, torch.mul(p, half, out=more[0]), 2.0
            value = _kl(p, q, half, spare)
        else:
            value = _kl(q, p, log_ratio.mul_(-0.5), spare)
            self._base, self._product, self._scale = q, p, -1.0
        return value.clamp_(min=0).masked_fill_(value > INFINITE, math.inf)

    def write_dlogits(self, student: Tensor, out: Tensor, weight: Tensor) -> None:
        total = self._product.sum(-1)
        # No finite number is right where the divergence is infinite.
        total.masked_fill_(total.abs() > INFINITE, math.nan)
        factor = weight * (self._scale * self._transform.scale)
        if self._temperature is not None:
            factor = factor / self._temperature
        gradient = self._base.mul_((factor * total)[:, None]).sub_(self._product.mul_(factor[:, None]))
        out.copy_(_through_cap(gradient, student, self._transform))

    def _mixture(
        self, p: Tensor, q: Tensor, log_m: Tensor, log_ratio: Tensor, mixture: Tensor, spare: Tensor
    ) -> Tensor:
        """[R] beta KL(q||m) + (1 - beta) KL(p||m); leaves log(m / p) in log_m. q, m, log_ratio, spare are used up."""
        beta = self._beta
        log_ratio.clamp_(-self._ratio_bound, self._ratio_bound)
        torch.expm1(log_ratio, out=log_m).mul_(beta).log1p_()
        half = torch.sub(log_m, log_ratio, out=log_ratio).mul_(0.5)
        from_teacher = _kl(q, torch.lerp(p, q, beta, out=mixture), half, spare)
        torch.lerp(p, q, beta, out=mixture)
        from_student = _kl(p, mixture, torch.mul(log_m, 0.5, out=half), spare)
        return beta * from_teacher + (1 - beta) * from_student


def _softmax(z: Tensor, out: Tensor) -> Tensor:
    """Writes softmax(z) [R, C] to out and returns logsumexp(z) [R]."""
    torch.softmax(z, -1, out=out)
    # The largest probability belongs to the largest logit, and its logarithm is the most accurate one.
    return z.amax(-1) - out.amax(-1).log()


def _kl(base: Tensor, other: Tensor, half: Tensor, spare: Tensor) -> Tensor:
    """[R] sums of base (e^x - 1 - x), x = 2 half = log(other / base); leaves other - base in `other`.

    With h = tanh(x / 2), e^x - 1 = h (e^x + 1), so a term is 2 base (h - x / 2) + h^2 (base + other): no exponential that
    can overflow, and no difference but that of two neighbours. half and spare are used up.
    """
    torch.tanh(half, out=spare)
    torch.sub(spare, half, out=half).mul_(base)
    other.add_(base).mul_(spare)
    return spare.mul_(other).sum(-1).add_(half.sum(-1), alpha=2)


class TritonDivergence:
    """The divergence by the kernels of row_kernels/: a whole tile at once, in four passes."""

    def __init__(self, num_rows: int, spec: DivergenceSpec, transforms: tuple[Transform, Transform]) -> None:
        self.rows = num_rows
        self._spec, self._transforms = spec, transforms

    def load(
        self, student: Tensor, teacher: Tensor, temperature: Tensor | None, teacher_temperature: Tensor | None
    ) -> Tensor:
        none = torch.full((student.shape[0],), -1, device=student.device)
        _, _, lse = finish(launch.partials(student, none, temperature, self._transforms[0]))
        _, _, teacher_lse = finish(launch.partials(teacher, none, teacher_temperature, self._transforms[1]))
        self._lse = (lse, teacher_lse)
        self._options: dict[str, Any] = {
            "kind": self._spec.direction,
            "beta": self._spec.beta,
            "student_temperature": temperature,
            "teacher_temperature": teacher_temperature,
            "student_transform": self._transforms[0],
            "teacher_transform": self._transforms[1],
        }
        value, centre = launch.divergence_partials(student, teacher, *self._lse, **self._options).unbind(1)
        self._teacher, self._centre = teacher, centre.contiguous()
        return value

    def write_dlogits(self, student: Tensor, out: Tensor, weight: Tensor) -> None:
        launch.divergence_dlogits(student, self._teacher, out, *self._lse, weight, self._centre, **self._options)


class OtherColumns(Protocol):
    """Up to `rows` rows of a tile from which the listed columns are taken out (logits of -inf)."""

    rows: int

    def load(self, logits: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """([R] largest z, [R] sum of exp(z - largest)) of logits [R, C]; -inf and 0 where no column is left."""
        ...

    def write_dlogits(self, logits: Tensor, out: Tensor, slope: Tensor, lse: Tensor) -> None:
        """Overwrites out [R, C] with slope [R] * exp(z - lse [R]), with respect to the raw logits of the rows loaded."""
        ...


class AtenOthers:
    """OtherColumns in ATen, in one `[rows, C]` buffer."""

    def __init__(
        self, num_rows: int, width: int, dtype: torch.dtype, device: torch.device, transform: Transform
    ) -> None:
        self.rows = _block_rows(num_rows, width, dtype, device, 1)
        self._buffer = torch.empty(self.rows, width, dtype=dtype, device=device)
        self._transform = transform

    def load(self, logits: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self._buffer[: logits.shape[0]]
        _read(logits, z, self._transform, temperature)
        top = z.amax(-1)
        z.sub_(top.clamp(min=LOG_ZERO)[:, None]).exp_()
        self._exp, self._top, self._temperature = z, top, temperature
        return top, z.sum(-1)

    def write_dlogits(self, logits: Tensor, out: Tensor, slope: Tensor, lse: Tensor) -> None:
        factor = slope * torch.exp(self._top - lse) * self._transform.scale
        factor = factor if self._temperature is None else factor / self._temperature
        out.copy_(_through_cap(self._exp.mul_(factor[:, None]), logits, self._transform))


class TritonOthers:
    """OtherColumns by the kernels of row_kernels/: a whole tile at once."""

    def __init__(self, num_rows: int, transform: Transform) -> None:
        self.rows = num_rows
        self._transform = transform

    def load(self, logits: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        self._none, self._temperature = torch.full((logits.shape[0],), -1, device=logits.device), temperature
        top, total, _, _ = launch.partials(logits, self._none, temperature, self._transform).unbind(1)
        return top, total

    def write_dlogits(self, logits: Tensor, out: Tensor, slope: Tensor, lse: Tensor) -> None:
        # A row without a target column: d (-slope * logp) = slope * p.
        launch.dlogits(logits, out, self._none, self._temperature, self._transform, lse, None, -slope, None)


class TopKRows:
    """Log-probabilities of k listed columns and of all the others together, and their gradient.

    The listed columns are taken out of the tile, so that the mass of the others is a sum of their own, however small it
    is. What is [R, K] or [R] is float64.
    """

    def __init__(self, others: OtherColumns, transform: Transform) -> None:
        self.rows = others.rows
        self._others, self._transform = others, transform

    def load(self, logits: Tensor, ids: Tensor, present: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logp [R, K] of ids, log-probability [R] of the other columns); overwrites the logits [R, C] at the ids."""
        # An absent entry repeats the row's first present one (where there is none, column 0), so that writing it twice
        # writes the same. The entries themselves are distinct.
        first = present.to(torch.uint8).argmax(-1, keepdim=True)
        self._owner = torch.where(present, torch.arange(ids.shape[1], device=ids.device), first)
        self._ids, self._some = ids.gather(1, self._owner).clamp(min=0), present.any(-1, keepdim=True)
        raw = logits.gather(1, self._ids)
        logits.scatter_(1, self._ids, raw.masked_fill(self._some, -math.inf))
        self._raw, self._temperature = raw.double(), temperature
        z = self._transform.apply(self._raw)
        z = z if temperature is None else z / temperature[:, None]
        top, total = self._others.load(logits, temperature)
        self._rest = top.double() + total.double().log()
        lse = torch.logaddexp(self._rest, z.masked_fill(~present, -math.inf).logsumexp(-1))
        self._logp, self._rest_logp = z - lse[:, None], self._rest - lse
        return self._logp, self._rest_logp

    def write_dlogits(self, logits: Tensor, out: Tensor, g_logp: Tensor, g_rest: Tensor) -> None:
        """Overwrites out [R, C] with the gradient of g_logp [R, K] * logp + g_rest [R] * rest, for the rows last loaded.

        listed j:  g_j - p_j * total      other j:  exp(z_j - lse_rest) * (g_rest - p_rest * total)
        total = sum_k g_k + g_rest;  absent entries have g = 0
        """
        total = g_logp.sum(-1) + g_rest
        slope = g_rest - self._rest_logp.exp() * total
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = self._rest.masked_fill(self._rest == -math.inf, 0.0)
        self._others.write_dlogits(logits, out, slope.to(dtype), lse.to(dtype))
        at_ids = (g_logp - self._logp.exp() * total[:, None]).gather(1, self._owner) * self._transform.scale
        at_ids = at_ids if self._temperature is None else at_ids / self._temperature[:, None]
        at_ids = _through_cap(at_ids, self._raw, self._transform)
        out.scatter_(1, self._ids, at_ids.masked_fill(~self._some, 0.0).to(out.dtype))


def _block_rows(num_rows: int, width: int, dtype: torch.dtype, device: torch.device, num_buffers: int) -> int:
    """Rows of a block: more than two buffers share the bytes of the two of fastreason_kernels.rows."""
    budget = softmax_rows.CPU_BUFFER_BYTES if device.type == "cpu" else softmax_rows.DEVICE_BUFFER_BYTES
    share = min(budget, 2 * budget // num_buffers)
    return max(1, min(num_rows, share // (width * dtype.itemsize)))


def _read(logits: Tensor, z: Tensor, transform: Transform, temperature: Tensor | None) -> None:
    """z [R, C] = transform(logits) / temperature."""
    z.copy_(logits)
    if not transform.is_identity:
        z.copy_(transform.apply(z))
    if temperature is not None:
        z.div_(temperature[:, None])


def _through_cap(gradient: Tensor, raw: Tensor, transform: Transform) -> Tensor:
    """The gradient times what a soft cap adds to the chain rule beside the scale; in place."""
    if transform.softcap is not None:
        capped = torch.tanh(raw.to(gradient.dtype, copy=True).mul_(transform.scale / transform.softcap))
        gradient.mul_(1 - capped.square_())
    return gradient
