"""Publication of weights: from the updater's parameters to an exchange file that every engine loads and verifies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastreason.exchange import write_weights
from fastreason.types import WeightUpdate

KEPT_FILES = 2  # the one that an engine may be reading, and the newest


class WeightSource(Protocol):
    rank: int

    def weights(self) -> Iterator[tuple[str, Tensor]]: ...


class Publisher:
    """Writes version after version into one folder, in the dtype that the engines hold; old files are removed."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._written: list[Path] = []

    def write(self, source: WeightSource, version: int) -> WeightUpdate | None:
        """Gather (on all ranks) and write (on rank 0); returns the update on rank 0, None elsewhere."""
        tensors = {name: tensor.to(self._dtype) for name, tensor in source.weights()}
        if source.rank != 0:
            return None
        path = self._folder / f"weights-{version:06d}.safetensors"
        digest = write_weights(path, tensors)
        self._written.append(path)
        while len(self._written) > KEPT_FILES:
            self._written.pop(0).unlink(missing_ok=True)
        return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)


def save_model(source: WeightSource, model_dir: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a normal Hugging Face folder: the trained weights, and every other file of the model it started from.

    Called on all ranks; written aside and renamed on rank 0.
    """
    import shutil

    from huggingface_hub import save_torch_state_dict

    # Cloned: the weights of a ZeRO engine are views of one flat buffer, which safetensors would refuse to cut.
    tensors = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in source.weights()}
    if source.rank != 0:
        return
    aside = target.with_name(target.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model", ".py") and "index" not in file.name:
            shutil.copy(file, aside / file.name)
    save_torch_state_dict(tensors, str(aside), metadata={"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
