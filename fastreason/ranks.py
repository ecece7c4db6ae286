"""The trainer's ranks talking to each other: bytes from rank 0 to all, and sums and maxima over all. No pickle."""

import os

import torch
import torch.distributed as dist


class Ranks:
    """Collectives over the default process group; every method is called on all ranks in the same order."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.num = dist.get_world_size() if dist.is_initialized() else 1
        self._device = device or torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def broadcast(self, message: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        if self.num == 1:
            assert message is not None
            return message
        size = torch.tensor([len(message or b"")], dtype=torch.int64, device=self._device)
        dist.broadcast(size, src=0)
        body = torch.empty(int(size), dtype=torch.uint8, device=self._device)
        if self.is_first:
            assert message is not None
            body.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8))
        dist.broadcast(body, src=0)
        return body.cpu().numpy().tobytes()

    def sum(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: list[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self.num == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=operation)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.num > 1:
            dist.barrier()


def imbalance(ranks: Ranks, cost: float) -> float:
    """max / mean of the ranks' costs: 1 where all have the same, or nothing, to do."""
    (total,), (most,) = ranks.sum([cost]), ranks.max([cost])
    return most * ranks.num / total if total else 1.0


def explain_timeout(error: BaseException) -> str | None:
    """In words, where `error` is a collective that waited too long for another rank; else None."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(sign in text for sign in ("imed out", "Timeout(ms)")):
        return None
    rank = os.environ.get("RANK", "0")
    return (
        f"trainer rank {rank} waited too long for another rank in a collective ({text.splitlines()[0][:200]}). See "
        "logs/trainer.log for a rank that stopped or fell behind; raise run.timeout_s if a step really takes that long."
    )
