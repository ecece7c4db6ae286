"""transformers' generate behind the Engine protocol, with a tiny model: seeds, log-probabilities, weights, busy time."""

import asyncio
import json
import shutil
import time
from types import SimpleNamespace

import msgspec
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastreason.errors import EngineError
from fastreason.exchange import write_weights
from fastreason.rollout.busy import BusyClock
from fastreason.rollout.hf import HfEngine
from fastreason.sync import save_model
from fastreason.types import SamplingParams, WeightUpdate

PROMPT = [5, 6, 7]
PARAMS = SamplingParams(n=4, temperature=0.7, max_new_tokens=12, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def engine(folder):
    made = HfEngine(str(folder), "float32", "cpu")
    asyncio.run(made.start())
    return made


def generate(made, params=PARAMS):
    return asyncio.run(made.generate("r", PROMPT, params))


def expected_logp(folder, token_ids, temperature):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits_TV = model(torch.tensor([PROMPT + token_ids])).logits[0, len(PROMPT) - 1 : -1]
    return (logits_TV / temperature).log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)


def check(folder, completions, temperature=0.7):
    for completion in completions:
        expected = expected_logp(folder, completion.token_ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logp).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_log_probabilities_are_those_of_the_sampled_tokens(folder):
    completions = generate(engine(folder))
    assert len(completions) == 4 and {c.finish_reason for c in completions} <= {"stop", "length"}
    for completion in completions:
        ids = completion.token_ids
        assert 1 not in ids[:-1], "a token after the end"
        assert (completion.finish_reason == "stop") == (ids[-1] == 1) and (len(ids) == 12 or ids[-1] == 1)
        assert completion.token_versions == [0] * len(ids)
    check(folder, completions)


def test_at_temperature_0_each_token_is_the_likeliest_whatever_the_seed(folder):
    made = engine(folder)
    greedy = msgspec.structs.replace(PARAMS, n=1, temperature=0.0)
    (first,), (second,) = (generate(made, msgspec.structs.replace(greedy, seed=seed)) for seed in (3, 4))
    assert first == second
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    likeliest = model(torch.tensor([PROMPT + first.token_ids])).logits[0, len(PROMPT) - 1 : -1].argmax(-1)
    assert first.token_ids == likeliest.tolist()
    check(folder, [first], temperature=1.0)


def test_sampling_defaults_of_the_model_do_not_change_the_distribution(folder, tmp_path):
    """The trainer knows nothing of a repetition penalty that stands in a model's own generation_config.json."""
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    keys = {"eos_token_id": 1, "pad_token_id": 0, "repetition_penalty": 1.5, "top_k": 3, "min_p": 0.2, "top_p": 0.5}
    (path / "generation_config.json").write_text(json.dumps({**keys, "do_sample": True, "no_repeat_ngram_size": 1}))
    check(path, generate(engine(path)))


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"eos_token_id": 1, "top_p": 0.5}, {"eos_token_id": [1, 8], "top_p": 0.5}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2, 8]}),
        ({"max_length": 9}, {"eos_token_id": [1, 8], "max_length": 9}),
        (None, {"eos_token_id": [1, 8], "bos_token_id": 1, "pad_token_id": 0}),
    ],
)
def test_a_saved_model_stops_at_the_end_that_it_was_trained_to_write(folder, tmp_path, own, expected):
    """A base model whose EOS, 1, is not its chat template's end of turn, 8: what it has learnt to write is 8."""
    start, target = tmp_path / "start", tmp_path / "run" / "model"
    shutil.copytree(folder, start)
    (start / "generation_config.json").unlink()
    if own is not None:
        (start / "generation_config.json").write_text(json.dumps(own))
    shapes = {name: p.shape for name, p in LlamaForCausalLM.from_pretrained(start).named_parameters()}
    weights = {name: torch.ones(shape) if "norm" in name else torch.zeros(shape) for name, shape in shapes.items()}
    weights["model.embed_tokens.weight"] += 1.0
    weights["model.embed_tokens.weight"][8] += 0.5  # the likeliest token after any other
    source = SimpleNamespace(rank=0, weights=lambda: iter(weights.items()))
    greedy = SamplingParams(n=1, temperature=0.0, max_new_tokens=6, seed=3)
    for end, found in ((None, ([8] * 6, "length")), (8, ([8], "stop"))):
        save_model(source, start, target, torch.float32, end)
        (completion,) = generate(engine(target), greedy)
        assert (completion.token_ids, completion.finish_reason) == found
    assert json.loads((target / "generation_config.json").read_text()) == expected
    assert (target / "config.json").read_bytes() == (start / "config.json").read_bytes()


def test_an_end_that_engines_know_changes_no_file_of_a_saved_model(folder, tmp_path):
    text = '{"eos_token_id":[1, 8]}'
    shutil.copytree(folder, tmp_path / "start")
    (tmp_path / "start" / "generation_config.json").write_text(text)
    source = SimpleNamespace(rank=0, weights=lambda: iter([("w", torch.zeros(1))]))
    save_model(source, tmp_path / "start", tmp_path / "model", torch.float32, 8)
    assert (tmp_path / "model" / "generation_config.json").read_text() == text


def test_a_seed_gives_the_same_again_and_another_something_else(folder):
    made = engine(folder)
    first = generate(made)
    assert generate(made) == first
    assert len({tuple(c.token_ids) for c in first}) > 1
    assert generate(made, SamplingParams(n=4, temperature=0.7, max_new_tokens=12, seed=4)) != first


def test_scores_are_log_probabilities_at_temperature_one(folder):
    scores = asyncio.run(engine(folder).score([*PROMPT, 8, 9]))
    assert scores[2:] == pytest.approx(expected_logp(folder, [8, 9], 1.0).tolist(), rel=1e-4)
    assert len(scores) == 4


def weights(folder, path, change=lambda named: None):
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    change(named)
    digest = write_weights(path, named)
    return WeightUpdate(path=str(path), version=2, checksum=digest.hexdigest(), num_bytes=digest.num_bytes)


def test_new_weights_are_held_and_stamped(folder, tmp_path):
    made = engine(folder)
    before = generate(made)
    update = weights(folder, tmp_path / "w.safetensors")
    report = asyncio.run(made.load_weights(update))
    assert (report.version, report.checksum, report.held_bytes) == (2, update.checksum, update.num_bytes)
    after = generate(made)
    assert after != before and {v for c in after for v in c.token_versions} == {2}


def test_weights_of_another_model_or_another_checksum_are_refused(folder, tmp_path):
    made = engine(folder)
    update = weights(folder, tmp_path / "w.safetensors", lambda named: named.update(other=torch.zeros(1)))
    with pytest.raises(EngineError, match=r"no parameters named \['other'\]"):
        asyncio.run(made.load_weights(update))
    update = weights(folder, tmp_path / "w.safetensors")
    weights(folder, tmp_path / "w.safetensors", lambda named: named["model.norm.weight"].add_(1))
    with pytest.raises(EngineError, match="checksum"):
        asyncio.run(made.load_weights(update))
    assert made.version == 0


def test_the_busy_clock_counts_overlapping_work_once():
    clock = BusyClock()
    assert clock.take() == 0.0
    started = time.perf_counter()
    with clock:
        time.sleep(0.02)
        with clock:
            time.sleep(0.02)
        first = clock.take()
        time.sleep(0.02)
    busy_s = time.perf_counter() - started
    time.sleep(0.05)
    second = clock.take()
    assert first >= 0.04 and second >= 0.02
    assert first + second <= busy_s, "overlapping work counted twice, or idle time counted"
    assert clock.take() == 0.0
