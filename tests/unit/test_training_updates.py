"""The training step through the real DeepSpeed updater: ratios of exactly 1, importance weights, updates without a row.

This file is also the program of the process that DeepSpeed runs in (`python test_training_updates.py FILE`): it writes what
it measured to FILE, and the tests judge it.
"""

import itertools
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

TIMEOUT_S = 200
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

# ---------------------------------------------------------------------------------------------------------------------
# What runs in the process


def tiny_model(dtype: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
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


def make_step(config: Any, updater: Any, layout: str = "padded", ratio: str = "token") -> Any:
    from fastreason.algorithms import resolve_algorithm
    from fastreason.ranks import Ranks
    from fastreason.training import TrainingStep

    algorithm = resolve_algorithm(config)
    algorithm = replace(algorithm, spec=replace(algorithm.spec, ratio=ratio))
    return TrainingStep(config, algorithm, Recorded(updater), Ranks(), layout, 0)


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


def whole_weights(updater: Any) -> list[torch.Tensor]:
    return [tensor.clone() for _, tensor in updater.weights()]


def main(file: str) -> None:
    from fastreason.update.deepspeed import initialise_distributed

    torch.set_num_threads(1)
    initialise_distributed("cpu")
    torch.save({"ratios": job_ratios(), "importance": job_importance(), "empty": job_empty()}, file)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a finished process alive


# ---------------------------------------------------------------------------------------------------------------------
# The tests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S + 60)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process found."""
    file = tmp_path_factory.mktemp("updates") / "found.pt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, **place, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", __file__, str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(file, weights_only=False)


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


if __name__ == "__main__":
    main(*sys.argv[1:])
