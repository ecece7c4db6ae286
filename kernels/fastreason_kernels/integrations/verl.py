"""verl's `FusedLinearForPPO` and `linear_cross_entropy` with the same arguments and results.

It owns the translation of shapes, reductions and chunk sizes. It refuses to patch verl: both names are imported where
they are used, so assigning these over them is one line in the caller's start-up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastreason_kernels.linear_logprob.function import linear_logprob

BACKENDS = ("torch", "liger")
DEFAULT_CHUNK = 512
IGNORED = -100
REDUCTIONS = ("none", "sum", "mean")


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropies of tokens from hidden states and the head, as verl's module of that name.

    forward: see there. chunk_size: most tokens of a chunk; verl's default of 512 leaves the choice to the library.
    impl_backend: verl's names, "torch" and "liger"; both run this library. Raises ValueError for another name.
    Left out: verl's rounding of the entropy to the dtype of the hidden states: it is fp32 here.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in BACKENDS:
            raise ValueError(f"impl_backend: got {impl_backend!r}, allowed: {' | '.join(BACKENDS)}")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(log_probs, entropy) of input_ids under softmax(hidden_states @ vocab_weights.T / temperature).

        hidden_states [T, D] or [B, L, D] and vocab_weights [V, D]: differentiated. input_ids [T] or [B, L], any integer
        dtype, already shifted; -100 gives 0 and 0. The results have the shape of input_ids, fp32 nats, differentiable.
        Raises ValueError for shapes that do not match.
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"input_ids: shape {tuple(input_ids.shape)}, allowed: {tuple(hidden_states.shape[:-1])}, that of "
                "hidden_states without its last dimension"
            )
        logp, entropy, _ = linear_logprob(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1).to(torch.int64),
            temperature=temperature,
            ignore_index=IGNORED,
            chunk_tokens=None if self.chunk_size == DEFAULT_CHUNK else self.chunk_size,
        )
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) of labels under softmax(hidden @ weight.T / temperature), as verl's function of that name.

    hidden [..., D], weight [V, D]: differentiated. labels [...] int64. Both results are flat, [T] fp32 nats, as verl's;
    reduction "sum" and "mean" reduce logprobs to [] (of logprobs, not of their negatives) and leave entropy.
    dist_process_group: weight is this rank's shard of the vocabulary (ranks in order, equal shards), labels are of the
    whole vocabulary, hidden is the same everywhere. As verl's, the gradient of hidden is then a share of it, which the
    caller sums over the ranks: the reduce-scatter of Megatron's sequence parallelism does.
    A label of -100 gives 0 and 0 without a gradient.

    Raises ValueError for another reduction or a temperature that is not a float. Beyond verl: any device, any D (verl:
    CUDA, D a multiple of 128).
    """
    if not isinstance(temperature, float):
        raise ValueError(f"temperature: got {temperature!r}, allowed: a float")
    if not isinstance(reduction, str) or reduction.lower() not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, allowed: {' | '.join(REDUCTIONS)}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None and rows.requires_grad:
        # The library sums this gradient over the ranks; verl leaves the sum to its caller.
        ranks, rows = dist.get_world_size(dist_process_group), rows.view_as(rows)
        rows.register_hook(lambda grad: grad / ranks)
    logp, entropy, _ = linear_logprob(
        rows, weight, labels.reshape(-1), temperature=temperature, ignore_index=IGNORED, group=dist_process_group
    )
    if reduction.lower() == "none":
        return logp, entropy
    return logp.sum() if reduction.lower() == "sum" else logp.mean(), entropy
