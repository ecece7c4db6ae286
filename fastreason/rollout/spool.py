"""What must outlive the producer: its state as one value, for checkpoints, and a copy of it on disk, for its own restart.

The spool is a folder of the session: the books without groups in one file, each finished group in a file of its own,
written once and removed once it is trained. Files are renamed into place; they survive the process, not the machine
(that is what checkpoints are for).
"""

import os
from pathlib import Path
from typing import Any

import msgspec

from fastreason.errors import CheckpointError
from fastreason.types import Group, Prompt


class Issued(msgspec.Struct, frozen=True):
    """A prompt that has a ticket."""

    ticket: int
    prompt: Prompt


class ProducerState(msgspec.Struct, kw_only=True):
    """Everything from which another process goes on: nothing issued is forgotten, nothing finished is made again.

    `unfinished` prompts are issued and not finished; `finished` groups are graded and not trained; `handed_out` are the
    tickets of the batch that the trainer had at that moment (in a checkpoint: none). `trained` counts groups; `offset` is
    admission's.
    """

    cursor: dict[str, Any]
    next_ticket: int
    trained: int
    offset: int
    unfinished: list[Issued]
    finished: list[Group] = []
    handed_out: list[int] = []
    counters: dict[str, float] = {}
    ledger_bytes: int = 0

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


def decode_state(raw: bytes) -> ProducerState:
    """The state that `encode` gave; raises CheckpointError where it is none."""
    try:
        return msgspec.msgpack.decode(raw, type=ProducerState)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"the producer's state in the checkpoint cannot be read: {error}") from error


class Spool:
    """One folder; `None` keeps nothing (a producer that is never restarted)."""

    STATE = "state.msgpack"

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def save(self, state: ProducerState) -> None:
        """Replace the books; `state.finished` is not written here but group by group."""
        if self._folder is not None:
            self._write(self.STATE, msgspec.msgpack.encode(msgspec.structs.replace(state, finished=[])))

    def add(self, group: Group) -> None:
        if self._folder is not None:
            self._write(f"group-{group.ticket}.msgpack", msgspec.msgpack.encode(group))

    def remove(self, tickets: list[int]) -> None:
        if self._folder is not None:
            for ticket in tickets:
                (self._folder / f"group-{ticket}.msgpack").unlink(missing_ok=True)

    def load(self) -> ProducerState | None:
        """The books with all groups that are kept, or None where nothing was saved yet."""
        if self._folder is None or not (self._folder / self.STATE).is_file():
            return None
        state = decode_state((self._folder / self.STATE).read_bytes())
        groups = [
            msgspec.msgpack.decode(path.read_bytes(), type=Group) for path in self._folder.glob("group-*.msgpack")
        ]
        # A group may have been written after the books were: it is finished, whatever they say.
        done = {group.ticket for group in groups}
        state.unfinished = [issued for issued in state.unfinished if issued.ticket not in done]
        state.finished = sorted(groups, key=lambda group: group.ticket)
        return state

    def _write(self, name: str, data: bytes) -> None:
        assert self._folder is not None
        aside = self._folder / f"{name}.writing"
        aside.write_bytes(data)
        os.replace(aside, self._folder / name)
