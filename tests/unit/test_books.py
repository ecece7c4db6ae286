"""The producer's books under every kind of death: no prompt lost, none trained twice, the bound held on every batch."""

import random

import pytest

from fastreason.config import parse_config
from fastreason.data import PromptCursor
from fastreason.errors import CheckpointError
from fastreason.ledger import audit_ledger, read_ledger
from fastreason.rollout.books import Books
from fastreason.rollout.spool import Spool, decode_state
from fastreason.types import Grade, Group, Prompt, Sample

PROMPTS = [Prompt(id=f"p{i}", text=f"{i}") for i in range(7)]
B = 3


def config(staleness=1, steps=8, batch_size=B, **rollout):
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"task": "chain_sum", "max_prompt_tokens": 5},
            "rollout": {"max_staleness": staleness, **rollout},
            "train": {"steps": steps, "prompts_per_step": batch_size},
        }
    )


def new_books(folder, settings, spool="spool"):
    return Books(
        settings, PromptCursor(PROMPTS, 3), lambda p: [1], len(PROMPTS), folder, folder / spool if spool else None
    )


def group(ticket, prompt, version):
    sample = Sample(
        token_ids=[1],
        sampler_logp=[-1.0],
        token_versions=[version],
        text="",
        finish_reason="stop",
        grade=Grade(reward=0.0, correct=False),
    )
    return Group(ticket=ticket, prompt=prompt, prompt_token_ids=[1], samples=[sample], version_issued=version)


class DiedError(Exception):
    pass


class World:
    """A trainer, its checkpoints and an engine around the books; `may_die` is asked between any two writes."""

    def __init__(self, folder, settings, seed):
        self.folder, self.settings = folder, settings
        self.rng = random.Random(f"books/{seed}")
        self.deaths, self.max_deaths = 0, 6
        self.version = self.trained = 0
        self.holding, self.running = None, {}
        self.checkpoint = None  # (version, trained, state)
        self.books = new_books(folder, settings)
        self.books.start(0, 0, None)

    def make(self):
        books = new_books(self.folder, self.settings)
        for owner, name in ((books._spool, "_write"), (books._spool, "remove"), (books, "_write")):
            setattr(owner, name, self.mortal(getattr(owner, name)))
        return books

    def mortal(self, call):
        """Before or after a write to disk is where a process can die and it matters."""

        def called(*arguments):
            self.may_die()
            call(*arguments)
            self.may_die()

        return called

    def may_die(self):
        if self.deaths < self.max_deaths and self.rng.random() < 0.03:
            self.deaths += 1
            raise DiedError

    def run(self):
        while self.version < self.settings.train.steps:
            try:
                self.act()
            except DiedError:
                self.recover()

    def act(self):
        for ticket, prompt, _ in self.books.issue():
            self.running[ticket] = (prompt, self.books.admission.issued_at(ticket))
        choice = self.rng.random()
        if self.running and choice < 0.6:
            ticket = self.rng.choice(sorted(self.running))
            prompt, version = self.running.pop(ticket)
            if self.rng.random() < 0.1:
                self.books.drop(ticket, "no signal")
            else:
                self.books.finish(group(ticket, prompt, version))
        elif self.holding is None:
            groups = self.books.take_batch()
            self.may_die()  # the answer does not arrive
            if groups is not None:
                assert len(groups) == B
                assert all(self.version - g.oldest_version <= self.settings.rollout.max_staleness for g in groups)
                self.holding = [g.ticket for g in groups]
        else:
            self.trained += B
            self.holding = None
            self.publish()

    def publish(self):
        self.publishing = True
        self.books.publish(self.version + 1)
        self.may_die()  # done, and the answer does not arrive
        self.version += 1
        self.publishing = False
        if self.rng.random() < 0.5:
            self.checkpoint = (self.version, self.trained, self.books.checkpoint(self.trained))

    publishing = False

    def recover(self):
        """The producer alone is started again, or the whole run goes on from its checkpoint."""
        self.running = {}
        begun = self.rng.random() < 0.6
        if not begun:
            self.version, self.trained, self.state = self.checkpoint or (0, 0, None)
            self.holding, self.publishing = None, False
            for path in (self.folder / "spool").iterdir():  # the session has a new folder
                path.unlink()
        while True:
            self.books = self.make()
            try:
                if begun:
                    assert self.books.restart(self.version, self.trained, self.holding or [])
                    if self.publishing:
                        self.publish()
                else:
                    self.books.start(self.version, self.trained, self.state)
                return
            except DiedError:
                continue


@pytest.mark.parametrize("order", ["finished", "issued"])
@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_whatever_dies_whenever_every_prompt_is_trained_once(tmp_path, staleness, order):
    deaths = 0
    for seed in range(25):
        folder = tmp_path / str(seed)
        folder.mkdir()
        world = World(folder, config(staleness, order=order), seed)
        world.run()
        deaths += world.deaths
        rows = read_ledger(folder)
        audit = audit_ledger(rows)
        assert (audit.lost, audit.twice) == ([], []), seed
        assert audit.num_trained == 8 * B == world.trained
        steps = [row["step"] for row in rows if row["event"] == "trained"]
        assert sorted(steps) == [step for step in range(1, 9) for _ in range(B)], seed
    assert deaths > 50, "the example shows little"


def go_on(former, settings, rng):
    """Train to the end from the checkpoint of a run that had other sizes; returns how many groups are trained then."""
    (version, trained, state), running = former.checkpoint, {}
    books = new_books(former.folder, settings, spool=None)
    books.start(version, trained, state)
    for _ in range(5000):
        if version == settings.train.steps:
            return trained
        for ticket, prompt, _ in books.issue():
            running[ticket] = (prompt, books.admission.issued_at(ticket))
        if running and rng.random() < 0.6:
            ticket = rng.choice(sorted(running))
            books.finish(group(ticket, *running.pop(ticket)))
        elif (groups := books.take_batch()) is not None:
            version, trained = version + 1, trained + len(groups)
            books.publish(version)
    raise AssertionError("the run came to a standstill")


@pytest.mark.parametrize("order", ["finished", "issued"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_a_resumed_run_may_have_other_sizes_and_comes_to_its_end(tmp_path, batch_size, order):
    """Whatever had been finished by then, and whichever bound was and is."""
    for seed in range(40):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        former = World(folder, config(rng.choice([0, 1, 2]), order=order), seed)
        former.max_deaths = 0
        while former.version < 3 or former.holding is not None or former.checkpoint is None:
            former.act()
        # Stopped amid generation, so that some of what is old is finished and some is not.
        for _ in range(rng.randrange(8)):
            if former.running:
                ticket = rng.choice(sorted(former.running))
                former.books.finish(group(ticket, *former.running.pop(ticket)))
        former.checkpoint = (former.version, former.trained, former.books.checkpoint(former.trained))
        settings = config(rng.choice([0, 1, 2]), former.version + 6, batch_size, order=order)
        trained = go_on(former, settings, rng)
        audit = audit_ledger(read_ledger(folder), finished=False)
        assert (audit.lost, audit.twice) == ([], []), seed
        assert audit.num_trained == trained == former.trained + 6 * batch_size


def test_with_order_issued_batches_do_not_depend_on_who_is_first(tmp_path):
    books = new_books(tmp_path, config(staleness=1, order="issued"))
    books.start(0, 0, None)
    running = {ticket: prompt for ticket, prompt, _ in books.issue()}
    assert list(running) == [0, 1, 2, 3, 4, 5]
    for ticket in (5, 4, 3, 2, 1):
        books.finish(group(ticket, running[ticket], 0))
        assert books.take_batch() is None
    books.finish(group(0, running[0], 0))
    assert [g.ticket for g in books.take_batch()] == [0, 1, 2]


def test_finished_groups_come_back_from_a_checkpoint_and_unfinished_ones_keep_their_tickets(tmp_path):
    books = new_books(tmp_path, config())
    books.start(0, 0, None)
    prompts = {ticket: prompt for ticket, prompt, _ in books.issue()}
    for ticket in (0, 1, 2, 4):
        books.finish(group(ticket, prompts[ticket], 0))
    assert [g.ticket for g in books.take_batch()] == [0, 1, 2]
    books.publish(1)
    list(books.issue())
    state = books.checkpoint(3)
    again = new_books(tmp_path, config(), spool="another")
    again.start(1, 3, state)
    assert [g.ticket for g in again.admission.finished] == [4]
    issued = list(again.issue())
    assert [ticket for ticket, _, _ in issued] == [3, 5, 6, 7, 8]
    assert issued[0][1] == prompts[3]
    assert [row["ticket"] for row in read_ledger(tmp_path) if row["event"] == "reissued"] == [3, 5, 6, 7, 8]


def test_groups_too_old_for_a_tighter_bound_are_generated_again(tmp_path):
    books = new_books(tmp_path, config(staleness=1))
    books.start(0, 0, None)
    for ticket, prompt, _ in books.issue():
        books.finish(group(ticket, prompt, 0))
    books.take_batch()
    books.publish(1)
    state = books.checkpoint(3)
    tighter = new_books(tmp_path, config(staleness=0), spool="another")
    tighter.start(1, 3, state)
    assert tighter.admission.finished == []
    assert [ticket for ticket, _, _ in tighter.issue()] == [3, 4, 5]


def test_a_batch_that_is_not_trained_is_finished_work_in_a_checkpoint(tmp_path):
    books = new_books(tmp_path, config(staleness=0))
    books.start(0, 0, None)
    for ticket, prompt, _ in books.issue():
        books.finish(group(ticket, prompt, 0))
    handed_out = books.take_batch()
    state = decode_state(books.checkpoint(0))
    assert (state.finished, state.unfinished, state.handed_out) == (handed_out, [], [])


def test_a_spool_that_was_never_written_is_no_restart(tmp_path):
    assert new_books(tmp_path, config()).restart(0, 0, []) is False
    assert Spool(None).load() is None


def test_a_state_that_is_none_is_refused():
    with pytest.raises(CheckpointError, match="producer's state"):
        decode_state(b"\x93abc")
