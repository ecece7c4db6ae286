"""Who runs where: what `resources` comes to, and which wishes are refused before anything starts."""

import pytest

from fastreason.config import parse_config
from fastreason.errors import ConfigError
from fastreason.placement import place
from fastreason.resources import engine_gpus, trainer_gpus


def config(staleness=0, train_gpus=None, ranks=1, mode="auto", sleep="auto", engines=None, urls=(), **rollout):
    return parse_config(
        {
            "model": {"path": "/m"},
            "data": {"task": "chain_sum"},
            "rollout": {"max_staleness": staleness, **rollout},
            "resources": {"mode": mode, "sleep": sleep, "engines": engines, "urls": list(urls)},
            "train": {"steps": 1, "prompts_per_step": 8, "gpus": train_gpus, "ranks": ranks},
        }
    )


@pytest.mark.parametrize(
    ("keys", "device", "mode", "sleeps"),
    [
        ({}, "cpu", "split", False),
        ({}, "cuda", "colocated", True),  # one GPU, the first, for both
        ({"staleness": 1}, "cuda", "colocated", False),
        ({"sleep": "off"}, "cuda", "colocated", False),
        ({"engine": "hf"}, "cuda", "colocated", False),
        ({"gpus": "7", "train_gpus": "0-6", "ranks": 7}, "cuda", "split", False),
        ({"gpus": "7", "ranks": 7}, "cuda", "split", False),  # the ranks take the first seven
        ({"gpus": "7", "ranks": 8}, "cuda", "colocated", True),
        ({"gpus": "0-7", "tensor_parallel": 4, "train_gpus": "4-7", "ranks": 4}, "cuda", "split", False),
        ({"gpus": "0-3", "tensor_parallel": 4, "train_gpus": "0-3", "ranks": 4}, "cuda", "colocated", True),
        ({"mode": "colocated", "engine": "vllm"}, "cpu", "colocated", False),
        ({"mode": "colocated", "engine": "fake", "sleep": "on"}, "cpu", "colocated", True),
        ({"mode": "split", "gpus": "1"}, "cuda", "split", False),
        ({"gpus": "0-3", "engines": 4, "ranks": 4}, "cuda", "colocated", True),
        ({"gpus": "4-7", "engines": 4, "ranks": 4}, "cuda", "split", False),
        ({"urls": ["http://a:1"]}, "cuda", "remote", False),
        ({"urls": ["http://a:1"], "mode": "remote"}, "cpu", "remote", False),
    ],
)
def test_what_resources_come_to(keys, device, mode, sleeps):
    placement = place(config(**keys), device)
    assert (placement.mode, placement.sleeps) == (mode, sleeps)


@pytest.mark.parametrize(
    ("keys", "device", "words"),
    [
        (
            {"mode": "split"},
            "cuda",
            r"mode=split: .* share GPU 0; the engine has 0 \(rollout.gpus=None, .* the trainer 0 .*mode=colocated",
        ),
        ({"mode": "split", "gpus": "2-3", "tensor_parallel": 2, "train_gpus": "0-3", "ranks": 4}, "cuda", "GPU 2, 3;"),
        (
            {"mode": "colocated", "gpus": "7", "train_gpus": "0-6", "ranks": 7},
            "cuda",
            r"mode=colocated: .* no GPU in common; the engine has 7 .* the trainer 0,1,2,3,4,5,6 .*mode=split",
        ),
        ({"sleep": "on", "staleness": 1}, "cuda", r"sleep=on: rollout.max_staleness=1 .* cannot while it sleeps; .*=0"),
        ({"mode": "colocated", "sleep": "on"}, "cpu", r"sleep=on: the CPU build of vLLM cannot sleep.*sleep=off"),
        ({"sleep": "on", "engine": "hf"}, "cuda", r"sleep=on: rollout.engine=hf cannot sleep"),
        ({"sleep": "on", "gpus": "1"}, "cuda", r"sleep=on: only a colocated engine sleeps"),
        ({"sleep": "on"}, "cpu", r"sleep=on: only a colocated engine sleeps"),
        ({"sleep": "on", "urls": ["http://a:1"]}, "cuda", r"sleep=on: engines that run elsewhere"),
        (
            {"mode": "split", "urls": ["http://a:1"]},
            "cuda",
            r"mode=split: resources.urls has engines that run elsewhere",
        ),
        ({"mode": "remote"}, "cuda", r"mode=remote: resources.urls is empty"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key_and_a_way_out(keys, device, words):
    with pytest.raises(ConfigError, match=words):
        place(config(**keys), device)


def test_each_side_takes_the_first_of_what_it_is_given():
    given = config(gpus="4-7", tensor_parallel=2, train_gpus="0-3", ranks=3)
    assert (engine_gpus(given), trainer_gpus(given)) == ([4, 5], [0, 1, 2])
    assert (engine_gpus(config(tensor_parallel=2)), trainer_gpus(config(ranks=3))) == ([0, 1], [0, 1, 2])


def test_a_switch_of_yaml_is_a_word():
    assert config(sleep=False).resources.sleep == "off" and config(sleep=True).resources.sleep == "on"
