"""bench/train.py: what its clock counts where, and the line that it makes of a case's updates."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_train", ROOT / "bench" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Slow(torch.nn.Module):
    """Takes so many seconds of a clock that stands still otherwise."""

    def __init__(self, now, seconds):
        super().__init__()
        self.now, self.seconds = now, seconds

    def forward(self, x):
        self.now[0] += self.seconds
        return x


def test_the_clock_counts_each_phase_once(bench, monkeypatch):
    now = [0.0]

    def takes(seconds):
        now[0] += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    policy = SimpleNamespace(model=SimpleNamespace(base_model=Slow(now, 3.0)), head=Slow(now, 2.0))
    engine = SimpleNamespace(backward=lambda loss: takes(loss), step=lambda: takes(1.0))
    clock = bench.Clock(policy, engine, lambda: None)
    with clock.update():
        policy.head(policy.model.base_model(0))
    with clock.update() as found:
        for _ in range(2):
            takes(0.25)
            policy.head(policy.model.base_model(0))
            engine.backward(4.0)
        engine.step()
    assert found == {"body": 6.0, "head": 4.0, "backward": 8.0, "optimizer": 1.0, "rest": 0.5, "total": 19.5}


def test_a_line_holds_medians_shares_and_the_mfu(bench):
    def update(total):
        return {"body": 0.2 * total, "head": 0.1 * total, "backward": 0.5 * total, "optimizer": 0.1 * total} | {
            "rest": 0.1 * total,
            "total": total,
        }

    case = bench.Case("shared", 2, 14, 2048)
    rows = [
        {"tokens": 100, "micro_batches": 2, "flops": 6e9, "peak_flops": 1e10, "peak_mb": peak, "updates": updates}
        for peak, updates in ((5.0, [update(1.0), update(2.0)]), (7.0, [update(4.0)]))
    ]
    line = bench.summarise(case, rows)
    assert (line["median_s"], line["min_s"], line["max_s"], line["peak_mb"]) == (2.0, 1.0, 4.0, 7.0)
    assert line["tok_per_s"] == 50 and line["mfu"] == pytest.approx(0.3)
    assert line["shares"] == pytest.approx({"body": 0.2, "head": 0.1, "backward": 0.5, "optimizer": 0.1, "rest": 0.1})


@pytest.mark.parametrize(("layout", "tokens"), [("shared", 2 * (5 + 3 * 4)), ("padded", 6 * 9)])
def test_the_batches_hold_what_the_workload_counts(bench, layout, tokens):
    options = bench.parse(["--groups", "2", "--samples", "3", "--prompt", "5"])
    case = bench.Case(layout, 2, 4, 20)
    batches = bench.synthetic_batches(options, case, 50)
    work = bench.workload(options, case)
    assert sum(batch.num_tokens for batch in batches) == tokens == work.trained_tokens
    assert sum(len(batch.ids_N) for batch in batches) == 24 == work.response_tokens
