"""The exchange file of weights: written by the trainer, read by engines, and proved equal by a digest of its tensors.

A plain safetensors file (no pickle) in shared memory or on shared storage. The digest is taken over names, dtypes,
shapes and bytes, so that it can be computed on either side from the tensors themselves and not from the file. Torch is
imported only where tensors are: the launcher and the fake engine's server do without.
"""

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    import torch

EXCHANGE_VARIABLE = "FASTREASON_EXCHANGE_DIR"  # the folder from which an engine's process takes weights
# Of the safetensors format: the number types and how torch names them.
TORCH_DTYPES = {
    **{f"F{bits}": f"torch.float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"torch.int{bits}" for bits in (8, 16, 32, 64)},
    "BF16": "torch.bfloat16",
    "U8": "torch.uint8",
    "BOOL": "torch.bool",
}
FORMAT_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
HEADER_BYTES = 1 << 23  # for the names of some 60,000 tensors


class Digest:
    """Running xxh3-128 digest of named tensors; the order of the tensors counts."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()
        self.num_tensors = 0
        self.num_bytes = 0

    def add(self, name: str, tensor: "torch.Tensor") -> None:
        self.add_bytes(name, str(tensor.dtype), tuple(tensor.shape), tensor_bytes(tensor))

    def add_bytes(self, name: str, dtype: str, shape: tuple[int, ...], content: memoryview) -> None:
        """Add a tensor by what it consists of; `dtype` as torch names it, e.g. torch.bfloat16."""
        self._state.update(f"{name}|{dtype}|{shape}|".encode())
        self._state.update(content)
        self.num_tensors += 1
        self.num_bytes += content.nbytes

    def hexdigest(self) -> str:
        return self._state.hexdigest()


class SumDigest(Digest):
    """The same over tensors that lie on a GPU: of each only a sum is fetched, so that a model takes milliseconds.

    The sum is over 64-bit words x_i, (2 i + 1) x_i modulo 2^64: a word that changed always changes it.
    """

    def add(self, name: str, tensor: "torch.Tensor") -> None:
        import torch

        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        words = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
        weights = torch.arange(1, 2 * words.numel() + 1, 2, device=words.device)
        total = int((words * weights).sum()) % 2**64
        self.add_bytes(name, str(tensor.dtype), tuple(tensor.shape), memoryview(total.to_bytes(8, "little")))
        self.num_bytes += flat.numel() - 8


class Entry(NamedTuple):
    """A tensor of an exchange file: bytes [first, last) of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


def write_weights(
    path: Path, tensors: "Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]", over: Path | None = None
) -> Digest:
    """Write named tensors one after another, aside and renamed, so that a reader never sees half a file.

    Nothing is held but the tensor at hand. `over` is a file that nobody needs any more: the new one is written into its
    pages, for new ones take several times longer to fill. Returns the digest of all, in their order, which is the file's.
    """
    digest, header, position = Digest(), {}, 0
    aside = path.with_suffix(".writing")
    if over is not None:
        os.replace(over, aside)
    with open(aside, "r+b" if over is not None else "wb") as file:
        file.seek(8 + HEADER_BYTES)
        for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
            content = tensor_bytes(tensor)
            digest.add_bytes(name, str(tensor.dtype), tuple(tensor.shape), content)
            file.write(content)
            offsets = [position, position := position + content.nbytes]
            header[name] = {
                "dtype": FORMAT_DTYPES[str(tensor.dtype)],
                "shape": [*tensor.shape],
                "data_offsets": offsets,
            }
        file.truncate()
        # The format allows spaces after the header: so it can be written last, when all names are known.
        text = json.dumps(header).encode()
        if len(text) > HEADER_BYTES:
            raise ValueError(f"the names of {len(header)} tensors take {len(text)} bytes, more than {HEADER_BYTES}")
        file.seek(0)
        file.write(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))
    os.replace(aside, path)
    return digest


def read_entries(path: str | Path) -> list[Entry]:
    """What an exchange file holds, in its order; raises ValueError where it is torn."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is torn: a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length).rstrip(b" "))
    header.pop("__metadata__", None)
    entries = [
        Entry(
            name,
            TORCH_DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            *(8 + length + at for at in entry["data_offsets"]),
        )
        for name, entry in header.items()
    ]
    entries.sort(key=lambda entry: entry.first)
    if entries and entries[-1].last > size:
        raise ValueError(f"{path} is torn: {entries[-1].name} ends at byte {entries[-1].last} of {size}")
    return entries


def read_weights(path: str | Path, digest: Digest | None = None) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the named tensors of an exchange file in its order, adding each to `digest`."""
    from safetensors import safe_open

    names = [entry.name for entry in read_entries(path)]
    with safe_open(str(path), framework="pt", device="cpu") as file:
        for name in names:
            tensor = file.get_tensor(name)
            if digest is not None:
                digest.add(name, tensor)
            yield name, tensor


def digest_file(path: str | Path) -> Digest:
    """The digest of an exchange file's tensors, taken without making tensors of them."""
    digest, entries = Digest(), read_entries(path)
    with (
        open(path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        for name, dtype, shape, first, last in entries:
            with view[first:last] as content:
                digest.add_bytes(name, dtype, shape, content)
    return digest


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """The bytes of a tensor, without a copy where it lies in one piece in the CPU's memory."""
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def published_file(path: str) -> Path:
    """`path`, resolved; raises ValueError unless it lies in the exchange folder that this process was given."""
    allowed = os.environ.get(EXCHANGE_VARIABLE, "")
    file = Path(path).resolve()
    if not allowed or not file.is_relative_to(Path(allowed).resolve()):
        raise ValueError(f"weights at {path!r} are outside the exchange folder {allowed!r}")
    return file


class ExchangeFolder:
    """A private folder for the exchange files of one run, in shared memory where that has the room, else in the temporary one.

    Its name is unique and a lock marks it as in use, so that runs never meet; what a killed run left behind (its lock is
    free) is removed by the next run on the same machine.
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
            self._lock.write(socket.gethostname())
            self._lock.flush()
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
                # On shared storage not every file system tells one machine of another's locks.
                if file.read() not in ("", socket.gethostname()):
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent, ignore_errors=True)


def compare_held(
    held: "Iterable[tuple[str, torch.Tensor]]", sent: "dict[str, torch.Tensor]", fused: dict[str, list[str]]
) -> tuple[int, list[str]]:
    """Compare what an engine holds with what was sent, tensor by tensor.

    `fused` maps the engine's name of a fused projection to the parts it stacks along dim 0 (vLLM's
    `packed_modules_mapping`, e.g. qkv_proj -> q_proj, k_proj, v_proj). Tensors that the engine keeps in a layout of its
    own (sharded, repacked) are left out. Returns the number of bytes found equal and the names that differ.
    """
    import torch

    num_bytes, different = 0, []
    for name, tensor in held:
        # An engine that packed a weight keeps an empty one in its place: not worth putting the parts together for.
        expected = _expected(name, sent, fused) if tensor.numel() else None
        if expected is None or expected.shape != tensor.shape or expected.dtype != tensor.dtype:
            continue
        if torch.equal(tensor.detach(), expected.to(tensor.device)):
            num_bytes += expected.numel() * expected.element_size()
        else:
            different.append(name)
    return num_bytes, different


def _expected(name: str, sent: "dict[str, torch.Tensor]", fused: dict[str, list[str]]) -> "torch.Tensor | None":
    import torch

    if name in sent:
        return sent[name]
    pieces = name.split(".")
    for position, piece in enumerate(pieces):
        if piece in fused:
            names = [".".join([*pieces[:position], part, *pieces[position + 1 :]]) for part in fused[piece]]
            if all(part in sent for part in names):
                return torch.cat([sent[part] for part in names], dim=0)
    return None
