"""Several machines: which of them this is, and how the launchers of a run's nodes hear of each other.

An outer launcher (torchrun, deepspeed, Slurm) starts the same command on every node, one process each. The first is the run's
launcher as on one machine; each of the others starts trainer ranks and nothing else (`launch.py`). What they tell each other
goes through torch's TCP store at the outer launcher's address: where the run's folder is, signs of life, a request to stop, and
how each has ended. No key is among it. This module refuses to know processes, configs and what is trained.
"""

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from fastreason.errors import ConfigError, FastreasonError, NodeError
from fastreason.patience import Patience

BEAT_S = 1.0
SILENCE_S = 60.0  # a node that shows no life for so long is lost
CONNECT_S = 300.0  # so long the nodes may start one after another
LAST_WORDS_S = 10.0  # the first node, which may hold the store, waits so long for the others' ends
# Of the outer launcher; to the processes that we start they would say that these are its ranks.
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
)
PREFIXES = ("TORCHELASTIC_", "PET_", "CROSS_")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun has a store at that address already
ADVICE = "train.ranks says how many ranks each starts. See configs/launch/."


@dataclass(frozen=True)
class Node:
    """One of `num` machines; the first has index 0 and is at `address`, where the store is at `port`."""

    index: int
    num: int
    address: str
    port: int
    has_store: bool = False

    @property
    def is_first(self) -> bool:
        return self.index == 0


@dataclass(frozen=True)
class Place:
    """Of a node's ranks: where all of them meet, and the node's number among so many."""

    index: int
    num: int
    address: str
    port: int


def node_of(environment: Mapping[str, str]) -> Node | None:
    """The node that an outer launcher says this is; None on one machine alone. Raises ConfigError for what cannot be.

    torchrun and deepspeed: RANK and WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Slurm's srun: SLURM_PROCID and
    SLURM_STEP_NUM_TASKS, and the same two, which its script sets. (SLURM_NTASKS is the allocation's: in an interactive shell
    there, which is a step of one task, it names more.)
    """
    names = ("RANK", "WORLD_SIZE")
    if "WORLD_SIZE" not in environment and "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    try:
        index, num = (int(environment.get(name, default)) for name, default in zip(names, ("0", "1"), strict=True))
    except ValueError:
        raise ConfigError(
            f"{names[0]}, {names[1]} of the environment are not numbers. Unset them, or see configs/launch/."
        ) from None
    if num <= 1:
        return None
    local = environment.get("SLURM_LOCALID" if names[0] == "SLURM_PROCID" else "LOCAL_RANK", "0")
    if local != "0" or environment.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise ConfigError(f"the launcher has started several processes on one machine, and one is wanted: {ADVICE}")
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not 0 <= index < num or not address or not port.isdigit():
        raise ConfigError(
            f"{names[1]}={num}, {names[0]}={index}, MASTER_ADDR={address!r}, MASTER_PORT={port!r}: on several machines the "
            "last two must name the first of them and a free port there. See configs/launch/."
        )
    return Node(index, num, address, int(port), environment.get(AGENT_STORE, "").lower() in ("1", "true"))


def forget_launcher(environment: MutableMapping[str, str]) -> None:
    """Remove the outer launcher's variables."""
    for name in list(environment):
        if name in VARIABLES or name.startswith(PREFIXES):
            del environment[name]


def open_store(node: Node, connect_s: float = CONNECT_S) -> Any:
    """The store that all nodes share; raises FastreasonError where the first node cannot be reached."""
    from torch.distributed import PrefixStore, TCPStore

    hosts = node.is_first and not node.has_store
    try:
        store = TCPStore(
            node.address, node.port, is_master=hosts, timeout=timedelta(seconds=connect_s), wait_for_workers=False
        )
    except Exception as error:  # torch has several
        what = "its port cannot be taken" if hosts else "it does not answer"
        raise FastreasonError(
            f"node {node.index} of {node.num}: MASTER_ADDR={node.address}, MASTER_PORT={node.port}: {what} ({error})."
        ) from error
    return PrefixStore("fastreason", store)


class Request(Protocol):
    """A request to stop, as signals make it, or other nodes."""

    number: int | None

    def hear(self) -> None: ...


@dataclass
class Link:
    """What the nodes of one run know of each other. `look` is called every second or so and raises where the run cannot go on.

    The store waits without a limit for a machine that has vanished. So a thread of its own makes all calls, once in BEAT_S: it
    tells what there is to tell, with a sign of life, and the other methods see what it read last. Long preparations are no
    silence either.
    """

    node: Node
    store: Any
    silence_s: float = SILENCE_S
    on_stop: Callable[[], None] = lambda: None
    _beats: dict[int, tuple[str, Patience]] = field(default_factory=dict)
    _to_tell: deque[tuple[str, str]] = field(default_factory=deque)
    _read: dict[str, str] = field(default_factory=dict)  # replaced as a whole
    _num_read: int = 0
    _num_looked_at: int = 0
    _gone: str | None = None
    _answer: Patience = field(init=False)
    _due: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        others = [number for number in range(self.node.num) if number != self.node.index]
        # One that has not come yet has the time of a start.
        self._beats = {number: ("", Patience(max(self.silence_s, CONNECT_S))) for number in others}
        self._answer = Patience(self.silence_s)
        threading.Thread(target=self._exchange, name="beat of the node", daemon=True).start()

    def announce(self, run: dict[str, Any]) -> None:
        """As the first node: tell the others what they are to run."""
        self._tell("run", json.dumps(run))

    def await_run(self, hear: Callable[[], None], leave: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """As another node: what the first has announced, None once it is to `leave`; raises what `hear` does meanwhile."""
        while not leave():
            read = self._read
            if "run" in read:
                return dict(json.loads(read["run"]))
            hear()
            if "end/0" in read:
                raise NodeError(
                    f"node 0 has ended with exit code {json.loads(read['end/0'])['code']} before its run began."
                )
            time.sleep(BEAT_S / 4)
        return None

    def request_stop(self) -> None:
        """Ask every node to stop; the first one's ranks save, and all end."""
        if "stop" not in self._read:
            self._tell("stop", "1")

    def look(self) -> None:
        """Hear of the others: `on_stop` where one was asked to stop; raises NodeError where one has failed or is lost.

        So does one that ends before the first has: its ranks are missed.
        """
        if "stop" in self._read:
            self.on_stop()
        ends = {number: end for number in self._beats if (end := self.end_of(number)) is not None}
        for number, end in ends.items():
            if end["error"]:
                raise NodeError(f"node {number} has failed: {end['error']}")
        for number, end in ends.items():
            if end["code"] and 0 not in ends:
                raise NodeError(
                    f"node {number} has ended with exit code {end['code']} before the run has; the run was ended."
                )
        if 0 in ends and ends[0]["code"]:
            self.on_stop()  # it was stopped at once: its ranks are missed
        if not self._has_news():
            return
        for number in self._beats.keys() - ends.keys():
            self._judge_beat(number)

    def end_of(self, number: int) -> dict[str, Any] | None:
        """How a node has ended: its exit code, and its error or None."""
        end = self._read.get(f"end/{number}")
        return None if end is None else dict(json.loads(end))

    def others_said(self) -> list[str]:
        """What other nodes say went wrong there, once each has ended or LAST_WORDS_S are over; at once after `close`."""
        if not self._ended.is_set():
            self._wait(LAST_WORDS_S, lambda: all(self.end_of(number) is not None for number in self._beats))
        ends = {number: self.end_of(number) for number in self._beats}
        return [f"node {number}: {end['error']}" for number, end in ends.items() if end and end["error"]]

    def await_code(self, limit_s: float, leave: Callable[[], bool] = lambda: False) -> int | None:
        """As another node: the exit code of the first; None where it does not end, or once this one is to `leave`."""
        self._wait(limit_s, lambda: self.end_of(0) is not None or leave())
        end = self.end_of(0)
        return None if end is None else int(end["code"])

    def close(self, code: int, error: str | None = None) -> None:
        """Say how this node has ended, the first time. The first one waits for the others: the store may end with it."""
        if self._ended.is_set():
            return
        self._tell(f"end/{self.node.index}", json.dumps({"code": code, "error": error}))
        self._wait(LAST_WORDS_S, lambda: not self._to_tell)
        if self.node.is_first:
            self.others_said()
        self._ended.set()
        self._due.set()

    def _wait(self, limit_s: float, until: Callable[[], bool]) -> None:
        """Until it is so, or time is up, or the store does not answer and it will not be."""
        patience = Patience(limit_s)
        with contextlib.suppress(NodeError):
            while not until() and not patience.exhausted:
                self._has_news()
                time.sleep(BEAT_S / 4)
                patience.look()

    def _has_news(self) -> bool:
        """Whether the store was read since the last time; raises NodeError where it is gone or does not answer."""
        shared = f"node 0 of {self.node.num}, with what the nodes share,"
        if self._gone is not None:
            raise NodeError(f"{shared} is gone ({self._gone}).")
        self._answer.look()
        if self._num_looked_at != self._num_read:
            self._num_looked_at = self._num_read
            self._answer.renew()
            return True
        if self._answer.exhausted:
            raise NodeError(f"{shared} has not answered for {self._answer.spent_s:.0f} s; the run was ended.")
        return False

    def _judge_beat(self, number: int) -> None:
        last, patience = self._beats[number]
        beat = self._read.get(f"beat/{number}")
        patience.look()
        if beat is not None and beat != last:
            patience.limit_s = self.silence_s
            patience.renew()
            self._beats[number] = (beat, patience)
        if patience.exhausted:
            seen = "has shown no sign of life" if last else "has not come"
            raise NodeError(
                f"node {number} of {self.node.num} {seen} for {patience.spent_s:.0f} s; the run was ended. See the outer "
                "launcher's output there."
            )

    def _tell(self, key: str, value: str) -> None:
        self._to_tell.append((key, value))
        self._due.set()

    def _exchange(self) -> None:
        number = 0
        while not self._ended.is_set():
            self._due.clear()
            number += 1
            try:
                while self._to_tell:
                    self.store.set(*self._to_tell[0])
                    self._to_tell.popleft()
                self.store.set(f"beat/{self.node.index}", str(number))
                self._read = self._read_all()
            except Exception as error:  # torch has several
                self._gone = str(error).partition("\n")[0]
                return
            self._num_read = number
            self._due.wait(BEAT_S)

    def _read_all(self) -> dict[str, str]:
        """All that others tell; what the first announces after its end, so that an end alone is one without a run.

        Ends are read until two readings agree: a node ends because another has failed, and alone it would look like the cause.
        """
        ends, beats = ([f"{name}/{number}" for number in self._beats] for name in ("end", "beat"))
        read, before = self._get(ends), None
        while read != before:
            read, before = self._get(ends), read
        return {**read, **self._get([*beats, "stop", "run"])}

    def _get(self, keys: list[str]) -> dict[str, str]:
        return {key: self.store.get(key).decode() for key in keys if self.store.check([key])}


def lead(node: Node, run: Callable[[Link], int]) -> int:
    """As the first machine: run, and tell the others how it ended; what went wrong there is added to an error here."""
    link = Link(node, open_store(node))
    code, said = 1, "it was ended"
    try:
        code, said = run(link), ""
    except NodeError:
        said = ""  # the others know
        raise
    except FastreasonError as error:
        said = str(error)
        link.close(code, said)
        error.args = ("\n".join([said, *link.others_said()]),)
        raise
    finally:
        link.close(code, said or None)
    return code


def heed(link: Link | None, request: Request) -> Callable[[], None]:
    """What a supervisor is to call every second: pass a request to stop on, and take those of others as one of our own."""
    if link is None:
        return lambda: None
    known = link

    def hear() -> None:
        if request.number is not None:
            known.request_stop()
        known.look()

    link.on_stop = request.hear
    return hear
