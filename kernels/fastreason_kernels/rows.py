"""Row arithmetic between the products: softmax statistics of rows of logits, and their dlogits, in ATen or in Triton.

It owns the work buffers of the ATen path, a few rows at a time so that they stay in the cache, and the choice between the
two. It refuses to know about heads and losses: it takes logits, token ids and two gradient coefficients for each row.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastreason_kernels.dispatch import resolve
from fastreason_kernels.gemm import Tiles
from fastreason_kernels.head import HeadOptions, HeadTensors
from fastreason_kernels.row_kernels import launch
from fastreason_kernels.transform import Transform
from fastreason_kernels.workspace import Workspace

# Bytes of each of the two work buffers. On a CPU a few dozen rows: less stays closer to the cores (4 to 8 MiB are the
# fastest on an idle machine), but then each pass is so short that two threads on a busy machine wait for each other
# (measured: ten times slower at 2 MiB).
CPU_BUFFER_BYTES = 8 << 20
DEVICE_BUFFER_BYTES = 256 << 20

# Stands for log 0 where a bias of -inf removes a column, so that p * log p is 0 there instead of NaN.
LOG_ZERO = -1e30


class RowStatistics(NamedTuple):
    """[R] logp of the chosen token, entropy, logsumexp (nats, of the logits after temperature)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class RowCoefficients(NamedTuple):
    """[R] derivatives of a loss with respect to logp and entropy; entropy's is None where the loss has no such term."""

    logp: Tensor
    entropy: Tensor | None

    @property
    def nonzero(self) -> Tensor:
        """[R] bool: the rows that have a gradient."""
        return self.logp != 0 if self.entropy is None else (self.logp != 0) | (self.entropy != 0)


class RowOps(Protocol):
    """Statistics and gradients of up to `rows` rows of a tile; `ids` are columns of the tile, or outside of it."""

    rows: int
    compacts: bool  # whether write_dlogits takes `keep`

    def partials(self, logits: Tensor, ids: Tensor, temperature: Tensor | None) -> Tensor:
        """[R, 4] of logits [R, C], as in partials.py."""
        ...

    def recall(self, logits: Tensor, temperature: Tensor | None, lse: Tensor, with_entropy: bool) -> None:
        """Reads rows whose statistics are known already; write_dlogits follows this or `partials` of the same rows."""
        ...

    def write_dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        coefficients: RowCoefficients,
        statistics: RowStatistics,
        keep: Tensor | None = None,
    ) -> None:
        """Overwrites out [K, C] with the gradient, with respect to the raw logits, of rows `keep` (None: all).

            dz_j = g_logp * (1[j = id] - p_j) - g_entropy * p_j * (log p_j + entropy),  dz / draw by the transform

        logits [R, C], ids, temperature, coefficients, statistics are of all R rows. out may lie in the memory of logits,
        at the rows themselves or before them.
        """
        ...


def row_ops(
    op: str, head: HeadTensors, tiles: Tiles, options: HeadOptions, workspace: Workspace | None = None
) -> RowOps:
    """The row arithmetic for the tiles of a head: Triton's where `op` resolves to it, else ATen's."""
    if resolve(op, options.impl, head.hidden.device.type, head.hidden.dtype) == "triton":
        return TritonRows(tiles.rows, options.transform)
    # Only a bias of -inf removes columns.
    removed = head.bias is not None
    workspace = Workspace() if workspace is None else workspace
    shape = (tiles.rows, tiles.columns)
    return AtenRows(shape, head.stat_dtype, head.hidden.device, options.transform, removed, workspace)


class TritonRows:
    """Row arithmetic by the kernels of row_kernels/: a whole tile at once, nothing kept between calls."""

    # Choosing rows would wait for the device, to save products on the few rows that a clip leaves without gradient.
    compacts = False

    def __init__(self, rows: int, transform: Transform) -> None:
        self.rows = rows
        self._transform = transform

    def partials(self, logits: Tensor, ids: Tensor, temperature: Tensor | None) -> Tensor:
        return launch.partials(logits, ids, temperature, self._transform)

    def recall(self, logits: Tensor, temperature: Tensor | None, lse: Tensor, with_entropy: bool) -> None:
        pass

    def write_dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        coefficients: RowCoefficients,
        statistics: RowStatistics,
        keep: Tensor | None = None,
    ) -> None:
        assert keep is None
        launch.dlogits(
            logits,
            out,
            ids,
            temperature,
            self._transform,
            statistics.lse,
            statistics.entropy,
            *coefficients,
            logp=statistics.logp,
        )


class AtenRows:
    """Row arithmetic in ATen, in two `[rows, C]` buffers that hold p and p log p of the rows last read."""

    compacts = True

    def __init__(
        self,
        tile: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        transform: Transform,
        removed: bool,
        workspace: Workspace,
    ) -> None:
        budget = CPU_BUFFER_BYTES if device.type == "cpu" else DEVICE_BUFFER_BYTES
        num_rows, width = tile
        self.rows = max(1, min(num_rows, budget // (width * dtype.itemsize)))
        self._probs = workspace.empty("p", (self.rows, width), dtype, device)
        self._plogp = workspace.empty("p log p", (self.rows, width), dtype, device)
        self._transform, self._removed = transform, removed

    def partials(self, logits: Tensor, ids: Tensor, temperature: Tensor | None) -> Tensor:
        z, log_probs = self._read(logits, temperature)
        dead = z.amax(-1) == -torch.inf if self._removed else None
        torch.log_softmax(z, -1, out=log_probs)
        inside = (ids >= 0) & (ids < z.shape[1])
        column = ids.clamp(0, z.shape[1] - 1)[:, None]
        logp, target = log_probs.gather(1, column).squeeze(1), z.gather(1, column).squeeze(1)
        if self._removed:
            log_probs.clamp_(min=LOG_ZERO)
        probs = torch.exp(log_probs, out=z)
        # With the tile's own logsumexp as the reference point, s is 1 and ez is minus the tile's entropy.
        result = torch.stack([target - logp, torch.ones_like(logp), target, log_probs.mul_(probs).sum(-1)], dim=1)
        result[:, 2].masked_fill_(~inside, -torch.inf)
        if dead is not None:
            result[dead] = result.new_tensor([-torch.inf, 0.0, -torch.inf, 0.0])
        return result

    def recall(self, logits: Tensor, temperature: Tensor | None, lse: Tensor, with_entropy: bool) -> None:
        z, log_probs = self._read(logits, temperature)
        torch.sub(z, lse[:, None], out=log_probs)
        if self._removed:
            log_probs.clamp_(min=LOG_ZERO)
        probs = torch.exp(log_probs, out=z)
        if with_entropy:
            log_probs.mul_(probs)

    def write_dlogits(
        self,
        logits: Tensor,
        out: Tensor,
        ids: Tensor,
        temperature: Tensor | None,
        coefficients: RowCoefficients,
        statistics: RowStatistics,
        keep: Tensor | None = None,
    ) -> None:
        num_rows, width = logits.shape
        probs, plogp = self._probs[:num_rows, :width], self._plogp[:num_rows, :width]
        logp, entropy, _ = statistics
        scale = self._transform.scale if temperature is None else self._transform.scale / temperature
        g_logp = coefficients.logp * scale
        # 1 - p without cancellation where p is nearly 1.
        at_target = -g_logp * torch.expm1(logp)
        if coefficients.entropy is None:
            probs.mul_(-g_logp[:, None])
        else:
            g_entropy = coefficients.entropy * scale
            at_target -= g_entropy * logp.exp() * (logp + entropy)
            probs.mul_(-(g_logp + g_entropy * entropy)[:, None]).addcmul_(plogp, -g_entropy[:, None])
        inside = (ids >= 0) & (ids < width)
        column = ids.clamp(0, width - 1)[:, None]
        probs.scatter_(1, column, torch.where(inside, at_target, probs.gather(1, column).squeeze(1))[:, None])
        if self._transform.softcap is not None:
            capped = torch.tanh(logits.to(probs.dtype) * (self._transform.scale / self._transform.softcap))
            probs.mul_(1 - capped.square_())
        start = 0
        for first, last in [(0, num_rows)] if keep is None else _runs(keep.tolist()):
            out[start : start + last - first].copy_(probs[first:last])
            start += last - first

    def _read(self, logits: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
        """(z of logits [R, C] after transform and temperature, room for their logarithms), in the two buffers."""
        num_rows, width = logits.shape
        z = self._probs[:num_rows, :width]
        z.copy_(logits)
        if not self._transform.is_identity:
            z.copy_(self._transform.apply(z))
        if temperature is not None:
            z.div_(temperature[:, None])
        return z, self._plogp[:num_rows, :width]


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Ascending indices as [first, last) runs: [0, 1, 2, 5] gives [(0, 3), (5, 6)]."""
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)][: len(starts)]
    return [(indices[start], indices[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]
