"""Which group may be issued, and which groups make the next batch: the rule that bounds staleness before generating.

With staleness bound S, batch size B (groups) and v versions published so far:

    issue while      accepted + running < (S + v + 1) * B
    a batch takes    the B oldest finished groups, once all that it leaves behind can still be trained in time

In time: a group issued at version u has to be in the batch of version u + S at the latest. So of the groups issued at u
or before at most (u + S - v) * B may be left behind: none at u = v - S, for which a batch waits. Without the other u,
for S > 1, young groups that finish first could take so many places that the old ones no longer fit.

`in_order` takes strictly the B groups with the lowest tickets, so that batches do not depend on who finished first.

`accepted` counts the finished groups of the whole run, trained or not; a dropped group leaves it, so that its place can
be filled again. A resumed run counts from the `trained` groups and the version that it starts with. Pure state: no
clock, no I/O.
"""

from fastreason.types import Group


class Admission:
    """Counts groups by ticket; asserts the staleness bound on every batch that it gives out."""

    def __init__(
        self,
        batch_size: int,
        max_staleness: int,
        total_groups: int,
        version: int = 0,
        trained: int = 0,
        next_ticket: int | None = None,
        offset: int | None = None,
        in_order: bool = False,
    ) -> None:
        self._batch_size, self._max_staleness, self._total = batch_size, max_staleness, total_groups
        # 0 unless a resumed run has another batch size than before.
        self.offset = trained - version * batch_size if offset is None else offset
        self._in_order = in_order
        self.version = version
        self.num_taken = trained
        self.num_dropped = 0
        self.next_ticket = trained if next_ticket is None else next_ticket
        self._running: dict[int, int] = {}  # ticket -> version at which it was issued
        self._finished: dict[int, Group] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_finished(self) -> int:
        return len(self._finished)

    @property
    def finished(self) -> list[Group]:
        """The finished groups that no batch has taken, in the order of their tickets."""
        return [self._finished[ticket] for ticket in sorted(self._finished)]

    def may_issue(self) -> bool:
        accepted = self.num_taken + self.num_finished
        if accepted + self.num_running >= self._total:
            return False
        return accepted + self.num_running < (self.offset + (self._max_staleness + self.version + 1) * self._batch_size)

    def issue(self, ticket: int | None = None) -> int:
        """The next ticket, or one given out by an earlier process; the group it names is running from now on."""
        assert self.may_issue(), "issued a group that the staleness bound does not admit"
        if ticket is None:
            ticket = self.next_ticket
            self.next_ticket += 1
        assert ticket < self.next_ticket and ticket not in self._running and ticket not in self._finished
        self._running[ticket] = self.version
        return ticket

    def issued_at(self, ticket: int) -> int:
        return self._running[ticket]

    def restore(self, group: Group, num_before: int) -> bool:
        """Take back a group that an earlier process finished, with `num_before` others of lower tickets still to be trained.

        False where it does not fit, or will be too old by its turn, which comes later where the bound is tighter or batches
        are smaller than before. Groups are trained in the order of their tickets once all are finished; were one kept that
        is too old by then, no batch could leave it behind and none could hold it.
        """
        turn = (self.num_taken - self.offset + num_before) // self._batch_size  # the version of its batch
        if turn - group.version_issued > self._max_staleness or not self.may_issue():
            return False
        self._finished[group.ticket] = group
        return True

    def is_settled(self) -> bool:
        """Whether every running group was issued at the current version: nothing in flight is older."""
        return all(issued >= self.version for issued in self._running.values())

    def finish(self, group: Group) -> None:
        del self._running[group.ticket]
        self._finished[group.ticket] = group

    def drop(self, ticket: int) -> None:
        """Forget a running or finished group; its place may be issued again."""
        if self._running.pop(ticket, None) is None:
            del self._finished[ticket]
        self.num_dropped += 1

    def publish(self, version: int) -> None:
        """The engines hold `version` now."""
        assert version > self.version, f"version {version} published after {self.version}"
        self.version = version

    def take_batch(self) -> list[Group] | None:
        """The next batch, or None while it is not ready."""
        candidates = sorted({*self._finished, *self._running} if self._in_order else self._finished)
        tickets = candidates[: self._batch_size]
        if len(tickets) < self._batch_size or not all(ticket in self._finished for ticket in tickets):
            return None
        taken = set(tickets)
        left = [group.version_issued for ticket, group in self._finished.items() if ticket not in taken]
        for number, issued in enumerate(sorted([*self._running.values(), *left]), start=1):
            if number > (issued + self._max_staleness - self.version) * self._batch_size:
                return None
        batch = [self._finished.pop(ticket) for ticket in tickets]
        for group in batch:
            staleness = self.version - group.oldest_version
            assert staleness <= self._max_staleness, f"ticket {group.ticket} is {staleness} versions old"
        self.num_taken += len(batch)
        return batch
