"""The loop with stand-ins for everything around it: what it asks of whom, in which order, and how it stops."""

from types import SimpleNamespace

import pytest
import torch
from fastreason_kernels import PolicyLossOutput

from fastreason.algorithms import resolve_algorithm
from fastreason.checkpoint import CheckpointStore, read_producer_state
from fastreason.config import parse_config
from fastreason.errors import InterruptedWaitError
from fastreason.loop import Loop, Parts
from fastreason.rollout.wire import Batch
from fastreason.types import EvalResult, Grade, Group, LoadReport, Prompt, Sample, WeightUpdate
from fastreason.update.updater import UpdateResult


class World:
    """Stands for updater, rollouts, publisher, metrics and the stop flag; `calls` is what happened, in order."""

    name, rank, num_ranks = "stub", 0, 1

    def __init__(self):
        self.calls, self.lines, self.updates, self.saved = [], [], [], []
        self.stop_after, self.stopped = None, False
        self.version = 0
        self.accuracies, self.rewards = iter(()), iter(())

    def happens(self, call):
        self.calls.append(call)
        if call == self.stop_after:
            self.stopped = True
            if call.startswith(("batch", "evaluate")):
                raise InterruptedWaitError("told to stop")

    # Rollouts
    def start(self, version, trained, state):
        self.happens(f"start {version} {trained} {state}")

    def next_batch(self):
        self.happens("batch")
        reward = next(self.rewards, 1.0)
        groups = [group(number, reward) for number in range(2)]
        return Batch(
            groups=groups, generate_s=2.0, grade_s=0.5, figures={"reward/timeouts": 3.0, "rollout/long_prompts": 4.0}
        )

    def publish(self, update, trained):
        assert trained == 2 * update.version
        self.happens(f"publish {update.version}")
        self.version = update.version
        return LoadReport(version=update.version, checksum="", num_tensors=1, held_bytes=0, pause_s=0.25)

    def evaluate(self, name):
        self.happens(f"evaluate {name}")
        return EvalResult(
            accuracy=next(self.accuracies, 0.5),
            standard_error=0.1,
            reward_mean=0.0,
            num_samples=1,
            num_prompts=1,
            num_tokens=1,
            truncated_share=0.0,
            temperature=1.0,
            wall_s=1.0,
            version=self.version,
        )

    def save_state(self, trained, settle):
        return f"{trained} settled={settle}".encode()

    # Updater
    def logprobs(self, batches, spec, temperature):
        self.happens("logprobs")
        return [torch.full_like(batch.sampler_logp_N, -7.0) for batch in batches]

    def update(self, batches, spec, temperature, denominator):
        self.happens("update")
        self.updates.append((batches, denominator))
        return UpdateResult([output_of(batch) for batch in batches], 0.5, 1.0, 1e-3, True)

    def save(self, folder):
        self.happens("save")
        folder.mkdir()

    def load(self, folder):
        self.happens("load")

    # Publisher and metrics
    def write(self, *arguments):
        if len(arguments) == 2:
            return WeightUpdate(path="", version=arguments[1], checksum="", num_bytes=0)
        self.lines.append(arguments[0])


def output_of(batch):
    num = len(batch.ids_N)
    values = torch.zeros(num)
    flags = torch.ones(num, dtype=torch.bool)
    return PolicyLossOutput(torch.zeros(()), values - 1, values, values, values + 1, ~flags, flags)


def group(ticket, best):
    samples = [
        Sample(
            token_ids=[1] * length,
            sampler_logp=[-1.5] * length,
            token_versions=[0] * length,
            text="",
            finish_reason="stop",
            grade=Grade(reward=reward, correct=reward > 0),
        )
        for length, reward in ((3, best), (2, 0.0))
    ]
    prompt = Prompt(id=str(ticket), text="")
    return Group(ticket=ticket, prompt=prompt, prompt_token_ids=[5, 6], samples=samples, version_issued=0)


def make_loop(tmp_path, world, **sections):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum"},
        "rollout": {"samples_per_prompt": 2, "max_new_tokens": 4},
        "algorithm": {"advantage": {"std": False}},
        "train": {"steps": 2, "prompts_per_step": 2},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    config = parse_config(raw)
    ranks = SimpleNamespace(
        rank=0, num=1, is_first=True, broadcast=lambda m: m, sum=lambda v: v, max=lambda v: v, barrier=lambda: None
    )
    store = CheckpointStore(tmp_path, config.checkpoint.keep_last, config.checkpoint.keep_best)
    parts = Parts(
        config=config,
        algorithm=resolve_algorithm(config),
        updater=world,
        ranks=ranks,
        publisher=world,
        checkpoints=store,
        run_dir=tmp_path,
        layout="padded",
        pad_token_id=0,
        stop_requested=lambda: world.stopped,
        rollouts=world,
        metrics=world,
    )
    return Loop(parts)


def saved_steps(loop):
    return [path.name for path in loop.parts.checkpoints.complete()]


def test_a_run_in_order(tmp_path):
    world = World()
    loop = make_loop(tmp_path, world, eval={"num_prompts": 1}, checkpoint={"every": 1})
    assert loop.run() is True
    assert world.calls == [
        "evaluate before",
        "start 0 0 None",
        *("batch", "update", "publish 1", "save"),
        *("batch", "update", "publish 2", "evaluate after", "save"),
    ]
    assert [line["step"] for line in world.lines] == [1, 2]
    assert set(loop.totals.evals) == {"before", "after"}
    assert loop.totals.tokens_generated == 20 and loop.totals.tokens_trained == 36  # with prompts


def test_evaluations_are_on_a_schedule_and_the_first_comes_before_step_1(tmp_path):
    world = World()
    make_loop(tmp_path, world, train={"steps": 5}, eval={"num_prompts": 1, "every": 2}).run()
    assert [call for call in world.calls if call.startswith(("evaluate", "update"))] == [
        *("evaluate before", "update", "update", "evaluate step-000002"),
        *("update", "update", "evaluate step-000004", "update", "evaluate after"),
    ]
    assert [line["step"] for line in world.lines if "eval/accuracy" in line] == [2, 4, 5]


def test_the_line_of_a_step(tmp_path):
    world = World()
    make_loop(tmp_path, world, train={"steps": 1}).run()
    (line,) = world.lines
    expected = {
        "loss/policy": 0.5,
        "reward/mean": 0.5,
        "rollout/tokens": 10.0,
        "train/tokens": 18.0,  # with prompts
        "train/tokens_computed": 2 * (2 + 3) + 2 * (2 + 2),
        "mismatch/logp_abs_mean": 0.5,
        "time/generate_s": 2.0,
        "time/pause_s": 0.25,
        "rollout/tok_per_s": 5.0,
        "reward/timeouts": 3.0,
        "rollout/long_prompts": 4.0,
    }
    assert {key: line[key] for key in expected} == expected


def test_an_update_is_divided_once_by_its_own_count(tmp_path):
    world = World()
    make_loop(tmp_path, world, train={"steps": 1}).run()
    make_loop(tmp_path, world, train={"steps": 1, "prompts_per_update": 1}).run()
    make_loop(tmp_path, world, train={"steps": 1}, algorithm={"aggregation": "sequence_mean"}).run()
    make_loop(tmp_path, world, train={"steps": 1}, algorithm={"aggregation": "constant"}).run()
    assert [denominator for _, denominator in world.updates] == [10, 5, 5, 4, 16]


def test_tokens_left_out_stay_in_the_denominator(tmp_path):
    world = World()
    world.rewards = iter([0.0])
    make_loop(tmp_path, world, train={"steps": 1}).run()
    ((batches, denominator),) = world.updates
    assert sum(batch.num_rows for batch in batches) == 1 and denominator == 10


def test_the_ratio_is_against_the_sampler(tmp_path):
    world = World()
    make_loop(tmp_path, world, train={"steps": 1}).run()
    ((batches, _),) = world.updates
    assert all((batch.behaviour_logp_N == -1.5).all() for batch in batches)


def test_the_ratio_is_against_the_trainer_before_its_first_update(tmp_path):
    world = World()
    keys = {"algorithm": {"ratio_against": "trainer"}}
    make_loop(tmp_path, world, **keys, train={"steps": 1, "prompts_per_update": 1}).run()
    assert world.calls[2:5] == ["logprobs", "update", "update"]
    assert all((batch.behaviour_logp_N == -7.0).all() for batches, _ in world.updates for batch in batches)
    world = World()
    make_loop(tmp_path, world, **keys, train={"steps": 1}).run()
    assert "logprobs" not in world.calls, "with one update the ratio is 1 by itself"
    assert all(batch.behaviour_logp_N is None for batches, _ in world.updates for batch in batches)


# Stopping


@pytest.mark.parametrize("moment", ["evaluate before", "start 0 0 None", "batch"])
def test_told_to_stop_before_anything_was_trained(tmp_path, moment):
    world = World()
    world.stop_after = moment
    loop = make_loop(tmp_path, world, eval={"num_prompts": 1}, checkpoint={"every": 1})
    assert loop.run() is False
    assert "update" not in world.calls and saved_steps(loop) == []


@pytest.mark.parametrize("moment", ["update", "publish 1", "evaluate step-000001", "batch 2"])
def test_told_to_stop_later_saves_what_was_trained(tmp_path, moment):
    """Also in the middle of a step or of an evaluation, and without checkpoint.every."""
    world = World()
    if moment == "batch 2":
        counted = world.happens

        def happens(call):
            counted(call if call != "batch" or "update" not in world.calls else "batch 2")

        world.happens = happens
    world.stop_after = moment
    loop = make_loop(tmp_path, world, train={"steps": 3}, eval={"num_prompts": 1, "every": 1})
    assert loop.run() is False
    assert world.calls.count("update") == 1
    assert saved_steps(loop) == ["step-000001"]
    state = loop.parts.checkpoints.latest()[1]
    assert (state.step, state.version, state.num_groups) == (1, 1, 2)
    # Told to stop, it does not wait for what is being generated.
    assert read_producer_state(loop.parts.checkpoints.latest()[0]) == b"2 settled=False"


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    world = World()
    first = make_loop(tmp_path, world, train={"steps": 2}, checkpoint={"every": 1})
    first.run()
    world = World()
    loop = make_loop(tmp_path, world, train={"steps": 3}, checkpoint={"every": 1}, eval={"num_prompts": 1})
    loop.parts.resume_from = loop.parts.checkpoints.latest()
    assert loop.run() is True
    assert world.calls == [
        *("load", "publish 2", "start 2 4 b'4 settled=True'"),
        *("batch", "update", "publish 3", "evaluate after", "save"),
    ]
    assert [line["step"] for line in world.lines] == [3]
    assert loop.totals.tokens_trained == 54


GOAL = {"entropy_coef": 0.01, "entropy_goal": 0.3, "entropy_step": 0.004}


@pytest.mark.parametrize(("before", "expected"), [(GOAL, 0.018), ({}, 0.01), ({"entropy_coef": 0.5}, 0.01)])
def test_a_resumed_run_goes_on_with_the_coefficients_that_adapted_and_no_others(tmp_path, before, expected):
    """Told another algorithm at the resume, it starts from what it is told."""
    make_loop(tmp_path, World(), train={"steps": 2}, checkpoint={"every": 1}, algorithm=before).run()
    world = World()
    loop = make_loop(tmp_path, world, train={"steps": 3}, algorithm=GOAL)
    loop.parts.resume_from = loop.parts.checkpoints.latest()
    assert loop.run() is True
    (line,) = world.lines
    assert line["loss/entropy_coef"] == pytest.approx(expected)


def test_a_run_that_was_ended_amid_its_last_evaluation_makes_up_for_it(tmp_path):
    world = World()
    world.stop_after = "evaluate after"
    keys = {"eval": {"num_prompts": 1}, "checkpoint": {"every": 1}}
    assert make_loop(tmp_path, world, **keys).run() is True
    for evaluates in (True, False):
        world = World()
        loop = make_loop(tmp_path, world, **keys if evaluates else {"checkpoint": {"every": 1}})
        loop.parts.resume_from = loop.parts.checkpoints.latest()
        assert loop.run() is True
        assert world.calls == ["load", "publish 2", "start 2 4 b'4 settled=False'", *["evaluate after"] * evaluates]
        assert (set(loop.totals.evals) == {"before", "after"}) == evaluates
        assert saved_steps(loop) == ["step-000001", "step-000002"]


def test_the_last_evaluation_of_a_run_that_was_to_be_shorter_is_not_that_of_a_longer_one(tmp_path):
    keys = {"eval": {"num_prompts": 1}, "checkpoint": {"every": 1}}
    make_loop(tmp_path, World(), **keys).run()
    world = World()
    world.stop_after = "publish 3"
    loop = make_loop(tmp_path, world, train={"steps": 4}, **keys)
    loop.parts.resume_from = loop.parts.checkpoints.latest()
    assert loop.run() is False
    assert set(loop.totals.evals) == {"before"}


def test_a_resumed_run_told_to_stop_at_once_saves_nothing_again(tmp_path):
    make_loop(tmp_path, World(), checkpoint={"every": 1}).run()
    world = World()
    world.stop_after = "publish 2"
    loop = make_loop(tmp_path, world, train={"steps": 3}, checkpoint={"every": 1})
    loop.parts.resume_from = loop.parts.checkpoints.latest()
    assert loop.run() is False
    assert "save" not in world.calls and saved_steps(loop) == ["step-000001", "step-000002"]


# The best checkpoint


def test_the_best_checkpoint_is_that_of_the_best_reward(tmp_path):
    world = World()
    world.rewards = iter([0.2, 0.9, 0.4, 0.5, 0.3])
    loop = make_loop(tmp_path, world, train={"steps": 5}, checkpoint={"every": 1, "keep_last": 1})
    loop.run()
    assert saved_steps(loop) == ["step-000002", "step-000005"]


def test_with_evaluations_the_best_checkpoint_is_that_of_the_best_accuracy(tmp_path):
    world = World()
    world.rewards = iter([0.9, 0.1, 0.1, 0.1, 0.9])
    world.accuracies = iter([0.0, 0.1, 0.2, 0.8, 0.3, 0.4])
    keys = {"eval": {"num_prompts": 1, "every": 1}, "checkpoint": {"every": 1, "keep_last": 1}}
    loop = make_loop(tmp_path, world, train={"steps": 5}, **keys)
    loop.run()
    assert saved_steps(loop) == ["step-000003", "step-000005"]
