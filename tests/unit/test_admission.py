"""The staleness bound at every moment of random runs, and the order in which batches are made."""

import random

import pytest

from fastreason.rollout.admission import Admission
from fastreason.types import Group, Prompt, Sample


def finished(admission, ticket, versions=None):
    """The group of a running ticket, with tokens sampled by `versions` (default: the one that it was issued at)."""
    issued = admission.issued_at(ticket)
    sample = Sample(
        token_ids=[1], sampler_logp=[-1.0], token_versions=versions or [issued], text="", finish_reason="stop"
    )
    return Group(
        ticket=ticket,
        prompt=Prompt(id=str(ticket), text=""),
        prompt_token_ids=[0],
        samples=[sample],
        version_issued=issued,
    )


def issue_all(admission):
    tickets = []
    while admission.may_issue():
        tickets.append(admission.issue())
    return tickets


def finish(admission, *tickets):
    for ticket in tickets:
        admission.finish(finished(admission, ticket))


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
@pytest.mark.parametrize("drop_share", [0.0, 0.3])
def test_random_runs_keep_every_promise(staleness, batch_size, drop_share):
    for seed in range(25):
        simulate(random.Random(f"{staleness}/{batch_size}/{drop_share}/{seed}"), staleness, batch_size, drop_share)


def simulate(rng, staleness, batch_size, drop_share, num_batches=6):
    """Issue, finish, drop and train in a random order until all is trained; checks the bound after every move."""
    total = num_batches * batch_size
    admission = Admission(batch_size, staleness, total)
    running, complete, trained, oldest_token, issued_at = [], set(), [], {}, {}
    in_training = False
    for _ in range(10_000):
        accepted = len(trained) + len(complete)
        moves = []
        if admission.may_issue():
            moves.append("issue")
        if running:
            moves.append("finish")
        if in_training:
            moves.append("publish")
        elif admission.num_taken < total:
            moves.append("take")
        if not moves:
            break
        move = rng.choice(moves)
        if move == "issue":
            running.append(admission.issue())
            issued_at[running[-1]] = admission.version
        elif move == "finish":
            # Not the oldest first: stragglers are what the rule is about.
            ticket = running.pop(rng.randrange(len(running)))
            if rng.random() < drop_share:
                admission.drop(ticket)
            else:
                versions = [rng.randint(admission.issued_at(ticket), admission.version) for _ in range(3)]
                oldest_token[ticket] = min(versions)
                admission.finish(finished(admission, ticket, versions))
                complete.add(ticket)
        elif move == "publish":
            admission.publish(admission.version + 1)
            in_training = False
        else:
            waited_for = [t for t in running if issued_at[t] <= admission.version - staleness]
            batch = admission.take_batch()
            if batch is None:
                assert running or admission.may_issue(), "nothing can come any more, and still no batch"
                if staleness < 2:
                    assert waited_for or len(complete) < batch_size, "a batch that was ready was not given out"
            else:
                tickets = [group.ticket for group in batch]
                assert not waited_for and len(tickets) == batch_size and tickets == sorted(tickets)
                assert set(tickets) <= complete and not set(tickets) & set(trained)
                assert all(admission.version - oldest_token[ticket] <= staleness for ticket in tickets)
                complete -= set(tickets)
                trained += tickets
                in_training = True
        accepted = len(trained) + len(complete)
        assert accepted + len(running) <= min((staleness + admission.version + 1) * batch_size, total)
        assert (admission.num_running, admission.num_finished) == (len(running), len(complete))
    assert len(trained) == len(set(trained)) == total, "the run came to a standstill"
    assert admission.next_ticket == total + admission.num_dropped
    assert not running and not complete


def test_strictly_on_policy_makes_one_batch_at_a_time():
    admission = Admission(batch_size=3, max_staleness=0, total_groups=9)
    for version in range(3):
        tickets = issue_all(admission)
        assert tickets == list(range(3 * version, 3 * version + 3))
        finish(admission, *tickets)
        assert [group.ticket for group in admission.take_batch()] == tickets
        assert not admission.may_issue(), "issued before the weights of this batch were there"
        admission.publish(version + 1)
    assert not admission.may_issue()


def test_the_double_buffer_is_one_batch_ahead():
    admission = Admission(batch_size=2, max_staleness=1, total_groups=100)
    assert issue_all(admission) == [0, 1, 2, 3]
    finish(admission, 0, 1)
    admission.take_batch()
    assert issue_all(admission) == []
    admission.publish(1)
    assert issue_all(admission) == [4, 5]


def test_a_batch_waits_for_stragglers_at_the_bound():
    admission = Admission(batch_size=2, max_staleness=1, total_groups=100)
    issue_all(admission)
    finish(admission, 1, 2)
    assert [group.ticket for group in admission.take_batch()] == [1, 2]
    admission.publish(1)
    assert issue_all(admission) == [4, 5]
    finish(admission, 4, 5)
    # 0 and 3 were issued at version 0 = v - S: however many younger groups are ready, they come first.
    assert admission.take_batch() is None
    finish(admission, 3)
    assert admission.take_batch() is None
    finish(admission, 0)
    assert [group.ticket for group in admission.take_batch()] == [0, 3]


def test_young_groups_do_not_take_the_places_that_older_ones_will_need():
    admission = Admission(batch_size=1, max_staleness=2, total_groups=100)
    assert issue_all(admission) == [0, 1, 2]
    finish(admission, 2)
    # 0 and 1 can still be trained at versions 1 and 2.
    assert [group.ticket for group in admission.take_batch()] == [2]
    admission.publish(1)
    assert issue_all(admission) == [3]
    finish(admission, 3)
    # Were 3 taken now, only version 2 would be left for both of them.
    assert admission.take_batch() is None
    finish(admission, 1)
    assert [group.ticket for group in admission.take_batch()] == [1]


def test_a_dropped_group_makes_room_whether_it_ran_or_was_finished():
    admission = Admission(batch_size=2, max_staleness=0, total_groups=4)
    assert issue_all(admission) == [0, 1]
    finish(admission, 0)
    admission.drop(0)
    admission.drop(1)
    assert admission.num_dropped == 2
    assert issue_all(admission) == [2, 3]
    finish(admission, 2, 3)
    assert [group.ticket for group in admission.take_batch()] == [2, 3]


def test_the_last_groups_of_a_run_are_no_more_than_it_trains_on():
    admission = Admission(batch_size=3, max_staleness=3, total_groups=5)
    assert issue_all(admission) == [0, 1, 2, 3, 4]


def test_a_resumed_run_goes_on_counting():
    admission = Admission(batch_size=2, max_staleness=1, total_groups=20, version=3, trained=6)
    # (1 + 3 + 1) * 2 = 10 admitted in all, 6 of them trained.
    assert issue_all(admission) == [6, 7, 8, 9]
    assert admission.issued_at(6) == 3
    finish(admission, 6, 7)
    assert len(admission.take_batch()) == 2
    assert admission.num_taken == 8


def restored(former, outstanding, batch_size, staleness, total):
    """The admission of a resumed run, with those of `outstanding` (finished groups, tickets of others) that come back."""
    next_ticket, trained, version = former.next_ticket, former.num_taken, former.version
    admission = Admission(batch_size, staleness, total, version, trained, next_ticket)
    tickets = sorted(getattr(one, "ticket", one) for one in outstanding)
    kept = [
        one.ticket
        for one in outstanding
        if isinstance(one, Group) and admission.restore(one, tickets.index(one.ticket))
    ]
    return admission, [ticket for ticket in tickets if ticket not in kept], kept


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
def test_a_resumed_run_may_have_another_batch_size(batch_size):
    former = Admission(4, max_staleness=1, total_groups=100)
    finish(former, *issue_all(former))
    former.take_batch()
    former.publish(1)
    # Four of version 0 are left, which version 1 is the last to train on.
    admission, again, kept = restored(former, former.finished, batch_size, 1, total=4 + 4 * batch_size)
    assert kept == [4, 5, 6, 7][:batch_size] and again == [4, 5, 6, 7][batch_size:]
    trained = []
    for version in range(1, 5):
        while admission.may_issue():
            ticket = admission.issue(again.pop(0) if again else None)
            admission.finish(finished(admission, ticket))
        trained += [group.ticket for group in admission.take_batch()]
        admission.publish(version + 1)
    assert trained == list(range(4, 4 + 4 * batch_size)) and not admission.may_issue()


def test_a_group_is_kept_only_if_it_is_young_enough_at_its_turn():
    """Lower tickets that are generated again go first, and are no reason to wait for."""
    former = Admission(4, max_staleness=1, total_groups=100)
    finish(former, *issue_all(former))
    former.take_batch()
    former.publish(1)
    outstanding = [4, 5, *former.finished[2:]]
    assert restored(former, outstanding, 4, 1, total=100)[2] == [6, 7]
    assert restored(former, outstanding, 2, 1, total=100)[2] == []
    assert restored(former, outstanding, 2, 2, total=100)[2] == [6, 7]


def test_a_version_is_published_once():
    admission = Admission(batch_size=1, max_staleness=0, total_groups=1, version=2)
    with pytest.raises(AssertionError, match="version 2 published after 2"):
        admission.publish(2)


def test_a_group_too_stale_is_never_handed_out():
    """The engine's stamps are checked against the bound, whatever the counting says."""
    admission = Admission(batch_size=1, max_staleness=1, total_groups=9, version=5, trained=5)
    (ticket, _) = issue_all(admission)
    admission.finish(finished(admission, ticket, versions=[5, 3]))
    with pytest.raises(AssertionError, match="2 versions old"):
        admission.take_batch()
