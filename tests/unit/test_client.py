"""The trainer's client against a producer whose every answer the test writes."""

import asyncio
import socket
import tempfile
import threading
import time
from contextlib import contextmanager

import pytest

from fastreason.errors import EngineError, InterruptedWaitError, PeerLostError, StuckError
from fastreason.rollout import wire
from fastreason.rollout.client import ProducerClient
from fastreason.types import LoadReport, WeightUpdate

pytestmark = pytest.mark.timeout(90)

READY = wire.Ready(engine="fake", num_train_prompts=1, num_eval_prompts=0)
BATCH = wire.Batch(groups=[], generate_s=1.0, grade_s=0.0, figures={})
UPDATE = WeightUpdate(path="x", version=4, checksum="ab", num_bytes=1)


class Script:
    """A socket that says Ready and then, for every request, the next of `answers` (a list: all of them; a number: a pause)."""

    def __init__(self, folder, answers, ready=READY):
        self.path = f"{folder}/s"
        self.requests = []
        self._answers, self._ready = answers, ready
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        sock, _ = self._server.accept()
        if self._ready is not None:
            sock.sendall(wire.encode(self._ready))
        stream = sock.makefile("rb")
        for answers in self._answers:
            size = stream.read(4)
            if len(size) < 4:
                break
            self.requests.append(asyncio.run(decode(size + stream.read(int.from_bytes(size, "big")))))
            for answer in answers if isinstance(answers, list) else [answers]:
                if isinstance(answer, float):
                    time.sleep(answer)
                else:
                    sock.sendall(wire.encode(answer))
        stream.read(4)
        sock.close()
        self._server.close()


async def decode(message):
    reader = asyncio.StreamReader()
    reader.feed_data(message)
    return await wire.read_request(reader)


@contextmanager
def producer(*answers, ready=READY):
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        yield Script(folder, answers, ready)


def test_requests_carry_their_arguments_and_answers_come_out_of_their_envelopes():
    report = LoadReport(version=4, checksum="ab", num_tensors=1, held_bytes=0)
    with producer(wire.Done(), BATCH, wire.Published(report), wire.State(b"one")) as script:
        client = ProducerClient(script.path, 5.0, 5.0)
        assert client.ready == READY
        client.start(3, 36, b"start")
        assert client.next_batch() == BATCH
        assert client.publish(UPDATE, 12) == report
        assert client.save_state(48, settle=True) == b"one"
        client.stop()
    assert script.requests == [
        wire.Start(version=3, trained=36, state=b"start"),
        wire.NextBatch(),
        wire.Publish(UPDATE),
        wire.SaveState(trained=48, settle=True),
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.start(0, 0, None),
        lambda client: client.next_batch(),
        lambda client: client.publish(UPDATE, 12),
        lambda client: client.evaluate("before"),
        lambda client: client.save_state(0, settle=False),
    ],
)
def test_a_failure_is_an_engine_error_with_its_message(call):
    with producer(wire.Failure("no room")) as script:
        client = ProducerClient(script.path, 5.0, 5.0)
        with pytest.raises(EngineError, match=r"^no room$"):
            call(client)
        client.stop()


def test_a_failure_at_the_start_is_one_too():
    with producer(ready=wire.Failure("no GPU")) as script, pytest.raises(EngineError, match="no GPU"):
        ProducerClient(script.path, 5.0, 5.0)


def test_answers_that_were_given_up_are_passed_over():
    """Told to stop while waiting for a batch; it comes with the state, before it."""
    stop = False
    with producer([], [BATCH, wire.Done(), wire.State(b"nine")]) as script:
        client = ProducerClient(script.path, 20.0, 5.0, lambda: stop)
        stop = True
        with pytest.raises(InterruptedWaitError, match="generating and grading the next batch"):
            client.next_batch()
        assert client.save_state(0, settle=False) == b"nine"
        client.stop()


def test_saving_is_not_given_up():
    """It is what a run does when it is told to stop."""
    with producer([0.8, wire.State(b"nine")]) as script:
        client = ProducerClient(script.path, 20.0, 5.0, lambda: True)
        assert client.save_state(0, settle=False) == b"nine"
        client.stop()


def test_publishing_is_not_given_up():
    """Else the engine would hold weights that the trainer does not know of."""
    report = LoadReport(version=4, checksum="ab", num_tensors=1, held_bytes=0)
    with producer([]) as script:
        client = ProducerClient(script.path, 0.8, 5.0, lambda: True)
        with pytest.raises(StuckError, match="loading version 4 into the engine"):
            client.publish(UPDATE, 12)
        client.stop()
    with producer(wire.Published(report)) as script:
        client = ProducerClient(script.path, 5.0, 5.0, lambda: True)
        assert client.publish(UPDATE, 12) == report
        client.stop()


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda client: client.next_batch(), "generating and grading the next batch"),
        (lambda client: client.evaluate("after"), r"evaluating \(after\)"),
        (lambda client: client.save_state(0, settle=False), "saving its state"),
    ],
)
def test_a_producer_that_does_not_answer_is_named_with_what_it_was_doing(call, what):
    with producer([]) as script:
        client = ProducerClient(script.path, 0.1, 5.0)
        with pytest.raises(StuckError, match=rf"waited 0\.1 s .* for the producer: {what}"):
            call(client)
        client.stop()


def test_a_producer_that_never_opens_its_socket(tmp_path):
    with pytest.raises(StuckError, match=r"waited 0\.2 s for the producer to open its socket"):
        ProducerClient(str(tmp_path / "s"), 5.0, 0.2)


def test_told_to_stop_before_the_socket_is_there(tmp_path):
    with pytest.raises(InterruptedWaitError, match="while starting"):
        ProducerClient(str(tmp_path / "s"), 5.0, 60.0, lambda: True)


def test_a_socket_that_cannot_be_opened_is_a_lost_peer(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PeerLostError, match="cannot connect to the producer"):
        ProducerClient(str(tmp_path / "file" / "s"), 5.0, 60.0)
