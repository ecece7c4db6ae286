"""The critic of PPO: a value head on a body of its own, its loss, and the figures of its fit.

It owns the value model and its arithmetic. It refuses to know how it is optimised (`update/deepspeed.py`) and what becomes of
its values (`gae.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastreason.body import response_states
from fastreason.config import ModelConfig
from fastreason.packing import MicroBatch
from fastreason.policy import load_policy
from fastreason.ranks import Ranks
from fastreason.update.updater import UpdateResult

ValueLoss = Callable[[Tensor, MicroBatch], Tensor]


class ValueModel(nn.Module):
    """A causal LM's body with a linear head D -> 1: `forward(batch)` gives V [N] fp32, before each response token is chosen.

    The head starts at zero, so that the first values are 0, and computes in fp32; under bf16 ZeRO its weights are rounded to
    bf16 for each forward, as all weights are.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = BodyAlone(model)
        self.head = ValueHead(model.config.hidden_size, next(model.parameters()).device)

    def forward(self, batch: MicroBatch) -> Tensor:
        return self.head(response_states(self.model, batch))


class ValueHead(nn.Module):
    """[N, D] -> [N]: a linear map in fp32."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size, device=device))
        self.bias = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return nn.functional.linear(hidden_ND.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class BodyAlone(nn.Module):
    """What `response_states` reads of a causal LM, without its LM head: that would be a parameter without a gradient."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.config = model.base_model, model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.dtype


def load_value_model(folder: Path, model: ModelConfig, device: str, attention: str, liger: bool) -> ValueModel:
    """A value model on the body of a local folder's causal LM; raises ModelError where that cannot be loaded."""
    return ValueModel(load_policy(folder, model, device, attention, liger).model).train()


def value_loss(values_N: Tensor, batch: MicroBatch, clip: float | None) -> Tensor:
    """[] fp32, summed over the response tokens that weigh anything; differentiated through values_N.

        1/2 max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    V_old and R are batch.values_N and batch.returns_N. clip None: the first term alone. The clip is PPO's published code's;
    its paper (arXiv 1707.06347) has none.
    """
    assert batch.values_N is not None and batch.returns_N is not None
    error_N = (values_N - batch.returns_N).square()
    if clip is not None:
        near_N = batch.values_N + (values_N - batch.values_N).clamp(-clip, clip)
        error_N = torch.maximum(error_N, (near_N - batch.returns_N).square())
    return error_N.masked_fill(batch.token_weight_N == 0, 0.0).sum() / 2


class Values(Protocol):
    """A value model with its optimizer. Every method is called on all ranks alike."""

    def values(self, batches: list[MicroBatch]) -> list[Tensor]:
        """V [N] fp32 of each micro-batch, on the CPU, without gradients."""
        ...

    def fit(self, batches: list[MicroBatch], loss: ValueLoss, denominator: float) -> UpdateResult:
        """One optimizer update from the summed loss of all ranks' micro-batches, divided once by `denominator`."""
        ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Critic:
    """The critic of a run. clip: as in `value_loss`. warmup_steps: the first so many steps train the critic alone."""

    engine: Values
    clip: float | None = 0.2
    warmup_steps: int = 0

    def fit(self, batches: list[MicroBatch], num_tokens: int) -> UpdateResult:
        return self.engine.fit(batches, partial(value_loss, clip=self.clip), float(max(1, num_tokens)))


def fit_figures(results: Sequence[UpdateResult], batches: Sequence[MicroBatch], ranks: Ranks) -> dict[str, float]:
    """critic/loss and /grad_norm: means over a step's updates. critic/explained_variance: 1 - var(R - V) / var(R), its tokens'.

    V is from before the step; 0 where all returns are equal.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        assert batch.values_N is not None and batch.returns_N is not None
        kept = batch.token_weight_N != 0
        returns_N, error_N = (x[kept].double() for x in (batch.returns_N, batch.returns_N - batch.values_N))
        parts = (kept, returns_N, returns_N.square(), error_N, error_N.square())
        sums += torch.stack([x.double().sum() for x in parts])
    num, total, squares, error, error_squares = ranks.sum(sums.tolist())
    num = max(1.0, num)
    variance, left = squares / num - (total / num) ** 2, error_squares / num - (error / num) ** 2
    made = max(1, len(results))
    return {
        "critic/loss": sum(result.loss for result in results) / made,
        "critic/grad_norm": sum(result.grad_norm for result in results) / made,
        "critic/value_mean": (total - error) / num,
        # A variance of rounding alone explains nothing.
        "critic/explained_variance": 1 - left / variance if variance > 1e-12 else 0.0,
    }
