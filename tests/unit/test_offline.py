"""An offline run's parts without its processes: the reference's scores that are kept, steps of epochs, memory of long rows."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fastreason.config import parse_config
from fastreason.errors import ConfigError
from fastreason.offline import read_reference, write_reference
from fastreason.offline_data import longest_sequence, with_steps

# One row of 19,800 tokens over a vocabulary of 49,152: its logits alone would be 3.6 GiB in fp32.
LONG_ROW = """
import resource
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fastreason.losses.preference import PairSpec
from fastreason.objectives import OBJECTIVES
from fastreason.packing import Row, micro_batches_of
from fastreason.policy import Policy

config = LlamaConfig(vocab_size=49152, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, max_position_embeddings=32768, tie_word_embeddings=True)
config._attn_implementation = "sdpa"
policy = Policy(LlamaForCausalLM(config)).train()

def step(length, spec):
    rows = [Row([1] * 8, [2] * (length - 8), [0.0] * (length - 8), 1.0, 1e-4), Row([1] * 8, [3] * 8, [0.0] * 8, -0.8, 0.1)]
    for batch in micro_batches_of(rows, "padded", 1, pairs=isinstance(spec, PairSpec)):
        assert batch.mask_B1LL is None
        policy(batch, spec, 1.0).loss_sum.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

specs = [OBJECTIVES["redi"].spec, OBJECTIVES["simpo"].spec]
before = [step(64, spec) for spec in specs][-1]
print(*[step(19800, spec) - before for spec in specs])
"""


def test_a_row_of_19800_tokens_needs_far_less_memory_than_its_logits():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", LONG_ROW]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    redi_gib, simpo_gib = map(float, done.stdout.split())
    assert 0 < redi_gib < 1.2 and simpo_gib < 1.2, done.stdout


def test_kept_scores_are_those_of_the_same_data_and_model(tmp_path):
    key = {"traces": "a", "model": "b", "dtype": "float32"}
    assert read_reference(tmp_path, key) is None
    scores = np.arange(6.0).reshape(3, 2)
    write_reference(tmp_path, scores, key)
    assert np.array_equal(read_reference(tmp_path, key), scores)
    for name in key:
        assert read_reference(tmp_path, {**key, name: "other"}) is None


def config_of(train, **offline):
    raw = {"model": {"path": "a/b"}, "train": {"prompts_per_step": 32, **train}}
    return parse_config(raw | {"offline": {"objective": "redi", "path": "x.jsonl", **offline}})


def test_epochs_say_how_many_steps_there_are():
    assert with_steps(config_of({}, epochs=1), 53175).train.steps == 1662  # 53,175 / 32, the last batch is smaller
    assert with_steps(config_of({}, epochs=0.5), 640).train.steps == 10
    assert with_steps(config_of({"steps": 7}, epochs=1), 640).train.steps == 7
    assert with_steps(config_of({"steps": 99}), 640).train.steps == 99, "without epochs it goes round"
    with pytest.raises(ConfigError, match=r"train\.steps=21: offline\.epochs=1 of 640 rows make only 20"):
        with_steps(config_of({"steps": 21}, epochs=1), 640)


def test_the_longest_row_is_what_the_model_can_take():
    assert longest_sequence(config_of({"steps": 1}), {"max_position_embeddings": 4096}) == 4096
    config = config_of({"steps": 1}, max_tokens=19800)
    with pytest.raises(ConfigError, match=r"offline\.max_tokens=19800 is more than .*=4096.*model\.rope_theta"):
        longest_sequence(config, {"max_position_embeddings": 4096})
    edited = config.model_copy(update={"model": config.model.model_copy(update={"max_position_embeddings": 32768})})
    assert longest_sequence(edited, {"max_position_embeddings": 4096}) == 19800
