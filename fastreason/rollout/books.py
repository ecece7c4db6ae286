"""The producer's books: which prompts are issued, finished, handed out, trained or dropped, and what is on disk of it.

Owns admission, the prompt cursor, the ledger and the spool, and keeps them in step: whatever moment a process dies at, another
one goes on with `restart` (the producer alone had died) or `start` (from a checkpoint) and no prompt is lost or trained
twice. Knows no engine and no clock.

Order of writing: a prompt is in the ledger, then in the spool, then generated; a finished group is in the spool before it
counts; the files of trained groups go before the books say so.
"""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from fastreason.config import Config
from fastreason.errors import DataError
from fastreason.ledger import LEDGER_FILE, Ledger, read_ledger
from fastreason.rollout.admission import Admission
from fastreason.rollout.spool import Issued, ProducerState, Spool, decode_state
from fastreason.types import Group, Prompt


class Cursor(Protocol):
    """An endless, seeded, resumable order of the training prompts."""

    @property
    def epoch(self) -> int: ...

    def next(self) -> Prompt: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Books:
    """One run's books in one process; `admission` is None until `start` or `restart`."""

    def __init__(
        self,
        config: Config,
        cursor: Cursor,
        render: Callable[[Prompt], list[int]],
        num_prompts: int,
        run_dir: Path,
        spool_dir: Path | None,
    ) -> None:
        self._config, self._cursor, self._render, self._num_prompts = config, cursor, render, num_prompts
        self._ledger_path, self._spool = run_dir / LEDGER_FILE, Spool(spool_dir)
        self._ledger: Ledger | None = None
        self._unfinished: dict[int, Prompt] = {}
        self._handed_out: list[Group] = []  # the batch that the trainer works on
        self._again: deque[Issued] = deque()  # issued by an earlier process and unfinished: they go first
        self._dropped_since_batch = 0
        self.counters: dict[str, float] = {}
        self.admission: Admission | None = None

    def start(self, version: int, trained: int, state: bytes | None) -> None:
        """Begin a run, or go on from a checkpoint whose weights are `version` and contain `trained` groups."""
        if state is None:
            self._ledger = Ledger(self._ledger_path, 0)
            self._admit(version, trained, next_ticket=trained)
            self.save()
            return
        former = decode_state(state)
        self._ledger = Ledger(self._ledger_path, former.ledger_bytes)
        self._ledger.write("resumed", step=version, trained=trained)
        self._cursor.load_state(former.cursor)
        self.counters = former.counters
        self._admit(version, trained, former.next_ticket)
        self._take_back(former.finished, former.unfinished, "resumed")

    def restart(self, version: int, trained: int, holding: list[int]) -> bool:
        """Go on where a producer that died left off; False where it had not begun.

        The trainer says how many groups it has trained and which it holds; a batch that never reached it is handed out
        again.
        """
        former = self._spool.load()
        if former is None:
            return False
        self._ledger = Ledger(self._ledger_path)
        self._ledger.write("producer_restarted")
        self._cursor.load_state(former.cursor)
        self.counters = former.counters
        self.count("rollout/producer_restarts")
        out = [group for group in former.finished if group.ticket in set(former.handed_out)]
        is_trained = trained > former.trained
        self._admit(version, former.trained, former.next_ticket, former.offset)
        assert self.admission is not None
        if is_trained or holding == former.handed_out:
            self._handed_out, former.finished = out, [group for group in former.finished if group not in out]
            self.admission.num_taken += len(former.handed_out)
        if is_trained:
            # The producer may have died between writing these lines and saying so.
            known = {row["ticket"] for row in read_ledger(self._ledger_path) if row["event"] == "trained"}
            self._note_trained([ticket for ticket in former.handed_out if ticket not in known], version + 1)
            self._trained = trained
        self._take_back(former.finished, former.unfinished, "the producer was restarted")
        return True

    def _admit(self, version: int, trained: int, next_ticket: int, offset: int | None = None) -> None:
        train, rollout = self._config.train, self._config.rollout
        self._trained = trained
        # Not 0 only where a resumed run has another batch size than before.
        offset = trained - version * train.prompts_per_step if offset is None else offset
        self.admission = Admission(
            batch_size=train.prompts_per_step,
            max_staleness=rollout.max_staleness,
            total_groups=offset + train.steps * train.prompts_per_step,
            version=version,
            trained=trained,
            offset=offset,
            next_ticket=next_ticket,
            in_order=rollout.order == "issued",
        )

    def _take_back(self, finished: list[Group], unfinished: list[Issued], reason: str) -> None:
        assert self.admission is not None and self._ledger is not None
        again = list(unfinished)
        tickets = sorted([*(issued.ticket for issued in unfinished), *(group.ticket for group in finished)])
        for group in finished:
            if not self.admission.restore(group, tickets.index(group.ticket)):
                again.append(Issued(group.ticket, group.prompt))
        self._again = deque(sorted(again, key=lambda issued: issued.ticket))
        self._ledger.write_all(
            ("reissued", {"ticket": issued.ticket, "prompt_id": issued.prompt.id, "reason": reason})
            for issued in self._again
        )
        # A restart of this process must find the groups of the checkpoint too.
        for group in [*self.admission.finished, *self._handed_out]:
            self._spool.add(group)
        self.save()

    def issue(self) -> Iterator[tuple[int, Prompt, list[int]]]:
        """Ticket, prompt and token ids of every group that may be generated from now on; all are written down first."""
        admission = self.admission
        limit = self._config.rollout.max_running_groups
        issued: list[tuple[int, Prompt, list[int]]] = []
        lines: list[tuple[str, dict[str, Any]]] = []
        while admission is not None and admission.may_issue() and not (limit and admission.num_running >= limit):
            known = self._again.popleft() if self._again else None
            if known is not None:
                prompt, token_ids, epoch = known.prompt, self._render(known.prompt), -1
            else:
                prompt, token_ids, epoch = self._next_prompt(lines)
            ticket = admission.issue(None if known is None else known.ticket)
            self._unfinished[ticket] = prompt
            if known is None:
                line = {"ticket": ticket, "prompt_id": prompt.id, "epoch": epoch, "version": admission.version}
                lines.append(("issued", line))
            issued.append((ticket, prompt, token_ids))
        if issued:
            self._write(lines)
            self.save()
        return iter(issued)

    def _next_prompt(self, lines: list[tuple[str, dict[str, Any]]]) -> tuple[Prompt, list[int], int]:
        """The next prompt that is short enough; longer ones are passed over, written down and counted."""
        limit = self._config.data.max_prompt_tokens
        for _ in range(self._num_prompts):
            epoch = self._cursor.epoch
            prompt = self._cursor.next()
            token_ids = self._render(prompt)
            if len(token_ids) <= limit:
                return prompt, token_ids, epoch
            self.count("rollout/long_prompts")
            reason = f"{len(token_ids)} tokens, data.max_prompt_tokens={limit}"
            lines.append(("skipped", {"prompt_id": prompt.id, "epoch": epoch, "reason": reason}))
        raise DataError(
            f"data.max_prompt_tokens={limit}: every one of the {self._num_prompts} training prompts is longer. "
            "Raise it, or shorten data.system_prompt and data.user_template."
        )

    def finish(self, group: Group) -> None:
        """A group is generated and graded."""
        assert self.admission is not None
        self._spool.add(group)
        self.admission.finish(group)
        del self._unfinished[group.ticket]
        versions = [version for sample in group.samples for version in sample.token_versions]
        self.note(
            "finished",
            ticket=group.ticket,
            oldest=group.oldest_version,
            newest=max(versions, default=group.version_issued),
            tokens=len(versions),
        )

    def drop(self, ticket: int, reason: str) -> int:
        """A group will not be trained on; its place may be issued again. Returns how many were dropped since the last batch."""
        assert self.admission is not None
        self.note("dropped", ticket=ticket, prompt_id=self._unfinished.pop(ticket).id, reason=reason)
        self.admission.drop(ticket)
        self.count("rollout/dropped")
        self._dropped_since_batch += 1
        self.save()
        return self._dropped_since_batch

    def take_batch(self) -> list[Group] | None:
        """The next batch, or None while it is not ready; from now on the trainer has it."""
        assert self.admission is not None, "a batch was asked for before the start"
        assert not self._handed_out, "a batch was asked for before the last one was trained"
        groups = self.admission.take_batch()
        if groups is not None:
            self._handed_out = groups
            self._dropped_since_batch = 0
            self.save()
        return groups

    def publish(self, version: int) -> None:
        """The batch handed out is trained, and the engines hold the weights that it made."""
        if self.admission is None:
            return  # a trainer that resumes publishes once before the start, which brings the version
        tickets = [group.ticket for group in self._handed_out]
        self.admission.publish(version)
        if tickets:
            self._note_trained(tickets, version)
            self.save()

    def collected(self) -> None:
        """The batch handed out is written down in place of being trained on; no version follows."""
        tickets = [group.ticket for group in self._handed_out]
        self._note_trained(tickets, self._trained // self._config.train.prompts_per_step + 1, event="collected")
        self.save()

    def _note_trained(self, tickets: list[int], step: int, event: str = "trained") -> None:
        self._write([(event, {"ticket": ticket, "step": step}) for ticket in tickets])
        self._spool.remove([group.ticket for group in self._handed_out])
        self._trained += len(tickets)
        self._handed_out = []

    def checkpoint(self, trained: int) -> bytes:
        """The state for a checkpoint of weights with `trained` groups; the ledger is on disk up to the length it names."""
        state = self._state()
        assert trained == self._trained, f"the trainer has trained {trained} groups, the books say {self._trained}"
        # A batch handed out and not trained (the run was told to stop meanwhile) is finished work like any other.
        state.finished = sorted([*state.finished, *self._handed_out], key=lambda group: group.ticket)
        state.handed_out = []
        state.ledger_bytes = self._ledger.sync() if self._ledger is not None else 0
        return state.encode()

    def save(self) -> None:
        """Bring the spool up to date."""
        self._spool.save(self._state())

    def _state(self) -> ProducerState:
        assert self.admission is not None, "the state was asked for before the start"
        running = [Issued(ticket, prompt) for ticket, prompt in self._unfinished.items()]
        return ProducerState(
            cursor=self._cursor.state(),
            next_ticket=self.admission.next_ticket,
            trained=self._trained,
            offset=self.admission.offset,
            unfinished=[*running, *self._again],
            finished=self.admission.finished,
            handed_out=[group.ticket for group in self._handed_out],
            counters=dict(self.counters),
        )

    def count(self, name: str, by: float = 1.0) -> None:
        self.counters[name] = self.counters.get(name, 0.0) + by

    def note(self, event: str, **fields: Any) -> None:
        """Write an event of the run into the ledger."""
        self._write([(event, fields)])

    def _write(self, events: list[tuple[str, dict[str, Any]]]) -> None:
        if self._ledger is not None and events:
            self._ledger.write_all(events)
