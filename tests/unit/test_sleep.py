"""An engine that sleeps: its client against servers that die or are replaced meanwhile, and the producer that has it sleep.

The servers are the fake engine's, which answers with an error what a GPU would not survive.
"""

import asyncio
from types import SimpleNamespace

import pytest
from engine_site import with_fleet
from producer_stage import make_config, running
from test_engine_recovery import KEY, PROMPT, folder, held, publish, with_engine  # noqa: F401 (folder: a fixture)
from test_loop import World, make_loop

from fastreason import compose
from fastreason.config import RolloutConfig
from fastreason.errors import EngineError, InterruptedWaitError, StuckError
from fastreason.rollout import fake_server
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_worker import WeightWorker
from fastreason.session import Session
from fastreason.tenancy import Tenancy
from fastreason.types import SamplingParams

pytestmark = pytest.mark.timeout(400)

SHORT = SamplingParams(max_new_tokens=3, seed=1)
STEPS = ("/sleep", "/wake_up", "/collective_rpc", "/inference/v1/generate", "/pause", "/resume")


def steps(site, instance=None):
    """What a server was asked for, in order, without heartbeats."""
    found = [
        body.get("method", path.split("/", 1)[1]) if path == "/collective_rpc" else path
        for number, path, body in site.requests
        if instance in (None, number) and path.startswith(STEPS)
    ]
    return [step for step in found if step != "fastreason_beat"]


def sleeping(monkeypatch, body, resting=lambda: False, **keys):
    return with_engine(monkeypatch, body, token_s=0.0, resting=resting, **keys)


SLEEP = ["fastreason_give_up", "/sleep?level=2&mode=wait"]
LOAD = ["/pause?mode=keep&clear_cache=false", "fastreason_load"]


@pytest.mark.parametrize("published", [False, True])
def test_the_weights_have_memory_before_they_come_and_the_cache_has_it_after(monkeypatch, folder, published):  # noqa: F811
    update = publish(folder, 1)

    async def body(site, engine, events):
        assert await engine.wake() == 0.0  # it is awake
        assert await engine.sleep() > 0
        site.requests.clear()
        if published:
            report = await engine.load_weights(update)
            assert 0 < report.wake_s < report.total_s
            assert await engine.wake() == 0.0
        else:
            assert await engine.wake() > 0
        (completion,) = await engine.generate("t", PROMPT, SHORT)
        return steps(site), set(completion.token_versions), await held(engine)

    asked, versions, state = sleeping(monkeypatch, body)
    change = LOAD if published else ["/pause?mode=keep&clear_cache=true", "fastreason_restore"]
    assert asked == ["/wake_up?tags=weights", *change, "/wake_up?tags=kv_cache", "/inference/v1/generate"]
    assert versions == {int(published)} and state == [{"checksum": update.checksum if published else None}]


def test_what_was_loaded_before_a_sleep_is_loaded_again_after_it(monkeypatch, folder):  # noqa: F811
    update = publish(folder, 1)

    async def body(site, engine, events):
        await engine.load_weights(update)
        await engine.sleep()
        lost = await held(engine)
        await engine.wake()
        await engine.generate("t", PROMPT, SHORT)
        await engine.sleep()
        await engine.load_weights(update)
        await engine.generate("t", PROMPT, SHORT)
        return lost, steps(site).count("fastreason_load"), await held(engine)

    lost, num_loads, state = sleeping(monkeypatch, body)
    assert (lost, num_loads, state) == ([{"checksum": "given up"}], 3, [{"checksum": update.checksum}])


def test_one_that_dies_asleep_falls_asleep_again_and_wakes_with_the_weights_that_are_wanted(monkeypatch, folder):  # noqa: F811
    first, second = publish(folder, 1), publish(folder, 2)

    async def body(site, engine, events):
        await engine.load_weights(first)
        await engine.sleep()
        await site.down()
        await asyncio.sleep(0.3)
        await site.up()
        while len(events) < 2:
            await asyncio.sleep(0.02)
        asleep = steps(site, instance=2)
        await engine.load_weights(second)
        (completion,) = await engine.generate("t", PROMPT, SHORT)
        return asleep, steps(site, instance=2), set(completion.token_versions)

    asleep, asked, versions = sleeping(monkeypatch, body, hang_timeout_s=0.3)
    assert asleep == SLEEP, "it was given weights that it loses at once"
    assert asked[2:] == ["/wake_up?tags=weights", *LOAD, "/wake_up?tags=kv_cache", "/inference/v1/generate"]
    assert versions == {2}


@pytest.mark.parametrize("moment", ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"])
def test_one_that_dies_in_its_waking_is_replaced_by_one_that_is_awake(monkeypatch, folder, moment):  # noqa: F811
    update = publish(folder, 1)

    async def body(site, engine, events):
        await engine.sleep()
        site.broken = {"/health": 99}

        loading = asyncio.create_task(engine.load_weights(update))
        while moment not in steps(site):
            await asyncio.sleep(0)
        await site.down()
        site.broken = {}
        await site.up()
        report = await loading
        (completion,) = await engine.generate("t", PROMPT, SHORT)
        return report.checksum, set(completion.token_versions)

    assert sleeping(monkeypatch, body) == (update.checksum, {1})


@pytest.mark.parametrize("left", ["asleep", "half", "awake"])
@pytest.mark.parametrize("version", [None, 1])
def test_a_new_client_wakes_whatever_the_last_one_left(monkeypatch, folder, left, version):  # noqa: F811
    update = publish(folder, 1)

    async def body(site, engine, events):
        if left != "awake":
            await engine.sleep()
        if left == "half":
            await engine._lifeline._connection.ask("/wake_up?tags=weights")
        heir = VllmEngine(site.url, KEY, RolloutConfig(), name="fake", resting=lambda: False)
        await heir.start()
        await heir.adopt(update if version else None)
        (completion,) = await heir.generate("t", PROMPT, SHORT)
        await heir.close()
        return set(completion.token_versions)

    assert sleeping(monkeypatch, body) == {version or 0}


def test_while_another_has_its_gpu_a_lost_engine_is_waited_for_without_end(monkeypatch):
    resting = [True]

    async def body(site, engine, events):
        await engine.sleep()
        await site.down()
        waking = asyncio.create_task(engine.wake())
        await asyncio.sleep(2.5)
        assert not waking.done()
        resting[0] = False
        with pytest.raises(EngineError, match=r"did not answer within rollout.startup_timeout_s=1 s"):
            await waking

    sleeping(monkeypatch, body, resting=lambda: resting[0], startup_timeout_s=1)


def test_a_response_from_one_that_sleeps_is_our_own_bug(monkeypatch):
    async def body(site, engine, events):
        await engine.sleep()
        with pytest.raises(AssertionError, match=r"asked for t\.0 while the engine sleeps"):
            await engine.generate("t", PROMPT, SHORT)
        stranger = VllmEngine(site.url, KEY, RolloutConfig(), name="fake")
        await stranger.start()
        with pytest.raises(EngineError, match=r"answered 409 .*while it sleeps, or has no weights: .*'memory': \[\]"):
            await stranger.generate("t", PROMPT, SHORT)
        await stranger.close()
        assert not site.engines[0]._state()["memory"]

    sleeping(monkeypatch, body)


def test_the_fake_engine_refuses_what_a_gpu_would_not_survive(monkeypatch, folder):  # noqa: F811
    update = publish(folder, 1)
    tenant = folder / "tenant"

    async def body(site, engine, events):
        site.engines[0]._setup = fake_server.Setup(
            token_ids=[1], eos_token_id=2, max_model_len=9, token_s=0.0, tenant_file=str(tenant)
        )
        connection = engine._lifeline._connection
        stranger = VllmEngine(site.url, KEY, RolloutConfig(), name="fake")
        await stranger.start()
        await engine.sleep()
        tenant.touch()
        with pytest.raises(EngineError, match=r"answered 409 to /wake_up: out of memory"):
            await connection.ask("/wake_up?tags=weights")
        with pytest.raises(EngineError, match=r"answered 500 .*there is no memory for weights"):
            weights = {"path": update.path, "checksum": update.checksum}
            await connection.ask("/collective_rpc", {"method": "fastreason_load", "kwargs": weights})
        tenant.unlink()
        for part in ("weights", "kv_cache"):
            await connection.ask(f"/wake_up?tags={part}")
        with pytest.raises(EngineError, match=r"or has no weights: .*'has_weights': False"):
            await stranger.generate("t", PROMPT, SHORT)
        await connection.ask("/collective_rpc", {"method": "fastreason_restore", "kwargs": {}})
        tenant.touch()
        with pytest.raises(EngineError, match=r"another has the device, and it was told to generate"):
            await stranger.generate("t", PROMPT, SHORT)
        with pytest.raises(EngineError, match=r"knows level=2&mode=wait"):
            await connection.ask("/sleep?level=1")
        await stranger.close()

    sleeping(monkeypatch, body)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def sleeping_fleet(monkeypatch, body, **keys):
    options = {"token_s": 0.0, "hang_timeout_s": 0.3, "resting": lambda: False, **keys}
    return with_fleet(monkeypatch, body, **options)


def memory(sites):
    return [len(site.engines[-1]._state()["memory"]) for site in sites]


def test_several_engines_sleep_as_one_and_one_that_was_away_does_what_they_do(monkeypatch, folder):  # noqa: F811
    first, second = publish(folder, 1), publish(folder, 2)

    async def body(sites, fleet, events):
        async def back(number):
            await sites[0].up()
            await until(lambda: [name for name, *_ in events].count("engine_back") == number)

        await fleet.load_weights(first)
        assert await fleet.sleep() > 0 and memory(sites) == [0, 0]
        await sites[0].down()
        await until(lambda: events)
        await back(1)
        assert memory(sites) == [0, 0], "it was found while the others slept"
        await sites[0].down()
        report = await fleet.load_weights(second)
        assert report.wake_s > 0 and await fleet.wake() == 0.0
        await back(2)
        assert memory(sites) == [2, 2]
        await fleet.sleep()
        assert await fleet.wake() > 0 and memory(sites) == [2, 2]
        answers = [await fleet.generate(f"t{number}", PROMPT, SHORT) for number in range(4)]
        return {version for (completion,) in answers for version in completion.token_versions}

    assert sleeping_fleet(monkeypatch, body) == {2}


def test_the_trainer_waits_for_one_of_several_that_is_just_being_started(monkeypatch):
    async def body(sites, fleet, events):
        await sites[0].down()
        await until(lambda: events)
        sleeping = asyncio.create_task(fleet.sleep())
        await asyncio.sleep(0.3)
        assert not sleeping.done(), "the trainer would take the GPU on which it starts"
        await sites[0].up()
        assert await sleeping > 0.3
        return memory(sites)

    assert sleeping_fleet(monkeypatch, body) == [0, 0]


def test_one_that_does_not_come_back_is_named_and_one_that_is_given_up_is_not_waited_for(monkeypatch):
    given_up = []

    async def body(sites, fleet, events):
        await sites[1].down()
        await until(lambda: events)
        with pytest.raises(
            EngineError, match=r"not all engines came back within .*=0\.5 s\. engine 1: .*http"
        ) as error:
            await fleet.sleep()
        assert "engine 0" not in str(error.value)
        given_up.append(True)
        await fleet.sleep()
        return memory(sites[:1])

    assert sleeping_fleet(monkeypatch, body, patience_s=0.5, given_up=lambda: bool(given_up)) == [0]


def test_a_worker_says_that_its_weights_are_given_up():
    worker = WeightWorker()
    worker.fastreason_held = "abc"
    worker.fastreason_give_up()
    assert worker.fastreason_beat() == {"checksum": "given up"}


# The producer


def sleeper(run):
    """Have the stage's engine write down when it sleeps and wakes, and refuse what one that sleeps cannot do."""
    engine, generate, load = run.engine, run.engine.generate, run.engine.load_weights
    engine.happened, engine.asleep = [], False

    async def sleep():
        assert not engine.asleep
        engine.asleep = True
        engine.happened.append("sleep")
        return 0.25

    async def wake():
        if engine.asleep:
            engine.happened.append("wake")
        engine.asleep, slept = False, engine.asleep
        return 0.5 if slept else 0.0

    async def load_weights(update):
        engine.asleep = False
        engine.happened.append(f"load {update.version}")
        return await load(update)

    async def answer(request_id, *arguments):
        assert not engine.asleep, f"{request_id} was asked for while the engine sleeps"
        engine.happened.append(request_id[0])
        return await generate(request_id, *arguments)

    engine.sleep, engine.wake, engine.load_weights, engine.generate = sleep, wake, load_weights, answer


@pytest.mark.parametrize("evaluates", [False, True])
def test_it_sleeps_from_a_batch_to_the_weights_that_it_makes(evaluates):
    config = make_config(batch_size=2, staleness=0)
    with running(config, prepare=sleeper, sleeps=True, starts_asleep=True) as run:
        happened = run.engine.happened
        assert happened == ["sleep"], "the trainer has room to load its model"
        if evaluates:
            run.client.evaluate("before")
        run.client.start(0, 0, None)
        for version in (1, 2):
            batch = run.client.next_batch()
            assert happened[-1] == "sleep" and batch.figures["time/sleep_s"] == 0.25
            run.publish(version)
            run.client.evaluate(f"step{version}")
    first = ["b"] * 4 if evaluates else []
    batches = [each for version in (1, 2) for each in ("t", "t", "sleep", f"load {version}")]
    assert [each for each in happened if each != "s"][: 2 + len(first) + 8] == ["sleep", "wake", *first, *batches]
    assert happened.count("wake") == 1, "an evaluation of weights that were just published needs no waking"


def test_one_that_does_not_share_its_gpu_is_left_awake():
    with running(make_config(staleness=0), prepare=sleeper) as run:
        run.client.start(0, 0, None)
        assert "time/sleep_s" not in run.client.next_batch().figures
        assert "sleep" not in run.engine.happened


# The trainer


def test_the_trainer_leaves_before_anything_is_asked_of_the_engine(tmp_path, monkeypatch):
    """And what it does not need is given back first, after every rank has."""
    world, file = World(), tmp_path / "tenant"
    loop = make_loop(tmp_path, world, eval={"num_prompts": 1}, checkpoint={"every": 1})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: world.calls.append("empty"))
    ranks = SimpleNamespace(is_first=True, barrier=lambda: world.calls.append("barrier"))
    loop.parts.tenancy = Tenancy(file, ranks)
    file.touch()  # from its start on
    present = {}
    happens = world.happens
    world.happens = lambda call: (present.setdefault(call, []).append(file.exists()), happens(call))
    assert loop.run() is True
    left = ["empty", "barrier"]
    assert world.calls == [
        *(*left, "evaluate before", "start 0 0 None"),
        *("batch", "update", *left, "publish 1", "save"),
        *("batch", "update", *left, "publish 2", "evaluate after", "save"),
    ]
    assert present["update"] == [True, True]
    assert not any(there for call, all_of in present.items() if call != "update" for there in all_of)
    assert all("time/wake_s" in line for line in world.lines)


def test_a_trainer_that_goes_on_leaves_before_it_publishes(tmp_path):
    world, file = World(), tmp_path / "tenant"
    first = make_loop(tmp_path, world, train={"steps": 1}, checkpoint={"every": 1})
    first.run()
    loop = make_loop(tmp_path, world, checkpoint={"every": 1})
    loop.parts.resume_from = loop.parts.checkpoints.latest()
    loop.parts.tenancy = Tenancy(file, SimpleNamespace(is_first=True, barrier=lambda: None))
    file.touch()
    world.calls.clear()
    seen = {}
    happens = world.happens
    world.happens = lambda call: (seen.setdefault(call.split()[0], file.exists()), happens(call))
    assert loop.run() is True
    assert (seen["load"], seen["publish"], seen["start"]) == (True, False, False)


@pytest.mark.parametrize("sleeps", [True, False])
def test_no_rank_loads_before_the_engine_has_had_its_memory(tmp_path, monkeypatch, sleeps):
    session = Session(
        folder=str(tmp_path), run_dir="", model_dir="", exchange_dir="", device="cuda",
        attention="", liger=False, resume=False, colocated=True, sleeps=sleeps,
    )  # fmt: skip
    config = make_config(startup_timeout_s=0.5)
    made = []
    monkeypatch.setattr(compose, "make_rollouts", lambda *_: made.append(session.tenant_file.exists()) or "client")
    monkeypatch.setenv("RANK", "0")
    assert compose.await_engine(session, config, lambda: False) == "client"
    assert made == [False] and session.tenant_file.exists() == sleeps, "from then on the GPUs are the trainer's"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InterruptedWaitError):
        compose.await_engine(session, config, lambda: True)
    asked = iter([False, False, True])
    monkeypatch.setattr(Session, "ready_file", SimpleNamespace(exists=lambda: next(asked)))
    assert compose.await_engine(session, config, lambda: False) is None and made == [False]
    monkeypatch.setattr(Session, "ready_file", SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(compose.time, "sleep", lambda s: None)
    monkeypatch.setattr("fastreason.patience.LONGEST_LOOK_S", 1e9)
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr("fastreason.patience.time.monotonic", lambda: next(clock))
    with pytest.raises(StuckError, match=r"waited 60.5 s for the engine that this rank shares its GPU with"):
        compose.await_engine(session, config, lambda: False)
