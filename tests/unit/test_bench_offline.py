"""bench/offline.py: rows of data, how steps become a table, and that both sides get the same job. No trainer runs here."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from fastreason.config import load_config
from fastreason.data.traces import Trace
from fastreason.objectives import resolve_objective

FOLDER = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, found as the command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("offline")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(bench):
    return importlib.import_module("offline_rows")


@pytest.fixture(scope="module")
def trl(bench):
    return importlib.import_module("offline_trl") if importlib.util.find_spec("trl") else pytest.skip("no TRL")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder as FASTREASON_DATA names it."""
    monkeypatch.setenv("FASTREASON_DATA", str(tmp_path))
    solved = [{"problem": f"{i}?", "solution": f"so {i}"} for i in range(3)] + [{"problem": "4?", "response": "four"}]
    (tmp_path / "gsm8k_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solved))
    generated = [
        {"id": str(i), "problem": f"what is {i}?", "answer": str(i), "source": "x", "generations": [f"{i}", "no", f"={i}"],
         "correct": [False, i % 2 == 0, True]} for i in range(4)
    ]  # fmt: skip
    (tmp_path / "rollouts_qwen25math_math100x8.jsonl").write_text("".join(json.dumps(row) + "\n" for row in generated))
    return tmp_path


def part(rows, objective, trainer, seconds, tokens=4000, loss=2.0, **values):
    steps = [rows.Step(s, tokens, tokens // 2, loss - i / 10) for i, s in enumerate(seconds)]
    return rows.Part(objective, trainer, steps, values.pop("peak_mb", 1000.0), values.pop("wall_s", 60.0), **values)


def test_a_row_takes_the_median_over_all_rounds_without_the_first_steps(rows):
    parts = [
        part(rows, "sft", "trl_padded", [99, 30, 32]),
        part(rows, "sft", "ours", [99, 10, 12], peak_mb=900.0),
        part(rows, "sft", "trl_padded", [99, 34, 36], number=1),
        part(rows, "sft", "ours", [99, 14, 15], peak_mb=950.0, wall_s=80.0, number=1),
    ]
    theirs, ours = rows.rows_of(parts)
    assert (theirs["step_s"], theirs["num_steps"], theirs["peak_mb"]) == (33, 4, 1000.0)
    assert (ours["step_s"], ours["step_s_min"], ours["step_s_max"], ours["wall_s"]) == (13, 10, 15, 70)
    assert (ours["peak_mb"], ours["mb_of_trl"]) == (950.0, 0.95)
    assert ours["trained_tok_per_s"] == pytest.approx((4000 / 12 + 4000 / 14) / 2)
    assert ours["times_trl"] == pytest.approx(ours["trained_tok_per_s"] / theirs["trained_tok_per_s"])
    assert (ours["loss_first"], ours["loss_last"]) == (2.0, pytest.approx(1.8))
    assert (ours["target"], theirs["target"]) == (1.5, None)


def test_what_counts_is_trls_fastest_setting_with_the_same_objective(rows):
    parts = [
        part(rows, "sft", "trl_packed", [1, 20], peak_mb=500.0),
        part(rows, "sft", "trl_flat", [1, 10], peak_mb=2000.0),
        part(rows, "sft", "ours", [1, 5]),
        part(rows, "dpo", "trl_padded", [1, 2]),
        part(rows, "dpo", "ours", [1, 5]),
    ]
    found = {(row["objective"], row["trainer"]): row for row in rows.rows_of(parts)}
    assert found["sft", "ours"]["times_trl"] == pytest.approx(2.0)
    assert found["sft", "ours"]["mb_of_trl"] == pytest.approx(0.5)
    assert found["sft", "trl_packed"]["times_trl"] == pytest.approx(0.5)
    assert found["dpo", "ours"]["times_trl"] == pytest.approx(0.4)
    assert rows.rows_of([parts[2]])[0]["times_trl"] is None
    with pytest.raises(ValueError, match="--steps"):
        rows.rows_of([part(rows, "sft", "ours", [1])])


def test_other_work_is_refused(rows):
    ours = part(rows, "sft", "ours", [1, 2])
    rows.check_same_work([ours, part(rows, "sft", "trl_padded", [5, 6], loss=2.01), part(rows, "dpo", "ours", [1])])
    with pytest.raises(ValueError, match="sft: the trainers did not do the same work"):
        rows.check_same_work([ours, part(rows, "sft", "trl_padded", [5, 6], tokens=3998)])
    with pytest.raises(ValueError, match="same work"):
        rows.check_same_work([ours, part(rows, "sft", "trl_padded", [5, 6, 7])])
    other = part(rows, "sft", "trl_packed", [5, 6], loss=2.5)
    with pytest.raises(ValueError, match="same work"):
        rows.check_same_work([ours, other])
    packed = part(rows, "sft", "trl_packed", [5, 6], loss=2.5, same_rows=False)
    rows.check_same_work([ours, packed])
    rows.check_same_work([packed])


def test_a_long_text_is_as_long_as_allowed(rows):
    text = rows.words_that_fit(["a", "bc"], 7, lambda text: len(text.replace(" ", "")))
    assert text == "a bc a bc a", "a word more would be 9"
    assert rows.words_that_fit(["abc"], 2, len) == ""


def test_jobs_of_both_objectives_on_the_rows_of_the_named_files(bench, files, tmp_path):
    options = bench.parse_options(["--steps", "3", "train.lr=2e-5"])
    assert (options.objectives, options.trainers) == (["sft", "dpo"], list(bench.TRAINERS))
    sft = bench.write_rows("sft", tmp_path, options)
    written = [json.loads(line) for line in sft.read_text().splitlines()]
    assert [row["response"] for row in written] == ["so 0", "so 1", "so 2", "four"]
    dpo = bench.write_rows("dpo", tmp_path, options)
    pairs = {row["problem"]: row for row in map(json.loads, dpo.read_text().splitlines())}
    assert {(row["chosen"], row["rejected"]) for row in pairs.values()} == {
        ("no", "0"), ("=1", "1"), ("no", "2"), ("=3", "3"),
    }  # fmt: skip
    for name, path, batch in (("sft", sft, 8), ("dpo", dpo, 4)):
        config = bench.load_job(name, path, options)
        assert resolve_objective(config).pairs == (name == "dpo")
        assert (config.offline.path, config.train.prompts_per_step) == (str(path), batch)
        assert (config.train.steps, config.train.lr, config.offline.epochs) == (3, 2e-5, None)
        assert not config.model.gradient_checkpointing and config.model.dtype != "auto"
    given = bench.parse_options(["--pairs", str(dpo)])
    assert bench.write_rows("dpo", tmp_path, given) == dpo, "pairs are taken as they are"


def test_the_long_row_has_a_job_of_its_own(bench, files):
    options = bench.parse_options(["--long"])
    assert (options.long, options.objectives, options.trainers, options.steps) == (19800, ["sft"], ["ours"], 2)
    config = bench.load_job("sft", Path("x.jsonl"), options)
    assert (config.offline.max_tokens, config.model.max_position_embeddings) == (19800, 19800)
    assert config.model.gradient_checkpointing and config.train.prompts_per_step == 1
    assert bench.parse_options(["--long", "900", "--trainers", "ours,trl_padded"]).long == 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainers", "trl"], "there is no trl; there are trl_packed"),
        (["--objectives", "ppo"], "there is no ppo"),
        (["--sft", "nowhere.jsonl"], "nowhere.jsonl: no such file. .*FASTREASON_DATA"),
    ],
)
def test_a_wrong_command_line_says_what_to_do(bench, files, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench.parse_options(arguments)
    assert re.search(message, capsys.readouterr().err)


def trace(prompt, *responses):
    return Trace("0", [7] * prompt, [[8] * length for length in responses], None, 1.0)


def test_trl_trains_the_tokens_that_ours_trains(trl):
    columns = trl.sft_columns(trace(3, 2))
    assert columns == {"input_ids": [7, 7, 7, 8, 8], "labels": [-100, -100, -100, 8, 8]}
    assert trl.dpo_columns(trace(1, 2, 3)) == {"prompt_ids": [7], "chosen_ids": [8] * 2, "rejected_ids": [8] * 3}
    assert trl.num_tokens(trace(3, 2, 5)) == 8


def test_packs_are_as_short_as_so_many_can_be(trl):
    lengths = [9, 8, 7, 6, 5, 5]
    assert trl.num_packs(lengths, 10) == 5 and trl.num_packs(lengths, 20) == 3
    length = trl.pack_length(lengths, 3, trl.num_packs)
    assert trl.num_packs(lengths, length) <= 3 < trl.num_packs(lengths, length - 1)
    assert trl.pack_length(lengths, 99, trl.num_packs) == 9, "no row is cut"


def test_the_layouts_of_trl_have_the_batch_of_the_job(trl):
    updates = [[trace(3, 7)] * 4] * 5
    packed = trl.sft_layout("packed", updates, 2, 25)
    assert packed["packing"] and packed["packing_strategy"] == "bfd"
    assert (packed["per_device_train_batch_size"], packed["gradient_accumulation_steps"]) == (1, 2)
    assert packed["max_length"] == 20, "40 tokens an update are two packs, each of two rows"
    for setting in ("flat", "padded"):
        laid = trl.sft_layout(setting, updates, 2, 25)
        assert laid["padding_free"] == (setting == "flat") and laid["max_length"] is None
        assert (laid["per_device_train_batch_size"], laid["gradient_accumulation_steps"]) == (2, 2)
    with pytest.raises(SystemExit, match="--trl-micro-batch 3 does not divide the 4"):
        trl.sft_layout("padded", updates, 3, 25)


def test_trl_is_given_the_configs_optimizer(trl, bench):
    arguments = importlib.import_module("trl_arguments").training_arguments
    job = load_config(bench.JOB, ["train.lr=2e-5", "train.adam_beta2=0.95", "train.steps=3", "model.dtype=bfloat16"])
    config = trl.SFTConfig(**arguments(job, "unused", "sdpa", cuda=False))
    assert (config.learning_rate, config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (2e-5, 0.9, 0.95, 1e-8)
    assert (config.max_grad_norm, config.weight_decay, config.max_steps) == (1.0, 0.0, 3)
    assert (config.bf16, config.use_cpu, config.gradient_checkpointing) == (True, True, False)
    fp32 = load_config(bench.JOB, ["model.dtype=float32"])
    assert not trl.SFTConfig(**arguments(fp32, "unused", "sdpa", cuda=False)).bf16


def test_trl_counts_rows_without_their_padding(trl):
    import torch

    class Base:
        def training_step(self, model, inputs, *rest):
            return "loss"

    class Counter(trl.Counted, Base):
        pass

    counter = Counter()
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 1, 1], [-100, 1, -100, -100]])
    assert counter.training_step(None, {"input_ids": ids, "attention_mask": mask, "labels": labels}) == "loss"
    assert (counter.tokens, counter.tokens_in_loss) == (6, 3)
    counter.training_step(None, {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()})
    assert (counter.tokens, counter.tokens_in_loss) == (12, 6)
    counter.training_step(None, {"input_ids": ids[:1], "labels": labels[:1]})  # in one line: nothing is padding
    assert (counter.tokens, counter.tokens_in_loss) == (16, 8)
