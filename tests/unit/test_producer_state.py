"""What a producer has in hand when it, or its trainer, is gone: no prompt is lost, and none trained twice."""

import asyncio
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from producer_stage import (
    Run,
    again,
    ids,
    make_config,
    running,
    tickets,
)

from fastreason.errors import EngineError, InterruptedWaitError, PeerLostError
from fastreason.ledger import audit_ledger, read_ledger
from fastreason.rollout import wire
from fastreason.rollout.client import ProducerClient
from fastreason.rollout.spool import decode_state

pytestmark = pytest.mark.timeout(400)


def test_state_before_the_first_batch_holds_all_that_was_issued():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        state = run.client.save_state(0, settle=False)
    assert again(state) == ["p0", "p1", "p2", "p3"]
    books = decode_state(state)
    assert books.cursor == {"position": 4} and books.trained == 0


def test_state_holds_a_batch_that_was_handed_out_and_not_trained():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        assert ids(run.client.next_batch()) == ["p0", "p1"]
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1", "p2", "p3"]


def test_state_after_a_step_holds_what_was_issued_since():
    with running(make_config(batch_size=2, staleness=1)) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        state = run.client.save_state(2, settle=False)
        assert again(state) == ["p2", "p3", "p4", "p5"]
        # And with the next batch handed out, but not trained.
        assert ids(run.client.next_batch()) == ["p2", "p3"]
        assert again(run.client.save_state(2, settle=False)) == ["p2", "p3", "p4", "p5"]
        run.publish(2)
        assert again(run.client.save_state(4, settle=False)) == ["p4", "p5", "p6", "p7"]


def test_a_batch_given_up_while_waiting_is_in_the_state():
    with running(make_config(batch_size=2, staleness=0), prepare=lambda run: run.engine.held.add("t1")) as run:
        run.client.start(0, 0, None)
        run.interrupted = True
        with pytest.raises(InterruptedWaitError, match="generating"):
            run.client.next_batch()
        run.engine.held.clear()
        run.wait_until(lambda: not run.producer._tasks)
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1"]


def test_a_batch_answered_after_the_trainer_gave_up_is_in_the_state():
    with running(make_config(batch_size=2, staleness=0)) as run:
        run.client.start(0, 0, None)
        run.client._connection.send(wire.NextBatch())
        run.wait_until(lambda: [g.ticket for g in run.books._handed_out] == [0, 1])
        # Its answer is passed over.
        assert again(run.client.save_state(0, settle=False)) == ["p0", "p1"]


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("stop_after", [0, 1, 3])
@pytest.mark.parametrize("handed_out", [False, True])
def test_a_resumed_run_trains_every_prompt_once(staleness, stop_after, handed_out, tmp_path):
    config = make_config(batch_size=2, steps=6, staleness=staleness)
    trained = []
    with running(config, run_dir=tmp_path) as run:
        run.client.start(0, 0, None)
        for version in range(stop_after):
            trained += ids(run.client.next_batch())
            run.publish(version + 1)
        if handed_out:
            run.client.next_batch()
        state = run.client.save_state(len(trained), settle=False)
    waiting = again(state)
    with running(config, run_dir=tmp_path) as run:
        run.publish(stop_after) if stop_after else None
        run.client.start(stop_after, len(trained), state)
        for version in range(stop_after, 6):
            batch = run.client.next_batch()
            assert all(version - group.oldest_version <= staleness for group in batch.groups)
            if version == stop_after:
                assert tickets(batch) == [2 * stop_after, 2 * stop_after + 1]
                assert ids(batch) == waiting[:2], "a prompt issued before goes first"
            trained += ids(batch)
            run.publish(version + 1)
    assert sorted(trained) == sorted(f"p{i}" for i in range(12))
    audit = audit_ledger(read_ledger(tmp_path))
    assert (audit.num_issued, audit.num_trained, audit.lost, audit.twice) == (12, 12, [], [])


def test_prompts_of_an_earlier_process_that_wait_still_are_in_the_next_state(tmp_path):
    with running(make_config(batch_size=2, staleness=2), run_dir=tmp_path) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        state = run.client.save_state(2, settle=False)
    assert again(state) == [f"p{i}" for i in range(2, 8)]
    with running(make_config(batch_size=2, staleness=0), run_dir=tmp_path) as run:
        run.client.start(1, 2, state)
        saved = run.client.save_state(2, settle=False)
        assert again(saved) == [f"p{i}" for i in range(2, 8)] and decode_state(saved).cursor == {"position": 8}


# A producer that dies and another that takes its place


class Succession:
    """Producers one after another on one socket, spool and run folder; `die` ends the one that serves, as SIGKILL would."""

    def __init__(self, folder, config):
        self.folder, self.config, self.runs, self.loops = Path(folder), config, [], []

    def begin(self, prepare=lambda run: None):
        run = Run(self.folder, self.config)
        run.engine.adopted = []

        async def adopt(update):
            run.engine.adopted.append(update)

        run.engine.adopt = adopt
        prepare(run)

        async def serve():
            self.loops.append(asyncio.get_running_loop())
            await run.producer.serve(run.socket_path)

        def body():
            with suppress(RuntimeError):  # the loop was stopped under it
                asyncio.run(serve())

        self.runs.append(run)
        threading.Thread(target=body, daemon=True).start()
        return run

    def die(self):
        self.loops[-1].call_soon_threadsafe(self.loops[-1].stop)


@pytest.mark.parametrize("moment", ["generating", "training", "publishing", "published"])
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_producer_that_dies_is_followed_by_one_that_goes_on(moment, staleness):
    config = make_config(batch_size=2, steps=4, staleness=staleness)
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        line = Succession(folder, config)
        first = line.begin(lambda run: run.engine.held.add("t3" if moment == "generating" else "t5"))
        client = ProducerClient(first.socket_path, 20.0, 20.0, may_rejoin=True)
        client.start(0, 0, None)
        trained = []

        def succeed():
            line.die()
            line.begin()

        for version in range(4):
            if version == 1 and moment == "generating":
                threading.Timer(0.2, succeed).start()
            batch = client.next_batch()
            assert all(version - g.oldest_version <= staleness for g in batch.groups)
            trained += ids(batch)
            if version == 1 and moment == "training":
                succeed()
            update = first.weights(version + 1)
            if version == 1 and moment in ("publishing", "published"):
                load = first.engine.load_weights

                async def load_and_die(update, load=load):
                    if moment == "published":
                        first.producer._books.publish(update.version)
                    succeed()
                    await asyncio.sleep(10)

                first.engine.load_weights = load_and_die
            report = client.publish(update, 2 * version + 2)
            assert report.version == version + 1
        client.stop()
        audit = audit_ledger(read_ledger(line.folder))
        assert len(line.runs) == 2
        # Where the next weights have been written, there may be no older ones any more: the heir takes those.
        held = 1 if moment == "generating" else 2
        heir = line.runs[1].engine
        assert heir.adopted[0] == first.weights(held) and min(heir.versions) == held
        assert sorted(trained) == [f"p{i}" for i in range(8)]
        assert (audit.num_trained, audit.lost, audit.twice) == (8, [], [])


def test_without_restarts_a_producer_that_dies_is_a_lost_peer():
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        line = Succession(folder, make_config())
        run = line.begin(lambda run: run.engine.held.update(["t0", "t1", "t2", "t3"]))
        client = run.connect()
        client.start(0, 0, None)
        threading.Timer(0.1, line.die).start()
        with pytest.raises(PeerLostError, match="generating"):
            client.next_batch()


def test_a_checkpoint_waits_for_what_older_weights_still_generate():
    with running(make_config(batch_size=2, staleness=1), prepare=lambda run: run.engine.held.add("t3")) as run:
        run.client.start(0, 0, None)
        run.client.next_batch()
        run.publish(1)
        threading.Timer(0.2, run.engine.held.clear).start()
        state = decode_state(run.client.save_state(2, settle=True))
        assert {group.ticket for group in state.finished} >= {2, 3}


def test_groups_without_signal_are_dropped_and_replaced():
    reject = {0: "all_right", 3: "all_wrong"}
    with running(make_config(batch_size=2, staleness=0), reject=lambda g: reject.get(g.ticket)) as run:
        run.client.start(0, 0, None)
        batch = run.client.next_batch()
        assert (tickets(batch), batch.figures["rollout/dropped"]) == ([1, 2], 1)
        run.publish(1)
        batch = run.client.next_batch()
        assert (tickets(batch), batch.figures["rollout/dropped"]) == ([4, 5], 2)
        assert {group.version_issued for group in batch.groups} == {1}
        dropped = [(r["ticket"], r["reason"]) for r in read_ledger(run.run_dir) if r["event"] == "dropped"]
    assert dropped == [(0, "all_right"), (3, "all_wrong")]


def test_dropping_without_end_is_an_error_that_names_the_key():
    config = make_config(batch_size=2, staleness=0)
    algorithm = config.algorithm.model_copy(update={"max_refills": 3})
    config = config.model_copy(update={"algorithm": algorithm})
    with (
        running(config, reject=lambda group: "all_wrong") as run,
        pytest.raises(EngineError, match=r"algorithm\.max_refills=3: more than 6 groups were dropped"),
    ):
        run.client.start(0, 0, None)
        run.client.next_batch()
