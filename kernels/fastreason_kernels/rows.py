"""Row arithmetic between the GEMMs in ATen: softmax statistics of a block of logit rows, and its dlogits.

It owns the fp32 work buffers, a few rows at a time so that they stay in the cache. It refuses to know about heads and
losses: it takes logits, token ids and two gradient coefficients for each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of each of the two work buffers. On a CPU about a hundred rows: fewer bytes stay closer to the cores, but then
# each pass is so short that two threads on a busy machine wait for each other (measured: ten times slower at 2 MB).
CPU_BUFFER_BYTES = 24 << 20
DEVICE_BUFFER_BYTES = 256 << 20

# Stands for log 0 where a bias of -inf removes a column, so that p * log p is 0 there instead of NaN.
LOG_ZERO = -1e30


@dataclass(frozen=True)
class RowStatistics:
    """[R] logp of the chosen token, entropy, logsumexp (nats, of the logits after temperature)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


class RowBlock:
    """Two `[R, V]` buffers that hold, after `load`, p and p log p of a block of rows."""

    def __init__(self, num_rows: int, vocab: int, dtype: torch.dtype, device: torch.device, has_bias: bool) -> None:
        budget = CPU_BUFFER_BYTES if device.type == "cpu" else DEVICE_BUFFER_BYTES
        self.rows = max(1, min(num_rows, budget // (vocab * dtype.itemsize)))
        self._probs = torch.empty(self.rows, vocab, dtype=dtype, device=device)
        self._plogp = torch.empty(self.rows, vocab, dtype=dtype, device=device)
        self._has_bias = has_bias

    def load(self, logits: Tensor, ids: Tensor, temperature: Tensor | None) -> RowStatistics:
        """Fills the buffers from logits [R, V] and returns the statistics of its rows; temperature is [R] or None."""
        z, log_probs = self._probs[: logits.shape[0]], self._plogp[: logits.shape[0]]
        z.copy_(logits)
        if temperature is not None:
            z.div_(temperature[:, None])
        torch.log_softmax(z, -1, out=log_probs)
        logp = log_probs.gather(1, ids[:, None]).squeeze(1)
        lse = z.gather(1, ids[:, None]).squeeze(1) - logp
        if self._has_bias:
            log_probs.clamp_(min=LOG_ZERO)
        probs = torch.exp(log_probs, out=z)
        return RowStatistics(logp, -log_probs.mul_(probs).sum(-1), lse)

    def write_dlogits(
        self, out: Tensor, keep: Tensor | None, ids: Tensor, g_logp: Tensor, g_entropy: Tensor | None, s: RowStatistics
    ) -> None:
        """Overwrites out [K, V] with d/dz (g_logp * logp + g_entropy * entropy) of rows keep [K]; uses up the block.

            d_j = g_logp * (1[j = id] - p_j) - g_entropy * p_j * (log p_j + entropy)

        keep: indices into the block, None for all of it. ids, g_logp, g_entropy and s are [R], of the whole block; the
        caller divides g_* by the temperature.
        """
        probs, plogp = self._probs[: ids.shape[0]], self._plogp[: ids.shape[0]]
        # 1 - p without cancellation where p is nearly 1.
        at_target = -g_logp * torch.expm1(s.logp)
        if g_entropy is None:
            probs.mul_(-g_logp[:, None])
        else:
            at_target -= g_entropy * s.logp.exp() * (s.logp + s.entropy)
            probs.mul_(-(g_logp + g_entropy * s.entropy)[:, None]).addcmul_(plogp, -g_entropy[:, None])
        probs.scatter_(1, ids[:, None], at_target[:, None])
        start = 0
        for first, last in [(0, ids.shape[0])] if keep is None else _runs(keep.tolist()):
            out[start : start + last - first].copy_(probs[first:last])
            start += last - first


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Ascending indices as [first, last) runs: [0, 1, 2, 5] gives [(0, 3), (5, 6)]."""
    starts = [i for i, index in enumerate(indices) if i == 0 or index != indices[i - 1] + 1]
    ends = [*starts[1:], len(indices)][: len(starts)]
    return [(indices[start], indices[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]
