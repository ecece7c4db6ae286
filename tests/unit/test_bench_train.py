"""bench/train.py: what its clock counts where, the line that it makes of updates, and that TRL does the same work as ours."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastreason.update
from fastreason.config import Config, ModelConfig, TrainConfig
from fastreason.plan.shapes import Shape

FOLDER = Path(__file__).resolve().parents[2] / "bench"
ROWS = ["--groups", "2", "--samples", "3", "--prompt", "5"]
TINY = Shape("tiny", num_layers=2, hidden=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp=48, vocab=61, tied=True)


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, found as the command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("train")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def clocks(bench):
    return importlib.import_module("train_clock")


@pytest.fixture(scope="module")
def trl(bench):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: make bench-setup")
    return importlib.import_module("train_trl")


def config_of(steps=2, **model):
    """As bench/train.py makes it."""
    keys = {"path": "unused", "dtype": "float32"} | model
    return Config(model=ModelConfig(**keys), train=TrainConfig(steps=steps, prompts_per_step=2, lr=1e-6))


class Slow(torch.nn.Module):
    """Takes so many seconds of a clock that stands still otherwise."""

    def __init__(self, now, seconds):
        super().__init__()
        self.now, self.seconds = now, seconds

    def forward(self, x):
        self.now[0] += self.seconds
        return x


def test_the_clock_counts_each_phase_once(bench, clocks, monkeypatch):
    now, waits, firsts = [0.0], [], []

    def takes(seconds):
        now[0] += seconds

    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    policy = SimpleNamespace(model=SimpleNamespace(base_model=Slow(now, 3.0)), head=Slow(now, 2.0))
    engine = SimpleNamespace(backward=lambda loss: takes(loss), step=lambda: takes(1.0))
    clock = clocks.Clock(lambda: waits.append(now[0]), lambda: firsts.append(now[0]))
    bench.watch(clock, policy, engine)
    clock.start()
    policy.head(policy.model.base_model(0))
    clock.stop()
    takes(7.0)
    clock.start()
    for _ in range(2):
        takes(0.25)
        policy.head(policy.model.base_model(0))
        engine.backward(4.0)
    engine.step()
    clock.stop()
    assert clock.updates == [
        {"body": 3.0, "head": 2.0, "backward": 0.0, "optimizer": 0.0, "rest": 0.0, "total": 5.0},
        {"body": 6.0, "head": 4.0, "backward": 8.0, "optimizer": 1.0, "rest": 0.5, "total": 19.5},
    ]
    assert firsts == [5.0]
    assert waits[:6] == [0.0, 0.0, 3.0, 3.0, 5.0, 5.0], "the device is waited for at each border"


def updates_of(*totals):
    shares = {"body": 0.2, "head": 0.1, "backward": 0.5, "optimizer": 0.1, "rest": 0.1}
    return [{"total": total, **{name: share * total for name, share in shares.items()}} for total in totals]


def test_a_line_holds_medians_shares_and_the_mfu(bench, capsys):
    case = bench.Case("trl", "padded", None, 14, 2048)
    same = {"tokens": 100, "micro_batches": 2, "flops": 6e9, "peak_flops": 1e10, "loss": 0.5, "grad_norm": 3.0}
    rows = [
        {**same, "peak_mb": 5.0, "updates": updates_of(1.0, 2.0)},
        {**same, "peak_mb": 7.0, "updates": updates_of(4.0)},
    ]
    line = bench.summarise(case, rows)
    assert (line["trainer"], line["zero"], line["loss"], line["grad_norm"]) == ("trl", None, 0.5, 3.0)
    assert (line["median_s"], line["min_s"], line["max_s"], line["peak_mb"]) == (2.0, 1.0, 4.0, 7.0)
    assert line["tok_per_s"] == 50 and line["mfu"] == pytest.approx(0.3)
    assert line["shares"] == pytest.approx({"body": 0.2, "head": 0.1, "backward": 0.5, "optimizer": 0.1, "rest": 0.1})
    bench.print_summary(line)
    assert capsys.readouterr().out == (
        "trl, padded, response 14, budget 2048: 100 tokens, median 2.00 s (1.00 to 4.00), 50 tok/s, MFU 30%, 7 MB; "
        "body 20% head 10% backward 50% optimizer 10% rest 10%\n"
    )


def test_trl_has_one_case_per_length_and_budget_next_to_ours(bench):
    assert {case.trainer for case in bench.cases_of(bench.parse([]))} == {"ours"}
    options = bench.parse(["--layout", "shared", "--zero", "1", "2", "--response", "4", "8"])
    options.trainers = ["ours", "trl"]  # also where TRL is not installed
    assert [case.label for case in bench.cases_of(options)] == [
        "ours, shared, ZeRO-1, response 4, budget 2048",
        "ours, shared, ZeRO-2, response 4, budget 2048",
        "trl, padded, response 4, budget 2048",
        "ours, shared, ZeRO-1, response 8, budget 2048",
        "ours, shared, ZeRO-2, response 8, budget 2048",
        "trl, padded, response 8, budget 2048",
    ]


def test_a_missing_trl_is_said_before_anything_runs(bench, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.parse(["--trainers", "ours"]).trainers == ["ours"]
    with pytest.raises(SystemExit, match="--trainers trl: TRL is not installed; `make bench-setup`"):
        bench.parse(["--trainers", "ours", "trl"])


def test_trl_trains_as_the_only_process(bench):
    assert "LOCAL_RANK" in bench.environment_of(bench.Case("ours", "padded", 2, 4, 20), 0)
    assert "LOCAL_RANK" not in bench.environment_of(bench.Case("trl", "padded", None, 4, 20), 0)


@pytest.mark.parametrize(("layout", "tokens"), [("shared", 2 * (5 + 3 * 4)), ("padded", 6 * 9)])
def test_the_batches_hold_what_the_workload_counts(bench, layout, tokens):
    options = bench.parse(ROWS)
    case = bench.Case("ours", layout, 2, 4, 20)
    batches = bench.synthetic_batches(options, case, 50)
    work = bench.workload(options, case)
    assert sum(batch.num_tokens for batch in batches) == tokens == work.trained_tokens
    assert sum(len(batch.ids_N) for batch in batches) == 24 == work.response_tokens


def test_trl_gets_the_rows_of_ours(bench, trl):
    # 9 tokens a row: 36 hold four of the six.
    batches = bench.synthetic_batches(bench.parse(ROWS), bench.Case("trl", "padded", None, 4, 36), 50)
    given = trl.inputs_of(batches, 5)
    assert [len(inputs["prompt_ids"]) for inputs in given] == [4, 2]
    torch.manual_seed(0)
    row = 0
    for _ in range(2):
        prompt = torch.randint(3, 50, (5,)).tolist()
        for number in range(3):
            response = torch.randint(3, 50, (4,)).tolist()
            inputs, at = given[row // 4], row % 4
            assert inputs["prompt_ids"][at].tolist() == prompt and inputs["completion_ids"][at].tolist() == response
            assert inputs["advantages"][at] == (-1.0) ** number
            row += 1
    for inputs, batch in zip(given, batches, strict=True):
        assert inputs["num_items_in_batch"] == 24, "of the whole update"
        assert torch.equal(inputs["sampling_per_token_logps"], torch.full((batch.num_rows, 4), -7.0))
        assert inputs["prompt_mask"].shape == (batch.num_rows, 5) and inputs["prompt_mask"].all()
        assert inputs["completion_mask"].shape == (batch.num_rows, 4) and inputs["completion_mask"].all()
        assert "old_per_token_logps" not in inputs, "the ratio is that to the current policy, as in ours"


def test_trl_is_given_the_settings_of_ours(trl):
    config = trl.grpo_config(config_of(3, dtype="bfloat16"), 5, "eager", False, "unused")
    assert (config.bf16, config.use_cpu, config.optim) == (True, True, "adamw_torch_fused")
    assert (config.gradient_accumulation_steps, config.steps_per_generation, config.max_steps) == (5, 5, 3)
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert (config.epsilon, config.epsilon_high, config.beta, config.num_iterations) == (0.2, 0.2, 0.0, 1)
    assert (config.loss_type, config.temperature, config.entropy_coef) == ("dapo", 1.0, 0.0)
    assert config.model_init_kwargs == {"attn_implementation": "eager"} and not config.gradient_checkpointing
    stored = trl.grpo_config(config_of(gradient_checkpointing=True), 5, "sdpa", False, "unused")
    assert stored.gradient_checkpointing and not stored.bf16


class PlainUpdater:
    """Ours without DeepSpeed: the gradient of the policy's own loss, and no step."""

    def __init__(self, policy, train, dtype, num_updates):
        self.policy = policy
        self.engine = SimpleNamespace(backward=torch.Tensor.backward, step=lambda: None)

    def update(self, batches, spec, temperature, denominator):
        losses = [self.policy(batch, spec, temperature).loss_sum / denominator for batch in batches]
        for loss in losses:
            self.engine.backward(loss)
        norm = torch.nn.utils.get_total_norm([each.grad for each in self.policy.parameters()])
        self.policy.zero_grad()
        return SimpleNamespace(loss=float(sum(losses).detach()), grad_norm=float(norm))


def test_both_trainers_do_the_same_work(bench, clocks, trl, monkeypatch):
    stub = SimpleNamespace(initialise_distributed=lambda device: None, DeepSpeedUpdater=PlainUpdater)
    monkeypatch.setitem(sys.modules, "fastreason.update.deepspeed", stub)
    monkeypatch.setattr(fastreason.update, "deepspeed", stub, raising=False)
    monkeypatch.setenv("CI", "1")  # TRL sends no telemetry then
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    options = bench.parse(ROWS)
    options.shape = "tiny"
    batches = bench.synthetic_batches(options, bench.Case("trl", "padded", None, 4, 36), TINY.vocab)
    found = {}
    for name, run in (("ours", bench.run_ours), ("trl", bench.run_trl)):
        clock = clocks.Clock()
        torch.manual_seed(0)  # the same weights
        found[name] = run(options, config_of(steps=2), TINY, batches, clock)
        assert len(clock.updates) == 2
        for update in clock.updates:
            phases = ("body", "head", "backward") if name == "ours" else clocks.PHASES
            assert all(update[phase] > 0 for phase in phases)
            assert sum(update[phase] for phase in clocks.PHASES) == pytest.approx(update["total"])
    # Two thirds of the rows have advantage 1, one third -1: a loss of 0 would be equal to anything's.
    assert found["ours"] == pytest.approx((-1 / 3, found["ours"][1]), rel=1e-5) and found["ours"][1] > 0.01
    assert found["trl"] == pytest.approx(found["ours"], rel=1e-5)
