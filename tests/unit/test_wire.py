"""Messages come back as they were sent, and a wait ends with the name of who was waited for."""

import asyncio
import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

from fastreason.errors import InterruptedWaitError, PeerLostError, StuckError
from fastreason.rollout import wire
from fastreason.types import EvalResult, Grade, Group, LoadReport, Prompt, Sample, WeightUpdate

pytestmark = pytest.mark.timeout(90)

UPDATE = WeightUpdate(path="/dev/shm/x", version=3, checksum="ab", num_bytes=12)
GROUP = Group(
    ticket=7,
    prompt=Prompt(id="p", text="1 + 1", answer="2", metadata={"entry": {"a": [1, 2.5, None]}}),
    prompt_token_ids=[1, 2, 3],
    samples=[
        Sample(
            token_ids=[5, 6],
            sampler_logp=[-0.1, -1e-7],
            token_versions=[2, 3],
            text="zwei é",
            finish_reason="length",
            grade=Grade(reward=-1.0, correct=False, parts={"math": 0.0}, timed_out=True),
            teacher_logp=[-0.5, -2.25],
        )
    ],
    version_issued=2,
    generate_s=0.5,
    greedy_reward=0.5,
    greedy_num_tokens=7,
    greedy_truncated=True,
)
RESULT = EvalResult(
    accuracy=0.5,
    standard_error=0.1,
    reward_mean=0.25,
    num_samples=4,
    num_prompts=2,
    num_tokens=9,
    truncated_share=0.5,
    temperature=1.0,
    wall_s=2.0,
    version=1,
)
REQUESTS = [
    wire.Start(version=2, trained=24, state=b"books"),
    wire.Rejoin(version=2, trained=24, holding=[7, 9], started=True, update=UPDATE),
    wire.Start(version=0, trained=0),
    wire.NextBatch(),
    wire.Publish(UPDATE),
    wire.Evaluate("before"),
    wire.SaveState(trained=12, settle=True),
    wire.Stop(),
]
ANSWERS = [
    wire.Ready(engine="vllm", num_train_prompts=5, num_eval_prompts=2),
    wire.Batch(groups=[GROUP], generate_s=1.0, grade_s=0.5, figures={"reward/timeouts": 1.0}),
    wire.Published(LoadReport(version=3, checksum="ab", num_tensors=2, held_bytes=8, pause_s=0.1)),
    wire.Evaluated(RESULT),
    wire.State(b"books"),
    wire.Done(),
    wire.Failure("the engine broke"),
]
WAITING = wire.Waiting("the graders with the responses to 3 prompt(s)")


@pytest.fixture
def ends():
    """(the trainer's socket, the producer's socket)."""
    pair = socket.socketpair(socket.AF_UNIX)
    yield pair
    for sock in pair:
        sock.close()


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_requests_come_back_as_they_were(request_):
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(wire.encode(request_))
        reader.feed_eof()
        return await wire.read_request(reader), await wire.read_request(reader)

    assert asyncio.run(read()) == (request_, None)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: type(a).__name__)
def test_answers_come_back_as_they_were(ends, answer):
    ends[1].sendall(wire.encode(answer))
    assert wire.Connection(ends[0]).receive(5.0, "a test") == answer


def test_messages_of_many_pieces_come_whole_and_in_order(ends):
    large = wire.State(b"x" * 5_000_000)
    answers = [large, wire.Done(), large]

    def write():
        for byte in (body := wire.encode(answers[0]))[:7]:
            ends[1].sendall(bytes([byte]))
        ends[1].sendall(body[7:])
        for answer in answers[1:]:
            ends[1].sendall(wire.encode(answer))

    threading.Thread(target=write, daemon=True).start()
    connection = wire.Connection(ends[0])
    assert [connection.receive(10.0, "a test") for _ in answers] == answers


def test_a_request_cut_off_is_the_end():
    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(wire.encode(wire.Evaluate("before"))[:-2])
        reader.feed_eof()
        return await wire.read_request(reader)

    assert asyncio.run(read()) is None


def test_a_wait_that_is_too_long_says_for_what(ends):
    with pytest.raises(
        StuckError, match=r"waited 0\.2 s \(run\.timeout_s\) for the producer: loading version 3"
    ) as caught:
        wire.Connection(ends[0]).receive(0.2, "loading version 3")
    assert isinstance(caught.value, TimeoutError)
    assert "logs/producer.log" in str(caught.value)


def test_a_wait_that_is_too_long_names_what_the_producer_waits_for_itself(ends):
    """Its words are no answer, and renew no limit."""

    def talk():
        with suppress(OSError):
            while True:
                ends[1].sendall(wire.encode(WAITING))
                time.sleep(0.2)

    threading.Thread(target=talk, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(StuckError, match=r"It last said that it waits for the graders with the responses to 3 prompt"):
        wire.Connection(ends[0]).receive(1.0, "generating")
    assert time.monotonic() - started < 10


def test_what_the_producer_said_before_its_answer_is_passed_over_and_forgotten(ends):
    connection = wire.Connection(ends[0])
    for message in (WAITING, WAITING, wire.Done()):
        ends[1].sendall(wire.encode(message))
    assert connection.receive(5.0, "a test") == wire.Done()
    with pytest.raises(StuckError) as caught:
        connection.receive(0.2, "loading version 3")
    assert "last said" not in str(caught.value)


def test_half_an_answer_is_waited_for_no_longer_than_a_whole_one(ends):
    ends[1].sendall(struct.pack(">I", 100) + b"x" * 10)
    with pytest.raises(StuckError):
        wire.Connection(ends[0]).receive(0.2, "a test")


def test_a_producer_that_ends_is_a_lost_peer(ends):
    ends[1].sendall(wire.encode(wire.Done())[:3])
    ends[1].close()
    with pytest.raises(PeerLostError, match=r"the producer ended while evaluating; see logs/producer\.log"):
        wire.Connection(ends[0]).receive(5.0, "evaluating")


def test_sending_to_a_producer_that_ended_is_a_lost_peer(ends):
    ends[1].close()
    with pytest.raises(PeerLostError, match="closed its connection"):
        wire.Connection(ends[0]).send(wire.NextBatch())


def test_a_producer_that_reads_late_is_not_lost(ends):
    """A request larger than the socket's buffers waits until the producer's loop is free."""
    request = wire.Start(version=0, trained=0, state=b"x" * 5_000_000)
    connection = wire.Connection(ends[0])
    ends[1].sendall(wire.encode(wire.Done()))
    connection.receive(5.0, "a test")
    size = len(wire.encode(request))
    received = []

    def read_late():
        time.sleep(0.8)
        while sum(map(len, received)) < size:
            received.append(ends[1].recv(1 << 20))

    reader = threading.Thread(target=read_late, daemon=True)
    reader.start()
    connection.send(request)
    reader.join(timeout=10)
    assert b"".join(received) == wire.encode(request)


def test_an_interrupted_wait_leaves_the_connection_usable(ends):
    stop = True
    connection = wire.Connection(ends[0], lambda: stop)
    with pytest.raises(InterruptedWaitError, match="told to stop while generating"):
        connection.receive(30.0, "generating")
    ends[1].sendall(wire.encode(wire.Done()))
    assert connection.receive(5.0, "a test") == wire.Done()


def test_an_answer_that_is_there_is_taken_even_when_told_to_stop(ends):
    ends[1].sendall(wire.encode(wire.Done()))
    assert wire.Connection(ends[0], lambda: True).receive(5.0, "a test") == wire.Done()


def test_a_wait_that_may_not_be_interrupted_goes_on(ends):
    threading.Timer(0.7, lambda: ends[1].sendall(wire.encode(wire.Done()))).start()
    answer = wire.Connection(ends[0], lambda: True).receive(5.0, "saving", interruptible=False)
    assert answer == wire.Done()
