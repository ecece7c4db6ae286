"""Supervision of a run's processes: sees that they live, starts again those that may be, and explains every end.

It knows a process by its exit code, its beats, what it left at its end and the requests to start it again, and nothing
of what it does. Which processes there are, and how each is started, is the launcher's (`launch.py`).
"""

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from fastreason.beats import BeatWatch, forget_beat
from fastreason.config import RunConfig
from fastreason.errors import EngineError, FastreasonError, NodeError, StuckError
from fastreason.metrics import read_progress
from fastreason.patience import Patience
from fastreason.processes import Child, tail
from fastreason.session import Outcome, Session, read_outcome, take_restart_request

TICK_S = 0.1
LOOK_S = 1.0  # between two looks at beats and at the memory that the processes share
LAST_WORDS_S = 5.0  # a main part whose fellow elsewhere has failed may have its own reason to tell
AT_ITS_END_S = 3.0  # a process that ends so shortly before the main one was no cause of its end


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one means now.

    What another machine was asked is `heard` as a SIGTERM and is no first one of this process: where all are sent the same
    signal, as by Slurm, the own one may come after it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.heard = False
        self.urgent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not self.heard:
            self.urgent = True
        self.heard, self.number = False, self.number or number

    def hear(self) -> None:
        """Take another machine's request as one of our own, where there is none yet."""
        if self.number is None:
            self.number, self.heard = int(signal.SIGTERM), True

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or 0)


@dataclass
class Part:
    """One process of the run, with those that it starts itself.

    `key` names it in requests and in counts of restarts, and None is one that is never started again; `members` are the
    names of its beats and outcomes; `explain_end` says from its log why it ended; `lost_signs` are what another process
    says that lost it; `kind` is shared by parts that stand in for each other, so that one that may not be started again ends
    the run only where it was the last of them. While one is `resting` nobody needs it, and where it stood another has its
    memory: whatever is wrong with it then is seen to afterwards.
    """

    name: str
    start: Callable[[], Child]
    key: str | None = None
    members: tuple[str, ...] = ()
    explain_end: Callable[[], str] | None = None
    lost_signs: tuple[str, ...] = ()
    kind: str | None = None
    resting: Callable[[], bool] = lambda: False
    num_restarts: int = 0


@dataclass
class _Watched:
    """A part that runs, and what has been seen of it."""

    part: Part
    child: Child
    beats: dict[str, BeatWatch]
    num_restarts: int = 0  # since the run's last trained step
    restarted_in_step: int = -1
    ended: Patience | None = None
    given_up: bool = False


@dataclass
class Supervisor:
    """The processes of one run, in the order of their start; the end of the last, the main one, is the end of the run.

    hear: called every second, for what other machines say; raises NodeError where the run cannot go on.
    """

    config: RunConfig
    session: Session
    request: StopRequest
    hear: Callable[[], None] = lambda: None
    _watched: list[_Watched] = field(default_factory=list)
    _step: int = 0
    _looked: Patience = field(default_factory=lambda: Patience(LOOK_S))

    def start(self, part: Part) -> None:
        self._watched.append(_Watched(part, part.start(), self._watch_beats(part)))

    @property
    def num_restarts(self) -> dict[str, int]:
        """How often each part that may be was started again, by its key."""
        return {watched.part.key: watched.part.num_restarts for watched in self._watched if watched.part.key}

    def watch(self) -> Outcome:
        """Wait for the main part's end, starting others again meanwhile; raises where the run cannot go on."""
        main, asked = self._watched[-1], None
        while main.child.exit_code is None:
            time.sleep(TICK_S)
            if self._look():
                self._hear(main)
            if self.request.number is not None and asked is None:
                asked = Patience(self.config.timeout_s)
                self.session.stop_file.touch()
                print("stopping: saving a checkpoint first; once more to stop now", file=sys.stderr)
            if self.request.urgent:
                return Outcome(finished=False)
            if asked is not None:
                asked.look()
                if asked.exhausted:
                    raise StuckError(
                        f"the {main.part.name} did not stop within run.timeout_s={self.config.timeout_s:g} s of being "
                        "asked; it was ended."
                    )
            for watched in self._watched[:-1]:
                if not watched.given_up:
                    self._keep_alive(watched)
            if self._main_has_ended(main):
                break
        return self._explain_main(main, asked is not None)

    def stop(self) -> None:
        """End everything, the last started first."""
        for watched in reversed(self._watched):
            watched.child.stop(grace_s=5.0)

    def _watch_beats(self, part: Part) -> dict[str, BeatWatch]:
        limit_s = self.config.hang_timeout_s
        return {name: BeatWatch(self.session.folder, name, limit_s) for name in part.members}

    def _look(self) -> bool:
        """Whether it was time to look at what changes slowly."""
        self._looked.look()
        if not self._looked.exhausted:
            return False
        self._looked.renew()
        for watched in self._watched:
            watched.child.note_family()
        segments = sorted(str(path) for watched in self._watched for path in watched.child.segments)
        self.session.segments_file.write_text("\n".join(segments))
        progress = read_progress(self.session.run_dir)
        self._step = max(self._step, progress.step if progress is not None else 0)
        return True

    def _hear(self, main: _Watched) -> None:
        """Hear of other machines; where one has failed, the reason may be here: what the main part has to say goes first."""
        try:
            self.hear()
        except NodeError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                main.child.process.wait(timeout=LAST_WORDS_S)
                self._explain_main(main, asked=False)
            raise

    def _keep_alive(self, watched: _Watched) -> None:
        """Start the part again where it died, hangs or is asked to be started again; raises where that is not allowed."""
        if watched.part.resting():
            return
        reason = self._trouble(watched)
        if reason is None:
            return
        outcome = self._outcome_of(watched.part)
        if outcome is not None and not outcome.error:
            self._await_main(watched)
        elif self._is_spare(watched) and not self._may_restart(watched):
            self._give_up(watched, reason)
        elif outcome is not None or not self._may_restart(watched):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watched[-1].child.process.wait(timeout=AT_ITS_END_S)
                return
            self._raise_end(watched, reason)
        else:
            self._restart(watched, reason)

    def _trouble(self, watched: _Watched) -> str | None:
        """What is wrong with a part, as a clause about it."""
        code = watched.child.exit_code
        if code is not None:
            return f"it ended with exit code {code}{_memory_hint(code)}"
        reason = take_restart_request(self.session.folder, watched.part.key) if watched.part.key else None
        if reason is not None:
            return reason
        return next((self._silence(beat) for beat in watched.beats.values() if beat.look()), None)

    def _silence(self, beat: BeatWatch) -> str:
        limit_s = self.config.hang_timeout_s
        return f"it has shown no sign of life for {beat.silent_s:.0f} s (run.hang_timeout_s={limit_s:g})"

    def _may_restart(self, watched: _Watched) -> bool:
        """Within the limit, and not before the run has begun: a start that fails would fail again."""
        if watched.restarted_in_step < self._step:
            watched.num_restarts = 0
        begun = self.session.ready_file.exists()
        return begun and watched.part.key is not None and watched.num_restarts < self.config.max_restarts

    def _is_spare(self, watched: _Watched) -> bool:
        """Whether the run has begun and another part of its kind is left."""
        others = (other for other in self._watched if other is not watched and not other.given_up)
        kind = watched.part.kind
        return kind is not None and self.session.ready_file.exists() and any(o.part.kind == kind for o in others)

    def _give_up(self, watched: _Watched, reason: str) -> None:
        part, limit = watched.part, self.config.max_restarts
        print(
            f"the {part.name} is given up ({watched.num_restarts} of run.max_restarts={limit} without a trained step), and the "
            f"run goes on without it: {reason}",
            file=sys.stderr,
        )
        watched.given_up = True
        watched.child.stop(grace_s=0.0)
        if part.key is not None:
            self.session.given_up_file(part.key).touch()  # from now on it has no memory

    def _restart(self, watched: _Watched, reason: str) -> None:
        part = watched.part
        part.num_restarts += 1
        watched.num_restarts += 1
        watched.restarted_in_step = self._step
        print(
            f"starting the {part.name} again ({watched.num_restarts} of run.max_restarts={self.config.max_restarts}): {reason}",
            file=sys.stderr,
        )
        watched.child.stop(grace_s=0.0)
        if part.key is not None:
            take_restart_request(self.session.folder, part.key)  # it was about the process that is gone
        for name in part.members:
            forget_beat(self.session.folder, name)
        watched.child, watched.beats = part.start(), self._watch_beats(part)

    def _await_main(self, watched: _Watched) -> None:
        """A part that has done all its work: the main one is about to end too, or has hung up on it and must say why."""
        watched.ended = watched.ended or Patience(self.config.timeout_s)
        watched.ended.look()
        if watched.ended.exhausted:
            raise StuckError(
                f"the {watched.part.name} has ended, and the {self._watched[-1].part.name} did not within run.timeout_s="
                f"{self.config.timeout_s:g} s after it; it was ended."
            )

    def _main_has_ended(self, main: _Watched) -> bool:
        """Whether each of its members has left an outcome and only their starter hangs; raises where a member hangs."""
        silent = []
        for name, beat in main.beats.items():
            if beat.look():
                silent.append(name)
                if read_outcome(self.session.folder, name) is None:
                    raise StuckError(
                        f"{_in_words(name)} hangs: {self._silence(beat)}; the run was ended. The end of its log:\n"
                        f"{tail(main.child.log_path)}\nfull log: {main.child.log_path}"
                    )
        return len(silent) == len(main.beats) > 0

    def _explain_main(self, main: _Watched, asked: bool) -> Outcome:
        """The outcome of the main part; raises what went wrong in it, or in another where that was the cause."""
        outcomes = [read_outcome(self.session.folder, name) for name in main.part.members]
        if asked and outcomes[0] is not None and not outcomes[0].error:
            return outcomes[0]  # ranks that lost their peer at its end are no failure then
        self._raise_killed(main, outcomes)
        errors = [outcome for outcome in outcomes if outcome is not None and outcome.error]
        if errors:
            self._raise_lost(" ".join(str(outcome.error) for outcome in errors))
            first = next((error for error in errors if not error.expected), errors[0])
            _raise_outcome(first, main)
        missing = [
            _in_words(name) for name, outcome in zip(main.part.members, outcomes, strict=True) if outcome is None
        ]
        if missing or outcomes[0] is None:
            code = main.child.exit_code
            raise FastreasonError(
                f"{' and '.join(missing)} ended without a word, with exit code {code}{_memory_hint(code)}; the end of the "
                f"log:\n{tail(main.child.log_path)}\nfull log: {main.child.log_path}"
            )
        return outcomes[0]

    def _raise_killed(self, main: _Watched, outcomes: list[Outcome | None]) -> None:
        """Name the rank that a signal ended first; the errors of the others are only that they lost it."""
        killed = killed_rank(main.child.log_path, main.child.log_start)
        if killed is None or killed[0] >= len(outcomes) or outcomes[killed[0]] is not None:
            return
        rank, number = _in_words(main.part.members[killed[0]]), killed[1]
        raise FastreasonError(
            f"{rank} was ended by signal {number} ({signal.Signals(number).name}){_memory_hint(-number)}; the "
            f"end of the log:\n{tail(main.child.log_path)}\nfull log: {main.child.log_path}"
        )

    def _raise_lost(self, said: str) -> None:
        """Raise the end of the part that the main one lost, where that is all that it had to say."""
        for watched in self._watched[:-1]:
            if any(sign in said for sign in watched.part.lost_signs):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = watched.child.process.wait(timeout=5.0)
                    if code:
                        self._raise_end(watched, f"it ended with exit code {code}{_memory_hint(code)}")

    def _raise_end(self, watched: _Watched, reason: str) -> NoReturn:
        """Raise for a part that cannot go on: its own last words, or the end of its log."""
        part, child = watched.part, watched.child
        outcome = self._outcome_of(part)
        if outcome is not None and outcome.error:
            _raise_outcome(outcome, watched)
        again = f", after {watched.num_restarts} restart(s) without a trained step" if watched.num_restarts else ""
        head = f"the {part.name} failed{again}: {reason}; "
        if part.explain_end is not None:
            raise EngineError(head + part.explain_end())
        raise FastreasonError(f"{head}the end of its log:\n{tail(child.log_path)}\nfull log: {child.log_path}")

    def _outcome_of(self, part: Part) -> Outcome | None:
        found = (read_outcome(self.session.folder, name) for name in part.members)
        return next((outcome for outcome in found if outcome is not None), None)


def killed_rank(log_path: Path, start: int = 0) -> tuple[int, int] | None:
    """The local rank that a signal ended first, and that signal, as torch's elastic launcher saw it; None where none was.

    Where it saw another rank fail before, one that had lost the killed rank, both are in its table. There SIGTERM is its own.
    """
    try:
        text = log_path.read_bytes()[start:].decode(errors="replace")
    except FileNotFoundError:
        return None
    found = re.search(r"failed \(exitcode: -(\d+)\) local_rank: (\d+) ", text)
    if found:
        return int(found[2]), int(found[1])
    listed = re.findall(r"\(local_rank: (\d+)\)\n\s*exitcode\s*: -(\d+) ", text)
    return next(((int(rank), int(number)) for rank, number in listed if int(number) != signal.SIGTERM), None)


def _in_words(member: str) -> str:
    """ "trainer-1" as messages have it: trainer rank 1."""
    name, dash, rank = member.partition("-")
    return f"{name} rank {rank}" if dash else f"the {name}"


def _raise_outcome(outcome: Outcome, watched: _Watched) -> NoReturn:
    if outcome.expected:
        raise FastreasonError(str(outcome.error))
    log_path = watched.child.log_path
    raise FastreasonError(
        f"the {watched.part.name} failed: {outcome.error}; the end of its log:\n{tail(log_path)}\nfull log: {log_path}"
    )


def _memory_hint(code: int | None) -> str:
    return " (killed: most likely the machine ran out of memory)" if code in (-9, 137) else ""
