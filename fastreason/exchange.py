"""The exchange file of weights: written by the trainer, read by engines, and proved equal by a digest of its tensors.

A plain safetensors file (no pickle) in shared memory or on shared storage. The digest is taken over names, dtypes,
shapes and bytes, so that it can be computed on either side from the tensors themselves and not from the file.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file


class Digest:
    """Running xxh3-128 digest of named tensors; the order of the tensors counts."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.num_tensors = 0
        self.num_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._state.update(flat.numpy().data)
        self.num_tensors += 1
        self.num_bytes += flat.numel()

    def hexdigest(self) -> str:
        return self._state.hexdigest()


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> Digest:
    """Write named CPU tensors aside and rename, so that a reader never sees half a file; returns their digest."""
    digest = Digest()
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    aside = path.with_suffix(".writing")
    save_file(tensors, str(aside))
    os.replace(aside, path)
    return digest


def read_weights(path: str | Path, digest: Digest | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the named tensors of an exchange file in sorted order, adding each to `digest`."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if digest is not None:
                digest.add(name, tensor)
            yield name, tensor


class ExchangeFolder:
    """A private folder for the exchange files of one run, in shared memory where that has the room, else in the temporary one.

    Its name is unique and a lock marks it as in use, so that runs never meet; what a killed run left behind (its lock is
    free) is removed by the next run on the machine.
    """

    PREFIX, LOCK = "fastreason-", ".lock"

    def __init__(
        self, need_bytes: int, parents: tuple[Path, ...] = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    ) -> None:
        usable = [p for p in parents if p.is_dir() and os.access(p, os.W_OK)]
        for parent in usable:
            self._sweep(parent)
        parent = next((p for p in usable if shutil.disk_usage(p).free > 2 * need_bytes), usable[-1])
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=self.PREFIX, dir=parent))
            self._lock = open(self.path / self.LOCK, "w")  # noqa: SIM115 (held for as long as the folder)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / self.LOCK).exists():
                return
            # Another run's sweep took the folder between its making and its locking.
            self._lock.close()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _sweep(self, parent: Path) -> None:
        for lock in parent.glob(f"{self.PREFIX}*/{self.LOCK}"):
            with contextlib.suppress(OSError), open(lock, "r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)


def compare_held(
    held: Iterable[tuple[str, torch.Tensor]], sent: dict[str, torch.Tensor], fused: dict[str, list[str]]
) -> tuple[int, list[str]]:
    """Compare what an engine holds with what was sent, tensor by tensor.

    `fused` maps the engine's name of a fused projection to the parts it stacks along dim 0 (vLLM's
    `packed_modules_mapping`, e.g. qkv_proj -> q_proj, k_proj, v_proj). Tensors that the engine keeps in a layout of its
    own (sharded, repacked) are left out. Returns the number of bytes found equal and the names that differ.
    """
    num_bytes, different = 0, []
    for name, tensor in held:
        expected = _expected(name, sent, fused)
        if expected is None or expected.shape != tensor.shape or expected.dtype != tensor.dtype:
            continue
        if torch.equal(tensor.detach().cpu(), expected):
            num_bytes += expected.numel() * expected.element_size()
        else:
            different.append(name)
    return num_bytes, different


def _expected(name: str, sent: dict[str, torch.Tensor], fused: dict[str, list[str]]) -> torch.Tensor | None:
    if name in sent:
        return sent[name]
    pieces = name.split(".")
    for position, piece in enumerate(pieces):
        if piece in fused:
            names = [".".join([*pieces[:position], part, *pieces[position + 1 :]]) for part in fused[piece]]
            if all(part in sent for part in names):
                return torch.cat([sent[part] for part in names], dim=0)
    return None
