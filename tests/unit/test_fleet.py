"""Several engines as one, on servers of the fake engine in this process that are ended, made deaf, and put up again."""

import asyncio

import pytest
from engine_site import KEY, PARAMS, PROMPT, TOKEN_S, Site, expected, with_fleet
from test_engine_recovery import publish

from fastreason.config import RolloutConfig
from fastreason.errors import EngineError
from fastreason.exchange import EXCHANGE_VARIABLE
from fastreason.rollout.fleet import Fleet
from fastreason.rollout.vllm import VllmEngine
from fastreason.rollout.vllm_middleware import KEY_VARIABLE
from fastreason.types import SamplingParams

pytestmark = pytest.mark.timeout(120)

GENERATE, ONE = "/inference/v1/generate", SamplingParams(n=1, max_new_tokens=16, seed=4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(tmp_path))
    return tmp_path


def loads(site):
    return [
        body["kwargs"]["path"][-14:] for body in site.asked("/collective_rpc") if body["method"] == "fastreason_load"
    ]


def prompts(site):
    return [body["request_id"].split(".")[0] for body in site.asked(GENERATE)]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


# Where requests go


def test_a_groups_samples_go_to_one_engine_and_the_next_to_the_least_loaded(monkeypatch):
    async def body(sites, fleet, events):
        large = asyncio.create_task(fleet.generate("large", PROMPT, PARAMS))
        await asyncio.sleep(TOKEN_S)
        small = [asyncio.create_task(fleet.generate(f"small{i}", PROMPT, ONE)) for i in range(4)]
        answers = [await task for task in [large, *small]]
        return answers, [prompts(site) for site in sites], fleet.figures(), fleet.figures()

    answers, asked, figures, again = with_fleet(monkeypatch, body)
    assert [completion.token_ids for completion in answers[0]] == expected()
    assert asked == [["large"] * PARAMS.n, ["small0", "small1", "small2", "small3"]]
    assert figures == {"engine/alive": 2.0, "engine/requests_0": 6.0, "engine/requests_1": 4.0}
    assert again == {"engine/alive": 2.0, "engine/requests_0": 0.0, "engine/requests_1": 0.0}, "they were counted"


# An engine that dies or hangs


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_lost_engine_owes_is_asked_of_another_at_once_and_finished_samples_are_kept(monkeypatch, folder, hangs):
    update = publish(folder, 1)
    monkeypatch.setattr("fastreason.rollout.connection.HEALTH_TIMEOUT_S", 0.3)

    async def body(sites, fleet, events):
        await fleet.load_weights(update)
        task = asyncio.create_task(fleet.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(6 * TOKEN_S)
        if hangs:
            sites[0].deaf.clear()
        else:
            await sites[0].down()
        completions = await task  # while nobody restarts the other
        owed = len(prompts(sites[1]))
        away = fleet.figures()["engine/alive"]
        while len(prompts(sites[1])) < owed + 3:
            await fleet.generate("t2", PROMPT, ONE)
        sites[0].deaf.set()
        if not hangs:
            await sites[0].up()
        await until(lambda: fleet.figures()["engine/alive"] == 2)
        await fleet.generate("t3", PROMPT, ONE)
        return completions, owed, away, [name for name, _, _ in events], prompts(sites[0])[-1], loads(sites[0])

    token_s = 0.1 if hangs else TOKEN_S  # a deaf server goes on with what it has heard
    completions, owed, away, events, last, loaded = with_fleet(
        monkeypatch, body, hang_timeout_s=0.6 if hangs else 60.0, token_s=token_s
    )
    assert [completion.token_ids for completion in completions] == expected()
    assert {version for completion in completions for version in completion.token_versions} == {1}
    assert 0 < owed < PARAMS.n or hangs, "finished samples were asked again"
    assert (away, events, last) == (1.0, ["engine_lost", "engine_back"], "t3")
    # A process that was replaced is given the weights again; one that had only been silent has them still.
    assert len(loaded) == (1 if hangs else 2)


def test_when_all_are_gone_the_wait_ends_with_the_first_that_is_back_or_names_them_all(monkeypatch):
    async def body(sites, fleet, events):
        task = asyncio.create_task(fleet.generate("t1", PROMPT, PARAMS))
        await asyncio.sleep(2 * TOKEN_S)
        for site in sites:
            await site.down()
        await asyncio.sleep(0.2)
        await sites[1].up()
        completions = await task
        await sites[1].down()
        with pytest.raises(EngineError, match=r"no engine came back within .*=1 s\. engine 0: .*; engine 1: .*http"):
            await fleet.generate("t2", PROMPT, ONE)
        return completions

    completions = with_fleet(monkeypatch, body, patience_s=1.0)
    assert [completion.token_ids for completion in completions] == expected()


# Weights


def test_one_publication_reaches_all_and_each_token_has_the_version_of_its_engine(monkeypatch, folder):
    updates = [publish(folder, version) for version in (1, 2)]

    async def body(sites, fleet, events):
        await fleet.load_weights(updates[0])
        tasks = [asyncio.create_task(fleet.generate(f"t{i}", PROMPT, PARAMS)) for i in range(2)]

        def most(site):
            return max(site.engines[0]._num_tokens.values(), default=0)

        await until(lambda: min(map(most, sites)) >= 2)
        sites[1].deaf.clear()  # it is late
        loading = asyncio.create_task(fleet.load_weights(updates[1]))
        await until(lambda: sites[0].engines[0]._held == updates[1].checksum)
        reached = most(sites[1])
        await until(lambda: most(sites[1]) > reached + 1)
        sites[1].deaf.set()
        report = await loading
        answers = [await task for task in tasks]
        held = [site.engines[0]._held for site in sites]
        return report, answers, held, [engine.version for engine in fleet._engines], fleet.version

    report, answers, held, versions, version = with_fleet(monkeypatch, body, token_s=0.1)
    assert held == [updates[1].checksum] * 2 and versions == [2, 2] and (report.version, version) == (2, 2)
    assert [[completion.token_ids for completion in completions] for completions in answers] == [expected()] * 2
    switches = []
    for completions in answers:
        longest = max((completion.token_versions for completion in completions), key=len)
        assert longest == sorted(longest) and set(longest) == {1, 2}
        switches.append(longest.index(2))
    assert switches[1] > switches[0], "the engine that was late sampled with the former weights for longer"
    assert report.pause_s < report.total_s


def test_an_engine_that_cannot_load_is_done_without_until_it_can(monkeypatch, folder):
    updates = [publish(folder, version) for version in (1, 2)]

    async def body(sites, fleet, events):
        await fleet.load_weights(updates[0])
        tasks = [asyncio.create_task(fleet.generate(f"t{i}", PROMPT, PARAMS)) for i in range(2)]
        await until(lambda: sites[0].engines[0]._num_tokens)
        load, failures = sites[0].engines[0]._load, [2]

        def fail(path, checksum):
            failures[0] -= 1
            if failures[0] >= 0:
                raise ValueError("no room")
            return load(path, checksum)

        monkeypatch.setattr(sites[0].engines[0], "_load", fail)
        await fleet.load_weights(updates[1])
        assert fleet.figures()["engine/alive"] == 1
        asked = len(prompts(sites[0]))
        completions = await fleet.generate("while", PROMPT, ONE)
        assert len(prompts(sites[0])) == asked and set(completions[0].token_versions) == {2}
        answers = [await task for task in tasks]
        await until(lambda: fleet.figures()["engine/alive"] == 2)
        return answers, [site.engines[0]._held for site in sites], events, failures

    answers, held, events, failures = with_fleet(monkeypatch, body)
    assert [[completion.token_ids for completion in completions] for completions in answers] == [expected()] * 2
    assert held == [updates[1].checksum] * 2 and failures[0] == -1
    assert [name for name, _, _ in events] == ["engine_lost", "engine_back"]
    assert "could not load version 2" in events[0][2] and "no room" in events[0][2]


def test_an_engine_whose_load_failed_midway_samples_nothing_while_others_still_load(monkeypatch, folder):
    updates = [publish(folder, version) for version in (1, 2)]

    async def body(sites, fleet, events):
        await fleet.load_weights(updates[0])
        task = asyncio.create_task(fleet.generate("t", PROMPT, PARAMS))
        await until(lambda: any(sites[0].engines[0]._num_tokens.values()))

        def fail(path, checksum):
            sites[0].engines[0]._held = "half"
            raise ValueError("no room")

        monkeypatch.setattr(sites[0].engines[0], "_load", fail)
        sites[1].deaf.clear()  # it is late
        resumed = len(sites[0].asked("/resume"))
        loading = asyncio.create_task(fleet.load_weights(updates[1]))
        await until(lambda: sites[0].engines[0]._held == "half")
        await asyncio.sleep(0.3)
        assert not loading.done()
        seen = [name for name, _, _ in events], len(sites[0].asked("/resume")) - resumed
        sites[1].deaf.set()
        await loading
        return seen, await task

    seen, completions = with_fleet(monkeypatch, body)
    assert seen == (["engine_lost"], 0), "it went on with weights of no version"
    assert [completion.token_ids for completion in completions] == expected()


def test_an_engine_that_is_behind_gets_no_request(monkeypatch, folder):
    async def body(sites, fleet, events):
        await fleet.load_weights(publish(folder, 1))
        fleet._engines[0].version = 0
        await fleet.generate("t1", PROMPT, ONE)
        return [prompts(site) for site in sites]

    assert with_fleet(monkeypatch, body) == [[], ["t1"]]


def test_weights_that_no_engine_can_load_are_an_error_at_once(monkeypatch, folder):
    good = publish(folder, 1)

    async def body(sites, fleet, events):
        with pytest.raises(EngineError, match=r"checksum of .* sent was wrong"):
            await fleet.load_weights(type(good)(path=good.path, version=1, checksum="wrong", num_bytes=1))
        assert fleet.version == 0

    with_fleet(monkeypatch, body)


@pytest.mark.parametrize("number_away", [1, 2])
def test_an_engine_that_is_away_during_an_update_comes_back_with_it(monkeypatch, folder, number_away):
    updates = [publish(folder, version) for version in (1, 2)]

    async def body(sites, fleet, events):
        await fleet.load_weights(updates[0])
        for site in sites[:number_away]:
            await site.down()
        loading = asyncio.create_task(fleet.load_weights(updates[1]))
        await asyncio.sleep(0.3)
        assert loading.done() == (number_away == 1), "one that lives is enough, and none is not"
        await sites[0].up()
        report = await loading
        await until(lambda: fleet._engines[0].is_alive)
        return report, sites[0].engines[-1]._held, fleet._engines[0].version

    report, held, version = with_fleet(monkeypatch, body)
    assert (report.version, report.checksum, held, version) == (2, updates[1].checksum, updates[1].checksum, 2)


# A fleet that takes over


def test_a_new_producer_goes_on_with_the_engines_that_live(monkeypatch, folder):
    update = publish(folder, 3)

    async def body(sites, fleet, events):
        await sites[0].down()
        await fleet.adopt(update)
        fleet.version = 3
        completions = await fleet.generate("t1", PROMPT, ONE)
        assert fleet.figures()["engine/alive"] == 1
        await sites[0].up()
        await until(lambda: fleet.figures()["engine/alive"] == 2)
        return completions, [site.engines[-1]._held for site in sites], [engine.version for engine in fleet._engines]

    completions, held, versions = with_fleet(monkeypatch, body, takes_over=True)
    assert set(completions[0].token_versions) == {3}
    assert held == [update.checksum] * 2 and versions == [3, 3]


def test_a_start_needs_every_engine(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    async def run():
        site = Site(monkeypatch)
        await site.up()
        other = Site(monkeypatch)
        config = RolloutConfig(startup_timeout_s=0.5)
        fleet = Fleet([VllmEngine(each.url, KEY, config, name="fake", spare=True) for each in (site, other)], 0.5)
        try:
            with pytest.raises(EngineError, match=rf"fake engine at {other.url} did not answer within"):
                await fleet.start()
        finally:
            await fleet.close()
            await site.down()

    asyncio.run(asyncio.wait_for(run(), 20))
