"""A checkpoint of DeepSpeed's read into another layout: another number of ranks, another ZeRO stage, another precision.

Every layout holds the same three fp32 numbers of each trained weight: its master and Adam's two moments. It differs in which
rank has them and at what place of which flat tensor. So a layout is a list of blocks, and a block says which piece of which
parameter lies where: read from the files of a checkpoint, written into the tensors of a running engine. The files are mapped,
not loaded, and nothing is written beside them. It refuses to know how a checkpoint is made, which stays DeepSpeed's business,
and rests what is not trained: that comes from the model's folder.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastreason.errors import CheckpointError

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
# Where DeepSpeed's optimizers keep this rank's flat fp32 weights: bf16 at stage 1, stages 1 and 2, stage 3.
MASTERS = ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
RANK_OF_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")

Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


class Layout(NamedTuple):
    """What decides where a weight's numbers lie."""

    stage: int
    num_ranks: int
    bf16: bool
    offload: bool = False

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        offload = ", offload" if self.offload else ""
        return f"{ranks}, ZeRO {self.stage}, {'bfloat16' if self.bf16 else 'float32'}{offload}"


class Piece(NamedTuple):
    """`numel` elements of a parameter, flattened, from `start` on; they lie in a flat tensor from `place` on."""

    name: str
    start: int
    numel: int
    place: int


@dataclass
class Block:
    """A flat tensor of weights with its moments, of one rank. values: by MASTER and, once there was an update, MOMENTS."""

    pieces: list[Piece]
    values: dict[str, Tensor]
    step: float = 0.0


@dataclass
class SavedState:
    """The state in a checkpoint's folder, by name, whatever its layout."""

    layout: Layout
    model_state: Mapping[str, Any]
    _found: dict[str, list[tuple[Piece, Block]]] = field(default_factory=dict)

    def add(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            for piece in block.pieces:
                self._found.setdefault(piece.name, []).append((piece, block))

    @property
    def names(self) -> set[str]:
        return set(self._found)

    @property
    def step(self) -> float | None:
        """The number of Adam's updates, of all parameters alike; None where there was none."""
        blocks = [block for found in self._found.values() for _, block in found]
        return max(block.step for block in blocks) if all(key in blocks[0].values for key in MOMENTS) else None

    def copy(self, key: str, name: str, start: int, target: Tensor) -> None:
        """target [n] <- elements start to start + n of the parameter `name`; raises CheckpointError where some are missing."""
        missing = len(target)
        for piece, block in self._found[name]:
            first, last = max(start, piece.start), min(start + len(target), piece.start + piece.numel)
            if first < last:
                place = piece.place + first - piece.start
                target[first - start : last - start].copy_(block.values[key][place : place + last - first])
                missing -= last - first
        if missing:
            raise CheckpointError(
                f"{name}: {missing} of {len(target)} elements from {start} on are not in the checkpoint."
            )

    def whole(self, name: str, numel: int) -> Tensor:
        """[numel] fp32: the master of a parameter."""
        found = torch.empty(numel)
        self.copy(MASTER, name, 0, found)
        return found


def layout_of(ds_config: Mapping[str, Any], num_ranks: int) -> Layout:
    """The layout that DeepSpeed's own configuration gives."""
    bf16 = bool(ds_config.get("bf16", {}).get("enabled", False))
    zero = ds_config["zero_optimization"]
    return Layout(int(zero["stage"]), num_ranks, bf16, "offload_optimizer" in zero)


def saved_layout(folder: Path) -> tuple[Layout, Mapping[str, Any]]:
    """The layout of the checkpoint in DeepSpeed's `folder`, and the model's state of its first rank, mapped."""
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    state = _mapped(path)
    return layout_of(state["ds_config"], int(state["dp_world_size"])), state


def read_saved(folder: Path, order: Sequence[str]) -> SavedState:
    """Map the checkpoint in DeepSpeed's `folder`; raises CheckpointError where a rank's file is missing or unreadable.

    order: the names of the trained parameters as an optimizer has them. Without ZeRO, a checkpoint knows them by number only.
    """
    layout, model_state = saved_layout(folder)
    saved = SavedState(layout, model_state)
    if layout.stage == 0:
        saved.add(_blocks_of_plain(model_state, order))
        return saved
    files = {int(match[1]): path for path in folder.iterdir() if (match := RANK_OF_FILE.search(path.name))}
    missing = [rank for rank in range(layout.num_ranks) if rank not in files]
    if missing:
        raise CheckpointError(f"{folder}: it was written by {layout}, and the files of ranks {missing} are not there.")
    seen: dict[str, int] = {}
    for rank in range(layout.num_ranks):
        state = _mapped(files[rank])["optimizer_state_dict"]
        if layout.stage == 3:
            saved.add(_blocks_of_stage_3(state, model_state["param_shapes"], rank, layout.num_ranks))
        else:
            saved.add(_blocks_of_slices(state, seen))
    return saved


def _mapped(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path}: the updater's state cannot be read: {error}") from error


def _block(pieces: list[Piece], master: Tensor, adam: Mapping[str, Any]) -> Block:
    moments = {key: adam[key].flatten() for key in MOMENTS if key in adam}
    return Block(pieces, {MASTER: master.flatten(), **moments}, float(adam.get("step", 0.0)))


def _blocks_of_plain(model_state: Mapping[str, Any], order: Sequence[str]) -> list[Block]:
    """fp32 without ZeRO: the parameters are their own masters, and torch's optimizer counts them."""
    weights, adam = model_state["module"], model_state["optimizer"]["state"]
    blocks = []
    for number, name in enumerate(order):
        state = adam.get(number, {})
        if adam and not state:  # it has never had a gradient: the others' updates left it alone
            state = {key: torch.zeros_like(weights[name]) for key in MOMENTS}
        blocks.append(_block([Piece(name, 0, weights[name].numel(), 0)], weights[name], state))
    return blocks


def _blocks_of_slices(state: Mapping[str, Any], seen: dict[str, int]) -> list[Block]:
    """Stages 1 and 2: one long line of parameters cut among the ranks. seen: elements by name, of the ranks before."""
    blocks = []
    adam = state["base_optimizer_state"]["state"]
    masters = state["single_partition_of_fp32_groups"]
    for number, (master, places) in enumerate(zip(masters, state["param_slice_mappings"], strict=True)):
        pieces = []
        for name, address in places.items():
            pieces.append(Piece(name, seen.get(name, 0), address.numel, address.start))
            seen[name] = seen.get(name, 0) + address.numel
        blocks.append(_block(pieces, master, adam.get(number, {})))
    return blocks


def _blocks_of_stage_3(
    state: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], rank: int, num_ranks: int
) -> list[Block]:
    """Stage 3: every parameter cut among the ranks."""
    blocks = []
    adam = state["optimizer_state_dict"]["state"]
    for number, (master, group) in enumerate(zip(state["fp32_flat_groups"], shapes, strict=True)):
        sizes = [(name, shape.numel(), -(-shape.numel() // num_ranks)) for name, shape in group.items()]
        blocks.append(_block(_shares(sizes, rank), master, adam.get(number, {})))
    return blocks


def _shares(sizes: Sequence[tuple[str, int, int]], rank: int) -> list[Piece]:
    """A rank's pieces one after the other, of parameters (name, elements, elements of a share)."""
    pieces, place = [], 0
    for name, numel, share in sizes:
        pieces.append(Piece(name, rank * share, max(0, min(share, numel - rank * share)), place))
        place += share
    return pieces


def live_blocks(module: nn.Module, optimizer: Any, rank: int) -> list[tuple[nn.Parameter, list[Piece]]]:
    """What this rank of a running engine keeps masters of: each flat tensor that Adam updates, with its pieces."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = next((kind for kind in MASTERS if hasattr(optimizer, kind)), None)
    if found is None:  # torch's own
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [(p, [Piece(names[id(p)], 0, p.numel(), 0)]) for p in parameters]
    masters = getattr(optimizer, found)
    if found == MASTERS[2]:
        sizes = [[(names[id(p)], p.ds_numel, p.ds_tensor.ds_numel) for p in group] for group in optimizer.fp16_groups]
        return [(master, _shares(group, rank)) for master, group in zip(masters, sizes, strict=True)]
    pieces: list[list[Piece]] = [[] for _ in masters]
    for name, parameter in module.named_parameters():
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
            pieces[mapping.param_group_index].append(Piece(name, there.start, here.numel, here.start))
    return list(zip(masters, pieces, strict=True))


@torch.no_grad()
def write_into(saved: SavedState, module: nn.Module, optimizer: Any, rank: int, gather: Gather) -> None:
    """Give a running engine the weights, masters and moments of a checkpoint; on all ranks alike.

    gather: makes parameters whole for a change by the first rank. Raises CheckpointError where the checkpoint is of other
    parameters than are trained.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if saved.names != set(trained):
        odd = sorted(saved.names ^ set(trained))
        raise CheckpointError(f"the checkpoint is of other parameters than are trained: {', '.join(odd[:5])} ...")
    adam: Any = getattr(optimizer, "optimizer", optimizer)
    step = saved.step
    fused = any(group.get("fused") for group in adam.param_groups)
    for master, pieces in live_blocks(module, optimizer, rank):
        flat = master.data.view(-1)
        _fill(flat, saved, MASTER, pieces)
        if step is None:
            continue
        state = {key: torch.zeros_like(master.data) for key in MOMENTS}
        for key, moment in state.items():
            _fill(moment.view(-1), saved, key, pieces)
        adam.state[master] = {"step": torch.tensor(step, device=master.device if fused else None), **state}
    for name, parameter in trained.items():
        divided = hasattr(parameter, "ds_numel")
        with gather([parameter]) if divided else nullcontext():
            if rank == 0 or not divided:
                parameter.data.view(-1).copy_(saved.whole(name, parameter.numel()))


def _fill(flat: Tensor, saved: SavedState, key: str, pieces: Sequence[Piece]) -> None:
    for piece in pieces:
        if piece.numel:
            saved.copy(key, piece.name, piece.start, flat[piece.place : piece.place + piece.numel])
