"""The engine's client against servers that die, are replaced, hang, or only seem to: no request is lost, no token misstamped.

Most servers here are the fake engine's application on a port of this process, ended without warning; two tests use real
processes and real signals.
"""

import asyncio
import contextlib
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_site import EOS, KEY, PARAMS, PROMPT, TOKEN_S, TOKENS, Site, expected

from fastreason.config import Config, RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import EXCHANGE_VARIABLE, write_weights
from fastreason.rollout import fake_server
from fastreason.rollout.connection import Connection
from fastreason.rollout.lifeline import BEAT
from fastreason.rollout.transfer import call_workers
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_middleware import KEY_VARIABLE
from fastreason.types import SamplingParams, WeightUpdate

pytestmark = pytest.mark.timeout(400)


def with_engine(monkeypatch, body, token_s=TOKEN_S, **keys):
    """Run `body(site, engine, events)` with a site that is up and a started client."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    async def run():
        site, events = Site(monkeypatch, token_s), []
        await site.up()
        options = {"startup_timeout_s": keys.pop("startup_timeout_s", 10), **keys.pop("rollout", {})}
        engine = VllmEngine(
            site.url, KEY, RolloutConfig(**options), on_event=lambda *event: events.append(event), name="fake", **keys
        )
        try:
            await engine.start()
            return await body(site, engine, events)
        finally:
            await engine.close()
            await site.down()

    return asyncio.run(asyncio.wait_for(run(), 40))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(tmp_path))
    return tmp_path


def publish(folder, version):
    path = folder / f"w{version}.safetensors"
    digest = write_weights(path, {"a": torch.full((3,), float(version))})
    return WeightUpdate(path=str(path), version=version, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)


# A server that dies


def test_requests_in_flight_finish_on_the_next_server_and_finished_samples_are_kept(monkeypatch):
    lengths = [len(tokens) for tokens in expected()]
    assert min(lengths) <= 2 and max(lengths) >= 10, "the test needs samples that end before and after the loss"

    async def body(site, engine, events):
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(6 * TOKEN_S)
        await site.down()
        await asyncio.sleep(0.3)
        assert not task.done()
        await site.up()
        completions = await task
        again = site.asked("/inference/v1/generate", instance=2)
        return completions, len(again), events, instance_of(engine)

    completions, num_again, events, instance = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert 0 < num_again < PARAMS.n
    assert instance == "2"
    assert [name for name, _ in events] == ["engine_lost", "engine_back"]
    assert "fake engine at http://127.0.0.1" in events[0][1] and events[1][1].endswith(" s")


def test_the_next_server_gets_the_wanted_weights_before_any_request(monkeypatch, folder):
    update = publish(folder, 1)

    async def body(site, engine, events):
        await engine.load_weights(update)
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(4 * TOKEN_S)
        await site.down()
        await site.up()
        completions = await task
        paths = [path.split("?")[0] for number, path, _ in site.requests if number == 2]
        return completions, paths, await held(engine), engine.version

    completions, paths, state, version = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert {v for completion in completions for v in completion.token_versions} == {1}
    assert (state, version) == ([{"checksum": update.checksum}], 1)
    first = paths.index("/inference/v1/generate")
    assert [path for path in paths[:first] if path != "/health"][-3:] == ["/pause", "/collective_rpc", "/resume"]


def instance_of(engine):
    """Which start of the server it talks to."""
    return engine._lifeline._connection.instance


async def held(engine):
    """What the engine says it holds."""
    connection = engine._lifeline._connection
    return (await connection.ask("/collective_rpc", {"method": "fastreason_beat"})).body["results"]


def test_a_death_is_noticed_without_any_request(monkeypatch):
    async def body(site, engine, events):
        await site.down()
        await asyncio.sleep(0.5)
        noticed = list(events)
        await site.up()
        while len(events) < 2:
            await asyncio.sleep(0.02)
        return noticed, events

    noticed, events = with_engine(monkeypatch, body, hang_timeout_s=0.3)
    assert [name for name, _ in noticed] == ["engine_lost"] and events[1][0] == "engine_back"


@pytest.mark.parametrize("moment", ["/pause?mode=keep&clear_cache=false", "/collective_rpc", "/resume"])
def test_an_update_during_which_the_server_dies_is_loaded_by_the_next(monkeypatch, folder, moment):
    update = publish(folder, 1)

    async def body(site, engine, events):
        while not site.asked("/collective_rpc"):  # its first heartbeat
            await asyncio.sleep(0.01)
        site.requests.clear()
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(4 * TOKEN_S)
        site.deaf.clear()
        loading = asyncio.create_task(engine.load_weights(update))
        stage = ["/pause?mode=keep&clear_cache=false", "/collective_rpc", "/resume"].index(moment)
        for path in ["/pause?mode=keep&clear_cache=false", "/collective_rpc", "/resume"][: stage + 1]:
            while not site.asked(path):
                await asyncio.sleep(0.01)
            if path != moment:
                site.deaf.set()
                await asyncio.sleep(0)
                site.deaf.clear()
        site.deaf.set()
        await site.down()
        await asyncio.sleep(0.3)
        await site.up()
        return await loading, await task, await held(engine), engine.version

    report, completions, state, version = with_engine(monkeypatch, body)
    assert (report.version, report.checksum, version) == (1, update.checksum, 1)
    assert state == [{"checksum": update.checksum}]
    # Generation stood still for as long as there was no server.
    assert 0.3 < report.pause_s == report.total_s < 20
    assert [completion.token_ids for completion in completions] == expected()
    longest = max(completions, key=lambda completion: len(completion.token_ids))
    assert set(longest.token_versions) == {1}


def test_a_server_that_answers_with_errors_while_it_dies_is_a_lost_one(monkeypatch):
    async def body(site, engine, events):
        # As vLLM does once its engine core is gone: errors for the requests, and an unhealthy server.
        site.broken = {"/inference/v1/generate": 99, "/health": 99}
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(0.3)
        await site.down()
        site.broken = {}
        await site.up()
        return await task, events

    completions, events = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert "answered 500 to /inference/v1/generate and ended: EngineDeadError" in events[0][1]


def test_an_error_of_a_living_server_is_an_error(monkeypatch):
    async def body(site, engine, events):
        site.broken = {"/inference/v1/generate": 1}
        with pytest.raises(
            EngineError, match=r"the fake engine at .* answered 500 to /inference/v1/generate: EngineDead"
        ):
            await engine.generate("t1", PROMPT, SamplingParams(max_new_tokens=2, seed=1))
        # The connection on which it did so is not used again, and the engine goes on.
        await engine.generate("t2", PROMPT, PARAMS)
        return events, instance_of(engine)

    assert with_engine(monkeypatch, body) == ([], "1")


def test_a_broken_connection_to_a_living_server_costs_only_a_repetition(monkeypatch, folder):
    update = publish(folder, 1)

    async def body(site, engine, events):
        await engine.load_weights(update)
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(4 * TOKEN_S)
        for connection in list(site._runner.server.connections):
            connection.transport.abort()
        completions = await task
        loads = [body for body in site.asked("/collective_rpc") if body["method"] == "fastreason_load"]
        return completions, loads, instance_of(engine), [name for name, _ in events]

    completions, loads, instance, events = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert len(loads) == 1, "it holds the weights still"
    assert (instance, events) == ("1", ["engine_lost", "engine_back"])


def test_a_replaced_server_is_found_by_its_answer(monkeypatch, folder):
    """The connections did not break: another process answers at the address, with the weights of the start."""
    update = publish(folder, 1)

    async def body(site, engine, events):
        await engine.load_weights(update)
        site._monkeypatch.setattr(site.engines[0], "_held", None)
        door = next(cell for cell in closure(site) if hasattr(cell, "_instance"))
        door._instance = "2"
        completions = await engine.generate("t1", PROMPT, PARAMS)
        return completions, await held(engine), instance_of(engine)

    def closure(site):
        guard = site._runner.app.middlewares[0]
        return [cell.cell_contents for cell in guard.__closure__]

    completions, state, instance = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert (state, instance) == ([{"checksum": update.checksum}], "2")


def test_a_server_that_does_not_come_back_is_named_with_the_wait(monkeypatch):
    async def body(site, engine, events):
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(0.05)
        await site.down()
        text = r"the fake engine at http.* did not answer within rollout.startup_timeout_s=0.5 s.*logs/engine.log"
        with pytest.raises(EngineError, match=text):
            await task
        with pytest.raises(EngineError, match=text):
            await engine.load_weights(WeightUpdate(path="/w", version=1, checksum="0", num_bytes=1))

    with_engine(monkeypatch, body, startup_timeout_s=0.5)


def test_a_request_is_not_repeated_for_ever(monkeypatch):
    monkeypatch.setattr("fastreason.rollout.lifeline.MOST_TRIES", 3)

    async def body(site, engine, events):
        async def break_all():
            while True:
                await asyncio.sleep(0.02)
                for connection in list(site._runner.server.connections):
                    connection.transport.abort()

        breaking = asyncio.create_task(break_all())
        with pytest.raises(
            EngineError, match=r"request t1.\d was tried 3 times, and each time the server was lost; .*broke"
        ):
            await engine.generate("t1", PROMPT, PARAMS)
        breaking.cancel()

    with_engine(monkeypatch, body, token_s=0.05)


def test_a_request_that_takes_too_long_on_a_living_server_is_an_error(monkeypatch):
    async def body(site, engine, events):
        text = r"did not answer /inference/v1/generate within rollout.request_timeout_s=0.2 s: it hangs, or the limit"
        with pytest.raises(EngineError, match=text):
            await engine.generate("t1", PROMPT, PARAMS)

    with_engine(monkeypatch, body, token_s=0.2, rollout={"request_timeout_s": 0.2})


# What nobody has thought of


def test_one_of_several_is_looked_for_until_it_is_back_whatever_goes_wrong_meanwhile(monkeypatch):
    failures = []

    async def verify(connection):
        if failures:
            raise failures.pop()

    async def body(site, engine, events):
        failures.append(KeyError("dtype"))
        await site.down()
        await site.up()
        async with asyncio.timeout(8):
            while not (engine.trouble or "").startswith("KeyError: 'dtype'"):
                await asyncio.sleep(0.01)
            while not engine.is_alive:
                await asyncio.sleep(0.01)

    with_engine(monkeypatch, body, spare=True, hang_timeout_s=0.3, verify=verify)


def test_a_heart_goes_on_beating_after_an_answer_that_makes_no_sense(monkeypatch):
    ask, failures = Connection.ask, [ValueError("no JSON")]

    async def odd(self, path, body=None, limit_s=None):
        if failures and body == BEAT[1]:
            raise failures.pop()
        return await ask(self, path, body, limit_s)

    monkeypatch.setattr(Connection, "ask", odd)

    async def body(site, engine, events):
        while failures:
            await asyncio.sleep(0.01)
        await site.down()
        async with asyncio.timeout(5):
            while not events:
                await asyncio.sleep(0.01)
        await site.up()

    with_engine(monkeypatch, body, hang_timeout_s=0.3)


def test_a_server_that_cannot_be_reported_is_given_up_all_the_same(monkeypatch):
    def fail(reason):
        raise OSError("no space left")

    async def body(site, engine, events):
        site.deaf.clear()
        async with asyncio.timeout(5):
            while not events:
                await asyncio.sleep(0.01)
        await site.down()
        site.deaf.set()

    with_engine(monkeypatch, body, hang_timeout_s=0.3, on_hung=fail, spare=True)


def test_an_answer_that_is_no_json_is_an_error_of_the_server(monkeypatch):
    async def body(site, engine, events):
        with monkeypatch.context() as patch:
            patch.setattr("fastreason.rollout.connection.json", SimpleNamespace(loads=lambda content: int("<html>")))
            with pytest.raises(EngineError, match=r"at .* answered /inference/v1/generate with what is no answer of"):
                await engine.generate("t1", PROMPT, SamplingParams(max_new_tokens=2, seed=1))

    with_engine(monkeypatch, body)


# A server that hangs


def test_a_hung_server_is_reported_once_given_up_and_replaced(monkeypatch, folder):
    update, reports = publish(folder, 1), []

    async def body(site, engine, events):
        await engine.load_weights(update)
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(4 * TOKEN_S)
        site.deaf.clear()
        started = time.monotonic()
        while not reports:
            await asyncio.sleep(0.02)
        found_s = time.monotonic() - started
        # Its /health answers again, but it is to be killed: it must not be taken back.
        site.deaf.set()
        await asyncio.sleep(0.4)
        assert not task.done() and [name for name, _ in events] == ["engine_lost"]
        await site.down()
        await site.up()
        return await task, found_s, instance_of(engine), await held(engine)

    completions, found_s, instance, state = with_engine(
        monkeypatch, body, token_s=0.1, hang_timeout_s=0.6, on_hung=reports.append
    )
    assert [completion.token_ids for completion in completions] == expected()
    assert len(reports) == 1 and 0.5 < found_s < 5
    assert "fake engine at" in reports[0] and "run.hang_timeout_s=0.6 s" in reports[0]
    assert (instance, state) == ("2", [{"checksum": update.checksum}])


def test_a_server_whose_engine_died_and_that_does_not_end_is_reported_too(monkeypatch):
    reports = []

    async def body(site, engine, events):
        site.broken = {"/inference/v1/generate": 999, "/health": 999, "/collective_rpc": 999}
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        while not reports:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        await site.down()
        site.broken = {}
        await site.up()
        return await task

    completions = with_engine(monkeypatch, body, hang_timeout_s=0.5, on_hung=reports.append)
    assert [completion.token_ids for completion in completions] == expected()
    assert len(reports) == 1 and "answers /health with 500, and does not end" in reports[0]


def test_a_hung_server_that_nobody_restarts_is_an_error(monkeypatch):
    async def body(site, engine, events):
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(0.05)
        site.deaf.clear()
        with pytest.raises(EngineError, match=r"the fake engine at .* no sign of life since run.hang_timeout_s=0.5 s"):
            await task
        site.deaf.set()

    with_engine(monkeypatch, body, hang_timeout_s=0.5, token_s=0.2)


def test_a_server_that_loads_may_be_silent_for_longer(monkeypatch, folder):
    reports, update = [], publish(folder, 1)
    large = WeightUpdate(path=update.path, version=1, checksum=update.checksum, num_bytes=int(1.5 * 100e6))

    async def body(site, engine, events):
        async def mute():
            await asyncio.sleep(0.05)
            site.deaf.clear()
            await asyncio.sleep(1.0)
            site.deaf.set()

        loading = asyncio.create_task(engine.load_weights(large))
        await mute()
        await loading
        # And not for longer than that.
        site.deaf.clear()
        while not reports:
            await asyncio.sleep(0.02)
        site.deaf.set()

    with_engine(monkeypatch, body, hang_timeout_s=0.4, on_hung=reports.append)
    assert len(reports) == 1


# A transport that keeps one copy of the weights, on the trainer's GPU


class OneCopy:
    """Gives an engine whatever the trainer has written last, by way of a file, and says what that was."""

    def __init__(self, update):
        self.written = update

    async def prepare(self, connection, update):
        pass

    async def load(self, connection, update):
        content = {"path": self.written.path, "checksum": self.written.checksum}
        return await call_workers(connection, "fastreason_load", **content)


def test_a_server_that_comes_back_while_the_next_weights_are_written_waits_for_them(monkeypatch, folder):
    first, second = publish(folder, 1), publish(folder, 2)

    async def body(site, engine, events):
        engine._transfer = OneCopy(first)
        await engine.load_weights(first)
        task = asyncio.create_task(engine.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(2 * TOKEN_S)
        engine._transfer.written = second
        await site.down()
        await site.up()
        while not [body for body in site.asked("/collective_rpc", 2) if body["method"] == "fastreason_load"]:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        assert not task.done() and not site.asked("/inference/v1/generate", 2), "it went on with weights of no version"
        report = await engine.load_weights(second)
        return await task, report, await held(engine)

    completions, report, state = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    longest = max(completions, key=lambda completion: len(completion.token_ids))
    assert set(longest.token_versions) == {2}
    assert report.version == 2 and state == [{"checksum": second.checksum}]


def test_other_weights_than_were_sent_are_an_error_where_no_next_ones_come(monkeypatch, folder):
    first, second = publish(folder, 1), publish(folder, 2)

    async def body(site, engine, events):
        engine._transfer = OneCopy(first)
        await engine.load_weights(first)
        engine._transfer.written = second
        await site.down()
        await site.up()
        with pytest.raises(EngineError, match="version 1: the engine holds other weights than were sent"):
            await engine.generate("t1", PROMPT, PARAMS)

    with_engine(monkeypatch, body, startup_timeout_s=1.0)


# A client that takes over


def test_a_server_that_is_found_hanging_by_a_new_client_is_reported_and_replaced(monkeypatch):
    """It was stopped, and the client that would have noticed died first."""
    reports = []

    async def body(site, engine, events):
        site.deaf.clear()
        heir = VllmEngine(
            site.url, KEY, RolloutConfig(), name="fake", hang_timeout_s=0.5, on_hung=reports.append, takes_over=True
        )
        starting = asyncio.create_task(heir.start())
        while not reports:
            await asyncio.sleep(0.02)
        assert not starting.done()
        await site.down()
        site.deaf.set()
        await site.up()
        await starting
        completions = await heir.generate("t1", PROMPT, PARAMS)
        await heir.close()
        return completions

    monkeypatch.setattr("fastreason.rollout.connection.HEALTH_TIMEOUT_S", 0.3)
    completions = with_engine(monkeypatch, body)
    assert [completion.token_ids for completion in completions] == expected()
    assert len(reports) == 1 and "has not answered for run.hang_timeout_s=0.5 s" in reports[0]


@pytest.mark.parametrize("takes_over", [False, True])
def test_a_server_that_is_not_there_yet_or_was_never_there_does_not_hang(monkeypatch, takes_over):
    """A start takes longer than an answer may: of a model, or of a server that the launcher has just started again."""
    reports = []

    async def body(site, engine, events):
        if takes_over:
            await site.down()
        else:
            site.deaf.clear()
        options = {"hang_timeout_s": 0.3, "on_hung": reports.append, "takes_over": takes_over}
        heir = VllmEngine(site.url, KEY, RolloutConfig(), name="fake", **options)
        starting = asyncio.create_task(heir.start())
        await asyncio.sleep(1.0)
        site.deaf.set()
        if takes_over:
            await site.up()
        await starting
        await heir.close()

    monkeypatch.setattr("fastreason.rollout.connection.HEALTH_TIMEOUT_S", 0.2)
    with_engine(monkeypatch, body)
    assert reports == []


@pytest.mark.parametrize("former", [None, 1, 2])
@pytest.mark.parametrize("wanted", [None, 2])
def test_a_new_client_takes_over_whatever_the_last_one_left(monkeypatch, folder, former, wanted):
    updates = {version: publish(folder, version) for version in (1, 2)}

    async def body(site, engine, events):
        # The last client died in the middle of an update.
        if former:
            await engine.load_weights(updates[former])
        await engine._lifeline._connection.ask("/pause?mode=keep")
        heir = VllmEngine(site.url, KEY, RolloutConfig(), name="fake")
        await heir.start()
        with contextlib.suppress(KeyError):
            site.requests.clear()
        await heir.adopt(updates[wanted] if wanted else None)
        loads = [body["method"] for body in site.asked("/collective_rpc") if body["method"] != "fastreason_beat"]
        completions = await heir.generate("t", PROMPT, SamplingParams(max_new_tokens=3, seed=1))
        state = await held(heir)
        await heir.close()
        return completions, state, loads, heir.version

    completions, state, loads, version = with_engine(monkeypatch, body)
    assert version == (wanted or 0) and set(completions[0].token_versions) == {version}
    assert state == [{"checksum": updates[wanted].checksum if wanted else None}]
    needed = ["fastreason_load"] if wanted else ["fastreason_restore"]
    assert loads == ([] if former == wanted else needed)


def test_a_large_update_is_read_ahead_of_the_pause(monkeypatch, folder):
    monkeypatch.setattr("fastreason.rollout.transfer.READ_AHEAD_BYTES", 1)

    async def body(site, engine, events):
        await engine.load_weights(publish(folder, 1))
        return [path if path != "/collective_rpc" else body["method"] for _, path, body in site.requests]

    order = [step for step in with_engine(monkeypatch, body) if step != "fastreason_beat"]
    pause = order.index("/pause?mode=keep&clear_cache=false")
    assert order[pause - 1 :] == [
        "fastreason_prepare",
        "/pause?mode=keep&clear_cache=false",
        "fastreason_load",
        "/resume",
    ]


# Real processes, real signals


@pytest.fixture
def process(folder, monkeypatch):
    monkeypatch.setattr(fake_server, "read_tokens", lambda model_dir: (TOKENS, EOS))
    config = Config.model_validate(
        {
            "model": {"path": "/m"},
            "data": {},
            "train": {"steps": 1, "prompts_per_step": 1},
            "rollout": {"engine": "fake", "fake_token_s": 0.05, "startup_timeout_s": 20},
        }
    )
    made = fake_server.make_server(
        config, "/m", Path(folder) / "log", max_model_len=64, device="cpu", exchange_dir=str(folder), key=KEY
    )
    yield made
    made.child.stop(grace_s=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_process_is_replaced_and_every_request_finishes(process, folder, number):
    process.start()
    update, hung = publish(folder, 1), []

    async def run():
        engine = VllmEngine(
            process.url, KEY, RolloutConfig(startup_timeout_s=20), name="fake", hang_timeout_s=0.8, on_hung=hung.append
        )
        await engine.start()
        await engine.load_weights(update)
        tasks = [asyncio.create_task(engine.generate(f"t{i}", PROMPT, PARAMS)) for i in range(3)]
        await asyncio.sleep(0.2)
        process.child.process.send_signal(number)
        while not (hung or process.child.exit_code is not None):
            await asyncio.sleep(0.02)
        # What the launcher does.
        await asyncio.to_thread(process.child.stop, 0.0)
        process.start()
        answers = [await task for task in tasks]
        state, instance = await held(engine), instance_of(engine)
        await engine.close()
        return answers, state, instance

    answers, state, instance = asyncio.run(asyncio.wait_for(run(), 40))
    for completions in answers:
        assert [completion.token_ids for completion in completions] == expected()
        assert {v for completion in completions for v in completion.token_versions} == {1}
    assert (state, instance) == ([{"checksum": update.checksum}], "2")
    assert bool(hung) == (number == signal.SIGSTOP)


def test_the_port_stays_ours_between_two_starts(process):
    process.start()
    process.child.stop(grace_s=0.0)
    with socket.socket() as stranger, pytest.raises(OSError):
        stranger.bind(("127.0.0.1", process.port))
