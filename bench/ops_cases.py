"""What bench/ops.py measures: the cases, their data, and the float64 answer each implementation is held to.

It owns the inputs (sampled from the head itself, as a policy samples its tokens), the loss of each operation as a plain
function of [N] tensors, and the error rule. It refuses to know any implementation, and to hold float64 [N, V].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from fastreason_kernels.testing import ATOL, SLACK
from torch import Tensor

OPS = ("policy_loss", "logprob", "cross_entropy", "divergence")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Logits of a trained model are peaked: with this deviation and 50k to 150k columns the entropy is about 3 nats.
LOGIT_STD = 4.0
CLIP = 0.2
SEQUENCE = 1024  # most tokens of a sequence: Liger takes one advantage a sequence

# float64 elements of a block of logits, and how many rows and columns of the gradients are compared.
BLOCK = 1 << 26
SAMPLED = 128


@dataclass(frozen=True)
class Case:
    """One thing to compute: an operation on a head of [v, h] and n tokens, half of them perhaps without gradient."""

    op: str
    n: int
    h: int
    v: int
    dtype: str
    device: str
    half: bool = False
    frozen: bool = False

    def title(self) -> str:
        notes = [", half of the rows inactive"] * self.half + [", frozen head"] * self.frozen
        return f"{self.op}{''.join(notes)}  N={self.n} H={self.h} V={self.v} {self.dtype}"


@dataclass(frozen=True)
class Data:
    """Inputs of a case, and the float64 statistics of its logits.

    hidden, teacher_hidden [N, H], weight, teacher_weight [V, H] in the case's dtype; ids [N] int64, sampled from
    softmax(hidden @ weight.T); advantages, behaviour_logp [N] fp32; g_logp, g_entropy [N] fp32, what arrives from
    downstream of `logprob`. logp, entropy, lse: [N] float64. The teacher is there for `divergence` only.
    """

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    advantages: Tensor
    behaviour_logp: Tensor
    g_logp: Tensor
    g_entropy: Tensor
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Into how many sequences of one length the rows fall: at least two where N allows it."""
        n = self.ids.shape[0]
        return next((b for b in range(max(2, math.ceil(n / SEQUENCE)), n + 1) if n % b == 0), 1)

    def active(self) -> float:
        """The share of rows whose advantage is not zero."""
        return float((self.advantages != 0).double().mean())


def make_data(n: int, h: int, v: int, dtype: str, device: str) -> Data:
    """The data that every operation of one shape shares; one float64 pass over the logits."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(n, h).to(DTYPES[dtype])
    weight = (normal(v, h) * (LOGIT_STD / h**0.5)).to(DTYPES[dtype])
    ids = torch.empty(n, dtype=torch.int64, device=device)
    logp, entropy, lse = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(3))
    for rows, z in logit_blocks(hidden, weight):
        uniform = torch.rand(z.shape, generator=generator, device=device).clamp_(min=1e-30)
        ids[rows] = uniform.log_().neg_().log_().neg_().add_(z).argmax(-1)
        lse[rows] = z.logsumexp(-1)
        logp[rows] = z.gather(1, ids[rows, None])[:, 0] - lse[rows]
        z -= lse[rows, None]
        entropy[rows] = -(z.exp() * z).sum(-1)
    step = torch.arange(n, device=device, dtype=torch.float64)
    # Log-ratios stay 0.1 away from the clip's corners: bf16 logits cannot carry a token over one.
    ratio = torch.where(step % 5 == 0, 0.5 * torch.cos(step * math.pi / 5), 0.08 * torch.sin(step))
    data = Data(
        hidden,
        weight,
        ids,
        advantages=torch.empty(n, device=device),
        behaviour_logp=(logp - ratio).float(),
        g_logp=((1 + 0.5 * torch.cos(step)) / n).float(),
        g_entropy=(0.3 * torch.sin(step) / n).float(),
        logp=logp,
        entropy=entropy,
        lse=lse,
    )
    return replace(data, advantages=_advantages(data, half=False))


def for_case(data: Data, case: Case) -> Data:
    """`data` as `case` wants it: fresh leaves, zero advantages on every second sequence, a teacher."""
    hidden = data.hidden.detach().requires_grad_()
    weight = data.weight.detach().requires_grad_(not case.frozen)
    data = replace(data, hidden=hidden, weight=weight, advantages=_advantages(data, case.half))
    if case.op != "divergence":
        return data
    generator = torch.Generator(case.device).manual_seed(1)
    teacher = []
    for x, scale in ((data.hidden, 0.25), (data.weight, 0.25 * LOGIT_STD / case.h**0.5)):
        noise = torch.randn(x.shape, generator=generator, device=case.device, dtype=x.dtype)
        teacher.append(x.detach() + scale * noise)
    return replace(data, teacher_hidden=teacher[0], teacher_weight=teacher[1])


def _advantages(data: Data, half: bool) -> Tensor:
    count = data.num_sequences
    signs = [(1.0, -0.7)[(i + i // 2) % 2] * (0.0 if half and i % 2 else 1.0) for i in range(count)]
    values = torch.tensor(signs, device=data.ids.device)
    return values.repeat_interleave(data.ids.shape[0] // count)


def logit_blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, float64 logits [R, V]) over all rows; the logits may be overwritten."""
    wide = weight.detach().double().T
    step = max(1, BLOCK // weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        rows = slice(start, min(start + step, hidden.shape[0]))
        yield rows, hidden[rows].detach().double() @ wide


def clipped_loss(logp: Tensor, data: Data) -> Tensor:
    """GRPO's token-level loss, -mean min(rho A, clip(rho) A), of [N] log-probabilities in any dtype."""
    ratio = torch.exp(logp - data.behaviour_logp)
    surrogate = torch.minimum(ratio * data.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * data.advantages)
    return -surrogate.sum() / logp.shape[0]


def loss_of(op: str, logp: Tensor, entropy: Tensor | None, data: Data) -> Tensor:
    """The scalar that an operation's [N] log-probabilities and entropies go into."""
    if op == "policy_loss":
        return clipped_loss(logp, data)
    if op == "cross_entropy":
        return -logp.mean()
    assert entropy is not None
    return (data.g_logp * logp + data.g_entropy * entropy).sum()


@dataclass(frozen=True)
class Exact:
    """The float64 answer: values by name, and d_hidden, d_weight for the sampled rows and columns only."""

    values: Mapping[str, Tensor]
    rows: Tensor
    columns: Tensor

    def errors(self, values: Mapping[str, Tensor], hidden_grad: Tensor | None, weight_grad: Tensor | None):
        """max |x - exact| / max |exact| of each value and gradient that is given; infinite where it is NaN."""
        given = {name: value for name, value in values.items() if name in self.values}
        if hidden_grad is not None:
            given["d_hidden"] = hidden_grad[self.rows]
        if weight_grad is not None:
            given["d_weight"] = weight_grad[self.columns]
        return {name: _relative(value, self.values[name]) for name, value in given.items()}


def _relative(actual: Tensor, exact: Tensor) -> float:
    difference = (actual.detach().double() - exact).abs().nan_to_num(nan=math.inf)
    scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float(difference.max() / scale)


def broken_limits(
    errors: Mapping[str, float], eager: Mapping[str, float] | None, dtype: str
) -> dict[str, tuple[float, float]]:
    """{part: (error, limit)} of each part that breaks the rule of fastreason_kernels.testing.

    The limit is SLACK x eager's error of that part + ATOL of the dtype; ATOL alone where eager did not fit in memory.
    """
    limits = {part: SLACK * (eager or {}).get(part, 0.0) + ATOL[DTYPES[dtype]] for part in errors}
    return {part: (error, limits[part]) for part, error in errors.items() if not error <= limits[part]}


def exact_answer(case: Case, data: Data) -> Exact:
    """The float64 answer of `case`: statistics of all rows, gradients of the sampled rows and columns."""
    device, n = data.ids.device, case.n
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(n, generator=generator)[:SAMPLED].sort()[0].to(device)
    # The last columns are the tail that a tile overhangs; the targets' columns carry the large gradients.
    tail = torch.arange(max(0, case.v - SAMPLED // 2), case.v, device=device)
    columns = torch.unique(torch.cat([tail, data.ids[rows[: SAMPLED // 2]]]))
    if case.op == "divergence":
        return _exact_divergence(data, rows, columns)
    logp, entropy = data.logp.clone().requires_grad_(), data.entropy.clone().requires_grad_()
    loss = loss_of(case.op, logp, entropy, data)
    grads = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    g_logp, g_entropy = (torch.zeros_like(logp) if grad is None else grad for grad in grads)

    def dlogits(z: Tensor, at: Tensor | slice, targets: Tensor) -> Tensor:
        log_p = z - data.lse[at, None]
        p = log_p.exp()
        d = g_logp[at, None] * (targets.double() - p)
        return d - g_entropy[at, None] * p * (log_p + data.entropy[at, None])

    hidden, weight = data.hidden.detach().double(), data.weight.detach()
    of_rows = torch.arange(case.v, device=device) == data.ids[rows, None]
    d_hidden = dlogits(hidden[rows] @ weight.double().T, rows, of_rows) @ weight.double()
    of_columns = data.ids[:, None] == columns
    d_weight = dlogits(hidden @ weight[columns].double().T, slice(None), of_columns).T @ hidden
    values = {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}
    if case.op == "logprob":
        values |= {"logp": data.logp, "entropy": data.entropy}
    return Exact(values, rows, columns)


def _exact_divergence(data: Data, rows: Tensor, columns: Tensor) -> Exact:
    """Reverse KL, mean over rows: its gradient is p (log p - log q - KL) / N."""
    assert data.teacher_hidden is not None and data.teacher_weight is not None
    n = data.ids.shape[0]
    kl, teacher_lse = torch.empty_like(data.lse), torch.empty_like(data.lse)
    for at, z in logit_blocks(data.teacher_hidden, data.teacher_weight):
        teacher_lse[at] = z.logsumexp(-1)
        log_q = z - teacher_lse[at, None]
        log_p = data.hidden[at].detach().double() @ data.weight.detach().double().T - data.lse[at, None]
        kl[at] = (log_p.exp() * (log_p - log_q)).sum(-1)

    def dlogits(z: Tensor, teacher_z: Tensor, at: Tensor | slice) -> Tensor:
        log_p, log_q = z - data.lse[at, None], teacher_z - teacher_lse[at, None]
        return log_p.exp() * (log_p - log_q - kl[at, None]) / n

    hidden, weight = data.hidden.detach().double(), data.weight.detach()
    other, head = data.teacher_hidden.double(), data.teacher_weight
    d_rows = dlogits(hidden[rows] @ weight.double().T, other[rows] @ head.double().T, rows)
    d_columns = dlogits(hidden @ weight[columns].double().T, other @ head[columns].double().T, slice(None))
    values = {"loss": kl.mean(), "d_hidden": d_rows @ weight.double(), "d_weight": d_columns.T @ hidden}
    return Exact(values, rows, columns)
