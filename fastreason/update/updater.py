"""What the loop asks of an updater."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastreason_kernels import PolicyLossOutput
from torch import Tensor

from fastreason.packing import MicroBatch
from fastreason.policy import LossSpec


@dataclass
class UpdateResult:
    """One optimizer update on this rank: the outputs of its micro-batches in order, and the step's figures.

    applied: False where the gradient was not finite. empty: True where no row was left to train on.
    """

    outputs: list[PolicyLossOutput]
    loss: float
    grad_norm: float
    lr: float
    applied: bool
    empty: bool = False


class Updater(Protocol):
    """Owns the trainer's model and optimizer. Every method is called on all ranks, in the same order."""

    name: str
    rank: int
    num_ranks: int

    def logprobs(self, batches: list[MicroBatch], spec: LossSpec, temperature: float) -> list[Tensor]:
        """The trainer's log-probabilities of the response tokens of each micro-batch, [N] fp32, without gradients.

        To the last bit those that `update` finds for the same micro-batches and spec as long as the weights are the same.
        """
        ...

    def update(self, batches: list[MicroBatch], spec: LossSpec, temperature: float, denominator: float) -> UpdateResult:
        """One optimizer update from the summed loss of all ranks' micro-batches, divided once by `denominator`."""
        ...

    def skip(self) -> UpdateResult:
        """Count an update of which no row was left: the learning rate's schedule goes on, weights and optimizer rest."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its Hugging Face name, whole, on the CPU; tensors are yielded on rank 0 only.

        Of a model with an adapter: merged, under the names of the model without one.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the complete state, so that `load` continues bit for bit."""

    def load(self, folder: Path) -> None: ...
