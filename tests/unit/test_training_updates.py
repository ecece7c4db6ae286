"""The training step through the real DeepSpeed updater: ratios of exactly 1, importance weights, KL terms, a critic.

This file is also the program of the processes that DeepSpeed runs in (`python test_training_updates.py FOLDER JOB...`): each
writes what it measured to FOLDER/<rank>.pt, and the tests judge it.
"""

import itertools
import os
import random
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT_S = 540
# Products of a head this wide round differently for other numbers of rows, so that a wrong split of rows shows.
VOCABULARY, WIDTH = 1000, 256
LAYOUTS = ("padded", "packed", "shared")
# Keys of the algorithm, and the ratio of its spec. Rows without an advantage stay in: they are products of their own.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "token ratio": ({}, "token"),
    "weighted": ({"importance": "truncate", "importance_level": "sequence"}, "token"),
    "sequence ratio": ({"entropy_coef": 0.01}, "sequence"),
}
# The engines, by dtype and ZeRO stage, and what each is tried with.
ENGINES: dict[tuple[str, int], list[tuple[str, str]]] = {
    ("float32", 0): [("token ratio", "shared")],
    ("float32", 2): [*itertools.product(["token ratio", "sequence ratio"], LAYOUTS), ("weighted", "padded")],
    ("bfloat16", 2): [*itertools.product(["token ratio", "sequence ratio"], LAYOUTS), ("weighted", "shared")],
    ("bfloat16", 3): [("token ratio", "shared")],
}
RATIOS = [(*engine, *case) for engine, cases in ENGINES.items() for case in cases]
EMPTY = (("zero", "float32", 0), ("zero", "bfloat16", 3), ("remove", "bfloat16", 2))

# Right, wrong, and a prompt without a right response; more than one update.
KL_REWARDS = [[1.0, 0.0, 0.5, 0.25], [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
TERMS: dict[str, dict[str, Any]] = {
    "k3 in the loss": {"kl": "k3", "kl_coef": 0.3},
    "k1 in the advantage": {"kl": "k1", "kl_coef": 0.3, "kl_place": "advantage"},
    "k1 in the reward": {"kl": "k1", "kl_coef": 0.3, "kl_place": "reward", "advantage": {"std": False}},
    "exact": {"kl": "exact", "kl_coef": 0.3},
    "top k": {"kl": "top_k", "kl_coef": 0.3, "kl_top_k": 8},
    "of wrong responses": {"kl": "k2", "kl_coef": 0.3, "kl_mask": "wrong", "kl_mask_mean": "kept"},
}
TERM_NAMES = list(TERMS)
# Rows whose advantages come of models, on all ranks' responses: keys of the algorithm, figures to compare.
ROWS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ppo": ({"ratio": "none", "ratio_against": None}, ("critic/loss", "critic/grad_norm", "critic/explained_variance")),
    "iterative_dpo": ({"ratio_against": None}, ("pairs/num", "pairs/loss", "pairs/margin", "pairs/accuracy")),
}
# Of one and of two processes: ZeRO stage, layout, tokens of a micro-batch.
WAYS = {
    1: [(2, "padded", 1000), (2, "packed", 30), (2, "shared", 60)],
    2: [(2, "shared", 30), (3, "padded", 60)],
}

# ---------------------------------------------------------------------------------------------------------------------
# What runs in the processes


def tiny_model(dtype: str, seed: int = 11) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def make_groups(rewards: list[list[float]], sampler_logp: list[list[float]] | None = None) -> list[Any]:
    """A group for each list of rewards, of ragged responses; `sampler_logp` of the responses in order, else made up."""
    from fastreason.types import Grade, Group, Prompt, Sample

    rng, groups, given = random.Random("training"), [], iter(sampler_logp or [])
    for number, values in enumerate(rewards):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(3, 9))]
        samples = []
        for value in values:
            tokens = [rng.randrange(1, VOCABULARY) for _ in range(rng.randint(2, 9))]
            made_up = [-7 + rng.random() for _ in tokens]
            samples.append(
                Sample(
                    token_ids=tokens,
                    sampler_logp=next(given, made_up),
                    token_versions=[0] * len(tokens),
                    text="",
                    finish_reason="stop",
                    grade=Grade(reward=value, correct=value > 0),
                )
            )
        name = Prompt(id=str(number), text="")
        groups.append(Group(ticket=number, prompt=name, prompt_token_ids=prompt, samples=samples, version_issued=0))
    return groups


class Recorded:
    """A DeepSpeedUpdater that keeps the outputs of its updates."""

    def __init__(self, updater: Any) -> None:
        self.updater, self.outputs, self.grad_norms = updater, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.updater, name)

    def update(self, *arguments: Any) -> Any:
        result = self.updater.update(*arguments)
        self.outputs.append([(o.ratio.clone(), o.logp.clone()) for o in result.outputs])
        self.grad_norms.append(result.grad_norm)
        return result


def make_config(dtype: str, stage: int, **sections: Any) -> Any:
    from fastreason.config import parse_config

    raw: dict[str, dict[str, Any]] = {
        "model": {"path": "none", "dtype": dtype},
        "data": {"task": "chain_sum"},
        "rollout": {"samples_per_prompt": 4, "max_new_tokens": 9, "temperature": 0.9},
        "algorithm": {"ratio_against": "trainer"},
        "train": {
            "steps": 4,
            "prompts_per_step": 3,
            "prompts_per_update": 1,
            "lr": 1e-3,
            "lr_schedule": "linear",
            "weight_decay": 0.1,
            "max_grad_norm": 1e9,
            "micro_batch_tokens": 60,
            "zero_stage": stage,
        },
    }
    for name, keys in sections.items():
        raw[name] |= keys
    return parse_config(raw)


def make_updater(config: Any) -> Any:
    from fastreason.config import num_updates
    from fastreason.policy import Policy
    from fastreason.update.deepspeed import DeepSpeedUpdater

    dtype = config.model.dtype
    return DeepSpeedUpdater(Policy(tiny_model(dtype)).train(), config.train, dtype, num_updates(config))


def make_step(config: Any, updater: Any, layout: str = "padded", ratio: str | None = "token", **others: Any) -> Any:
    from fastreason.algorithms import resolve_algorithm
    from fastreason.ranks import Ranks
    from fastreason.training import TrainingStep

    algorithm = resolve_algorithm(config)
    if ratio is not None:
        algorithm = replace(algorithm, spec=replace(algorithm.spec, ratio=ratio))
    return TrainingStep(config, algorithm, Recorded(updater), Ranks(), layout, 0, **others)


def make_target(stage: int, dtype: str = "float32", seed: int = 12) -> Any:
    """A frozen model; at stage 3 its weights are divided among the ranks."""
    from fastreason.frozen import FrozenModel, FrozenScorer
    from fastreason.policy import Policy
    from fastreason.update.deepspeed import divided_scorer

    scorer = FrozenScorer(Policy(tiny_model(dtype, seed)))
    run, gather = divided_scorer(scorer, dtype) if stage == 3 else (scorer, lambda parameters: nullcontext())
    return FrozenModel(scorer, torch.device("cpu"), "reference", run, gather)


def job_ratios() -> dict[str, Any]:
    """A step of two updates: the ratios of each."""
    rewards = [[1.0, 0.0, 0.5, 0.5], [0.0, 1.0, 1.0, 0.25]]
    train = {"skip_zero_advantage": False, "prompts_per_step": len(rewards)}
    found = {}
    for (dtype, stage), cases in ENGINES.items():
        updater = make_updater(make_config(dtype, stage, train=train))
        for name, layout in cases:
            updater.num_done = 0  # the schedule from its start
            algorithm, ratio = SETTINGS[name]
            step = make_step(make_config(dtype, stage, algorithm=algorithm, train=train), updater, layout, ratio)
            step(make_groups(rewards))
            found[dtype, stage, name, layout] = step.updater.outputs
    return found


def job_importance() -> dict[str, Any]:
    """One update from the current weights, whose sampler was off: its gradient norms and figures by kind of weight."""
    from fastreason.packing import Row, collate

    rewards = [[1.0, 0.0, 0.5, 0.25]]
    # So small a rate that every case starts from the same weights.
    one = {"prompts_per_step": 1, "prompts_per_update": 1, "lr": 1e-12}

    def config_for(**algorithm: Any) -> Any:
        return make_config("float32", 2, algorithm=algorithm, train=one, rollout={"max_staleness": 0})

    updater = make_updater(config_for())
    step, (group,) = make_step(config_for(), updater), make_groups(rewards)
    logp = []
    for sample in group.samples:
        row = Row(group.prompt_token_ids, sample.token_ids, sample.sampler_logp, 1.0)
        (found,) = step.updater.logprobs([collate([[row]], "padded")], step.algorithm.spec, 0.9)
        logp.append(found.tolist())
    equal = [[value - 0.4 for value in row] for row in logp]
    of_sequences = [[value - 0.2 / len(row) for value in row] for row in logp]
    cases = {
        "none": (equal, {}),
        "token": (equal, {"importance": "truncate"}),
        "truncated": (equal, {"importance": "truncate", "importance_cap": 1.25}),
        "masked": (equal, {"importance": "mask", "importance_cap": 1.25}),
        "below the floor": (equal, {"importance": "mask", "importance_floor": 1.6}),
        "sequence": (of_sequences, {"importance": "truncate", "importance_level": "sequence"}),
        "geometric": (equal, {"importance": "truncate", "importance_level": "geometric"}),
    }
    results = {}
    for name, (sampler_logp, algorithm) in cases.items():
        step = make_step(config_for(**algorithm), updater)
        figures = step(make_groups(rewards, sampler_logp))
        results[name] = {"grad_norm": step.updater.grad_norms[0], "figures": figures}
    return results


def job_empty() -> dict[str, Any]:
    """A good step, one that a filter leaves nothing of, one of a single row; weights after each, learning rates."""
    found = {}
    mixed, constant, single = [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]
    for filtered, dtype, stage in EMPTY:
        config = make_config(dtype, stage, algorithm={"filter": "constant", "filtered": filtered, "truncated": "mask"})
        step = make_step(config, make_updater(config))
        lines, states = [], [whole_weights(step.updater)]
        one_row = make_groups([constant, single, constant])
        for sample in one_row[1].samples[:3]:
            sample.finish_reason = "length"
        for groups in (make_groups([mixed] * 3), make_groups([constant] * 3), one_row):
            lines.append(step(groups))
            states.append(whole_weights(step.updater))
        found[filtered, dtype, stage] = {"lines": lines, "states": states}
    return found


def kl_config(term: str, stage: int, dtype: str = "float32", **train: Any) -> Any:
    algorithm = {"ratio_against": "sampler", **TERMS[term]}
    train = {"prompts_per_step": len(KL_REWARDS), "max_grad_norm": 0.5, **train}
    return make_config(dtype, stage, algorithm=algorithm, train=train)


def job_terms() -> dict[str, Any]:
    """One step of three updates with each KL term, in each way of cutting it up: figures, and gradient norms."""
    import torch.distributed as dist

    found = {}
    for stage, layout, budget in WAYS[dist.get_world_size()]:
        target = make_target(stage)
        for term in TERMS:
            config = kl_config(term, stage, micro_batch_tokens=budget)
            step = make_step(config, make_updater(config), layout, ratio=None, target=target)
            figures = step(make_groups(KL_REWARDS))
            found[term, stage, layout, budget] = {"norms": step.updater.grad_norms, "figures": figures}
    return found


def job_rows() -> dict[str, Any]:
    """Two steps of three updates, in each way of cutting them up: the second begins with a critic that has learnt."""
    import torch.distributed as dist

    from fastreason.critic import Critic

    found = {}
    for stage, layout, budget in WAYS[dist.get_world_size()]:
        for name, (algorithm, _) in ROWS.items():
            train = {"prompts_per_step": len(KL_REWARDS), "max_grad_norm": 0.5, "micro_batch_tokens": budget}
            # Adam's first update has the sign of each gradient, also of one that is nothing but rounding: at a larger rate
            # what the ways differ by in the last bit grows to 1e-3 of a later gradient on some CPUs.
            train["lr"] = 1e-4
            config = make_config("float32", stage, algorithm={"name": name, **algorithm}, train=train)
            beside: dict[str, Any] = {"target": make_target(stage)}
            if name == "ppo":
                beside = {"critic": Critic(make_critic("float32", stage))}
            step = make_step(config, make_updater(config), layout, ratio=None, **beside)
            lines = [step(make_groups(KL_REWARDS), number) for number in range(2)]
            found[name, stage, layout, budget] = {"norms": step.updater.grad_norms, "lines": lines}
    return found


def job_limits() -> dict[str, Any]:
    """A coefficient of 0 against no term; a teacher that is the student; no term against one that always is 0."""
    weights, norms = {}, {}
    for name, algorithm in {
        "grpo": {},
        "grpo at 0": {"kl": "k2", "kl_coef": 0.0},
        "grpo at 0 exact": {"kl": "exact", "kl_coef": 0.0},
    }.items():
        config = make_config("float32", 2, algorithm={"ratio_against": "sampler", **algorithm})
        step = make_step(
            config, make_updater(config), "shared", ratio=None, target=make_target(2) if algorithm else None
        )
        for _ in range(2):
            step(make_groups(KL_REWARDS))
        weights[name] = whole_weights(step.updater)
    for dtype, stage in (("float32", 2), ("bfloat16", 2), ("bfloat16", 3)):
        for kl in ("k2", "k3"):
            keys = {"name": "kd_rkl", "kl": kl, "kl_target": "reference", "ratio_against": "sampler"}
            config = make_config(dtype, stage, algorithm=keys, train={"prompts_per_step": 1})
            target = make_target(stage, dtype, seed=11)
            step = make_step(config, make_updater(config), "shared", ratio=None, target=target)
            figures = step(make_groups(KL_REWARDS[:1]))
            norms[dtype, stage, kl] = (figures["train/grad_norm"], figures["kl/reference"], figures["loss/policy"])
    return {"weights": weights, "norms": norms}


def make_critic(dtype: str, stage: int) -> Any:
    """One that learns fast."""
    from fastreason.critic import ValueModel
    from fastreason.update.deepspeed import DeepSpeedCritic

    train = make_config(dtype, stage).train.model_copy(update={"lr": 3e-3, "lr_schedule": "constant"})
    return DeepSpeedCritic(ValueModel(tiny_model(dtype)).train(), train, dtype, 40)


def job_critic() -> dict[str, Any]:
    """Steps of PPO; the critic's state saved, and one step more from both."""
    import tempfile

    from fastreason.critic import Critic

    found = {}
    for dtype, stage in (("float32", 0), ("float32", 2), ("bfloat16", 3)):
        config = make_config(dtype, stage, algorithm={"name": "ppo", "ratio_against": "sampler"})
        engine = make_critic(dtype, stage)
        step = make_step(config, make_updater(config), "shared", ratio=None, critic=Critic(engine, clip=None))
        lines = [step(make_groups(KL_REWARDS), number) for number in range(6)]
        batches = step.micro_batches(step._rows(make_groups(KL_REWARDS), torch.ones(3, 4), 0))
        other = make_critic(dtype, stage)
        with tempfile.TemporaryDirectory() as folder:
            engine.save(Path(folder))
            other.load(Path(folder))
        found[dtype, stage] = {"lines": lines, "values": engine.values(batches), "loaded": other.values(batches)}
    return found


def whole_weights(updater: Any) -> list[torch.Tensor]:
    return [tensor.clone() for _, tensor in updater.weights()]


def main(folder: str, *jobs: str) -> None:
    import torch.distributed as dist

    from fastreason.update.deepspeed import initialise_distributed

    torch.set_num_threads(1)
    initialise_distributed("cpu")
    found = {job: globals()[f"job_{job}"]() for job in jobs}
    torch.save(found, f"{folder}/{dist.get_rank()}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a finished process alive


# ---------------------------------------------------------------------------------------------------------------------
# The tests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S + 60)]


def run_ranks(folder: Path, num: int, *jobs: str) -> dict[str, Any]:
    """What rank 0 of `num` processes found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, **place, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", __file__, str(folder), *jobs]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num)
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), said[0][-6000:]
    return torch.load(folder / "0.pt", weights_only=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found."""
    jobs = ("ratios", "importance", "empty", "terms", "rows", "limits", "critic")
    return run_ranks(tmp_path_factory.mktemp("updates"), 1, *jobs)


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(tmp_path_factory.mktemp("ranks"), 2, "terms", "rows")


@pytest.mark.parametrize("case", RATIOS, ids=lambda case: ", ".join(map(str, case)))
def test_the_first_ratio_to_the_trainers_own_log_probabilities_is_exactly_one(found, case):
    """From the current weights, for every token; the later update shows that the ratio is a real one."""
    first, later = (torch.cat([ratio for ratio, _ in update]) for update in found["ratios"][case])
    assert torch.equal(first, torch.ones_like(first)), f"{int((first != 1).sum())} of {len(first)} differ"
    assert len(first) > 10 and (later != 1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("case", "weight", "capped"),
    [
        ("none", 1.0, 0.0),
        ("token", 1.4918247, 0.0),  # e^0.4, which every token's sampler is off by
        ("truncated", 1.25, 1.0),
        ("masked", 0.0, 1.0),
        ("below the floor", 0.0, 1.0),
        ("sequence", 1.2214028, 0.0),  # e^0.2, a sequence's tokens together
        ("geometric", 1.4918247, 0.0),
    ],
)
def test_the_samplers_mismatch_is_corrected_at_no_staleness_too(found, case, weight, capped):
    """The ratio is 1 there, whatever the sampler said: only the importance weight knows of it."""
    plain, result = found["importance"]["none"], found["importance"][case]
    assert plain["grad_norm"] > 0.01
    assert result["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-4, abs=1e-7)
    figures = result["figures"]
    assert figures["loss/ratio_max"] == figures["loss/ratio_mean"] == 1.0
    assert figures["mismatch/weight_mean"] == pytest.approx(weight, rel=1e-5, abs=1e-9)
    assert figures["mismatch/weight_capped_share"] == capped
    if case != "sequence":
        for key in ("mean", "min", "max"):
            assert figures[f"mismatch/ratio_{key}"] == pytest.approx(1.4918247, rel=1e-5)
        assert figures["mismatch/ess"] == pytest.approx(1.0)


@pytest.mark.parametrize("setting", EMPTY, ids=lambda setting: ", ".join(map(str, setting)))
def test_an_update_without_a_row_changes_nothing_but_the_schedule(found, setting):
    """Not even by weight decay or momentum, which the step before has built up."""
    lines, states = found["empty"][setting]["lines"], found["empty"][setting]["states"]
    good, nothing, one_row = lines
    assert [line["train/empty_updates"] for line in lines] == [0.0, 3.0, 2.0]
    assert [line["train/filtered_groups"] for line in lines] == [0.0, 3.0, 2.0]
    assert (nothing["loss/policy"], nothing["train/grad_norm"], nothing["train/skipped_updates"]) == (0.0, 0.0, 0.0)
    # Twelve updates, down to 0 on a line: the third, sixth and ninth.
    assert [line["train/lr"] for line in lines] == pytest.approx([1e-3 * (1 - done / 12) for done in (2, 5, 8)])
    assert good["train/grad_norm"] > 0 and one_row["train/grad_norm"] > 0
    assert one_row["train/masked_rows"] == 3.0

    def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    assert [same(before, after) for before, after in itertools.pairwise(states)] == [False, True, False]


@pytest.mark.parametrize("term", TERM_NAMES)
def test_no_way_of_cutting_up_a_step_changes_what_a_kl_term_does(found, of_two_ranks, term):
    """Layouts, sizes of micro-batches, two ranks, weights divided among them: one loss and one gradient."""
    ways = {key[1:]: value for key, value in found["terms"].items() if key[0] == term}
    ways |= {("two ranks", *key[1:]): value for key, value in of_two_ranks["terms"].items() if key[0] == term}
    assert len(ways) == sum(map(len, WAYS.values()))
    (expected, *others) = ways.values()
    for way in others:
        assert way["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        for key in ("loss/policy", "loss/kl", "loss/entropy", "kl/reference", "kl/coef"):
            assert way["figures"][key] == pytest.approx(expected["figures"][key], rel=1e-3, abs=1e-5), key
    assert expected["figures"]["kl/reference"] > 0.01


@pytest.mark.parametrize("name", ROWS)
def test_no_way_of_cutting_up_a_step_changes_what_models_make_of_rewards(found, of_two_ranks, name):
    """Values and returns, whitening, pairs and their margins: over the responses of all ranks."""
    ways = {key[1:]: value for key, value in found["rows"].items() if key[0] == name}
    ways |= {("two ranks", *key[1:]): value for key, value in of_two_ranks["rows"].items() if key[0] == name}
    assert len(ways) == sum(map(len, WAYS.values()))
    (expected, *others) = ways.values()
    for way in others:
        assert way["norms"] == pytest.approx(expected["norms"], rel=1e-3)
        for line, wanted in zip(way["lines"], expected["lines"], strict=True):
            for key in ("loss/policy", "loss/entropy", "train/empty_updates", *ROWS[name][1]):
                assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), key
    assert all(norm > 1e-3 for norm in expected["norms"])
    first, second = expected["lines"]
    assert all(first[key] != second[key] for key in ROWS[name][1] if key not in ("pairs/num", "pairs/accuracy"))


def test_every_kl_term_does_something_of_its_own(found):
    norms = [value["norms"][0] for key, value in found["terms"].items() if key[1:] == WAYS[1][0]]
    assert len(norms) == len({round(norm, 6) for norm in norms}) == len(TERMS)


def test_a_coefficient_of_zero_is_no_term_to_the_last_bit(found):
    weights = found["limits"]["weights"]
    for name in ("grpo at 0", "grpo at 0 exact"):
        assert all(torch.equal(a, b) for a, b in zip(weights["grpo"], weights[name], strict=True)), name


def test_a_teacher_that_is_the_student_teaches_exactly_nothing(found):
    assert len(found["limits"]["norms"]) == 6
    assert set(found["limits"]["norms"].values()) == {(0.0, 0.0, 0.0)}


@pytest.mark.parametrize("engine", [("float32", 0), ("float32", 2), ("bfloat16", 3)], ids=str)
def test_a_critic_learns_what_responses_are_worth(found, engine):
    """Values start at 0, so that nothing is explained; a state that is saved and loaded gives the same values."""
    result = found["critic"][engine]
    first, last = result["lines"][0], result["lines"][-1]
    assert first["critic/explained_variance"] == pytest.approx(0.0, abs=1e-6) and first["critic/value_mean"] == 0.0
    assert last["critic/explained_variance"] > 0.3 and last["critic/loss"] < 0.7 * first["critic/loss"]
    assert all(torch.equal(a, b) for a, b in zip(result["values"], result["loaded"], strict=True))
    assert any(bool(values.any()) for values in result["values"])


if __name__ == "__main__":
    main(*sys.argv[1:])
