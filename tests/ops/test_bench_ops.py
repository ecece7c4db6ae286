"""bench/ops.py: what it writes, that it refuses a speed to a wrong result, and that its arithmetic is right."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "bench"
SHAPE = ["--shape", "24,16,211", "--rounds", "2"]
KEYS = {"op", "impl", "variant", "n", "h", "v", "dtype", "pass", "active", "median_ms", "extra_mb", "error", "error_ok"}


@pytest.fixture(scope="module")
def bench():
    """The bench's modules, found as the command finds them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("ops")
    finally:
        sys.path[:] = [entry for entry in sys.path if entry != str(FOLDER)]


def figures(bench, tmp_path, *arguments):
    path = tmp_path / "figures.json"
    status = bench.main([*SHAPE, "--no-memory", "--json", str(path), *arguments])
    return status, json.loads(path.read_text())


def test_command_in_its_own_process(tmp_path):
    path = tmp_path / "figures.json"
    arguments = ["--shape", "2048,16,8209", "--rounds", "1", "--threads", "1", "--dtype", "fp32"]
    arguments += ["--only", "cross_entropy", "--impl", "eager,fastreason", "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", str(FOLDER / "ops.py"), *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=560, env=environment)
    assert answer.returncode == 0, answer.stderr
    document = json.loads(path.read_text())
    head = document["head"]
    assert head["torch"] == torch.__version__ and head["threads"] == 1
    assert head["command"].startswith("python bench/ops.py --shape 2048,16,8209")
    assert {"device_name", "versions", "commit", "date"} <= head.keys()
    rows = {(row["impl"], row["pass"]): row for row in document["rows"]}
    assert rows.keys() == {(impl, name) for impl in ("eager", "fastreason") for name in ("fwd", "fwd_bwd")}
    for row in rows.values():
        assert row.keys() >= KEYS and row["error_ok"] and row["error"] < 1e-5 and row["median_ms"] > 0, row
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return
    logits_mb = 2048 * 8209 * 4 / 1e6
    # Eager holds the logits and their log-softmax, in backward the log-softmax and two gradients.
    assert 1.8 * logits_mb < rows["eager", "fwd"]["extra_mb"] < 2.4 * logits_mb
    assert 2.6 * logits_mb < rows["eager", "fwd_bwd"]["extra_mb"] < 3.6 * logits_mb


def test_every_peer_is_measured_or_named_with_its_reason(bench, tmp_path, capsys):
    status, document = figures(bench, tmp_path, "--dtype", "fp32")
    assert status == 0
    for op, builders in ((op, [name for name, ops in bench.REGISTRY.items() if op in ops]) for op in bench.OPS):
        timed = {row["impl"] for row in document["rows"] if row["op"] == op}
        named = {line["impl"] for line in document["skipped"] if line["op"] == op and line["reason"]}
        assert timed | named == set(builders)
        assert "eager" in timed and ("fastreason" in timed or op == "divergence")
    wrong = [(row["op"], row["impl"], row["broken"]) for row in document["rows"] if not row["error_ok"]]
    kinds = {(row["active"], row["frozen"]) for row in document["rows"] if row["op"] == "policy_loss"}
    assert kinds == {(1.0, False), (0.5, False), (1.0, True)}
    assert all(
        ("d_weight" in row["errors"]) == (row["pass"] == "fwd_bwd" and not row["frozen"]) for row in document["rows"]
    )
    assert not wrong
    assert "skipped: " in capsys.readouterr().out


def test_wrong_results_get_no_speed(bench, tmp_path, monkeypatch, capsys):
    def wrong_by(factor_of_loss, factor_of_gradient):
        def build(case, data, options):
            right = bench.REGISTRY["eager"][case.op](case, data, options)

            def call():
                loss = right()["loss"]
                return {"loss": (factor_of_loss - factor_of_gradient) * loss.detach() + factor_of_gradient * loss}

            return call

        return {"policy_loss": build}

    for name, factors in {"right": (1, 1), "wrong_loss": (1.02, 1), "wrong_gradient": (1, 1.02)}.items():
        monkeypatch.setitem(bench.REGISTRY, name, wrong_by(*factors))
    monkeypatch.setitem(bench.REGISTRY, "nan", wrong_by(float("nan"), 1))
    names = "eager,right,wrong_loss,wrong_gradient,nan"
    _, document = figures(bench, tmp_path, "--dtype", "fp32", "--only", "policy_loss", "--impl", names)
    found = {(row["impl"], row["pass"]): row for row in document["rows"] if row["active"] == 1 and not row["frozen"]}
    refused = {key for key, row in found.items() if not row["error_ok"]}
    assert refused == {
        ("wrong_loss", "fwd"),
        ("wrong_loss", "fwd_bwd"),
        ("wrong_gradient", "fwd_bwd"),
        ("nan", "fwd"),
        ("nan", "fwd_bwd"),
    }
    for key, row in found.items():
        assert (row["median_ms"] is None) == (row["x_eager"] is None) == (key in refused), key
    assert set(found["wrong_gradient", "fwd_bwd"]["broken"]) == {"d_hidden", "d_weight"}
    assert found["wrong_gradient", "fwd_bwd"]["error"] == pytest.approx(0.02, rel=0.01)
    assert "no speed, out of tolerance: loss 2.0e-02" in capsys.readouterr().out


def test_a_peer_that_fails_is_a_line_and_ours_an_exit_status(bench, tmp_path, monkeypatch):
    def build(case, data, options):
        raise_on_call = {"loss": lambda: 1 / 0}
        return lambda: raise_on_call["loss"]()

    for name, expected in {"trl": 0, "fastreason": 1}.items():
        with monkeypatch.context() as patch:
            patch.setitem(bench.REGISTRY, name, {"cross_entropy": build})
            names = f"eager,{name}"
            status, document = figures(bench, tmp_path, "--only", "cross_entropy", "--impl", names)
        assert status == expected
        assert {row["impl"] for row in document["rows"]} == {"eager"}
        reasons = {line["reason"] for line in document["skipped"] if line["impl"] == name}
        assert reasons == {"fwd: ZeroDivisionError: division by zero", "fwd_bwd: ZeroDivisionError: division by zero"}


def test_a_gradient_that_does_not_come_is_no_speed(bench, tmp_path, monkeypatch):
    def build(case, data, options):
        return lambda: {
            "loss": bench.REGISTRY["eager"][case.op](case, data, options)()["loss"].detach() + 0 * data.weight.sum()
        }

    monkeypatch.setitem(bench.REGISTRY, "cce", {"cross_entropy": build})
    _, document = figures(bench, tmp_path, "--only", "cross_entropy", "--impl", "eager,cce")
    assert [line["reason"] for line in document["skipped"]] == ["fwd_bwd: RuntimeError: cce returned no d_hidden"]


def test_ratios(bench):
    def row(impl, milliseconds):
        return {"impl": impl, "median_ms": milliseconds}

    rows = [row("eager", 12.0), row("fastreason", 3.0), row("trl", 6.0), row("liger", None)]
    bench.add_ratios(rows)
    assert [row["x_eager"] for row in rows] == [1.0, 4.0, 2.0, None]
    assert [row["x_peer"] for row in rows] == [0.5, 2.0, 1.0, None]
    assert {row["fastest_peer"] for row in rows} == {"trl"}
    alone = [row("fastreason", 3.0)]
    bench.add_ratios(alone)
    assert alone[0]["x_eager"] is None and alone[0]["x_peer"] is None and alone[0]["fastest_peer"] is None


@pytest.mark.parametrize("op", ["policy_loss", "logprob", "cross_entropy", "divergence"])
def test_exact_answer_is_autograd_in_float64(bench, op):
    cases = importlib.import_module("ops_cases")
    case = cases.Case(op, 30, 8, 151, "fp32", "cpu", half=op == "policy_loss")
    data = cases.for_case(cases.make_data(30, 8, 151, "fp32", "cpu"), case)
    exact = cases.exact_answer(case, data)
    hidden, weight = (x.detach().double().requires_grad_() for x in (data.hidden, data.weight))
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    logp, entropy = log_p.gather(1, data.ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    if op == "divergence":
        log_q = torch.log_softmax(data.teacher_hidden.double() @ data.teacher_weight.double().T, -1)
        loss = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    else:
        loss = cases.loss_of(op, logp, entropy, data)
    loss.backward()
    assert data.active() == (0.5 if op == "policy_loss" else 1.0)
    errors = exact.errors({"loss": loss, "logp": logp, "entropy": entropy}, hidden.grad, weight.grad)
    assert errors.keys() >= {"loss", "d_hidden", "d_weight"} and max(errors.values()) < 1e-9, errors
    assert {*range(151 - 64, 151), *data.ids.tolist()} == set(exact.columns.tolist())


def test_clipped_and_unclipped_tokens_are_both_in_the_data(bench):
    cases = importlib.import_module("ops_cases")
    data = cases.make_data(60, 8, 151, "bf16", "cpu")
    log_ratio = data.logp - data.behaviour_logp
    distance = torch.stack([(log_ratio - bound).abs() for bound in (torch.tensor(0.8).log(), torch.tensor(1.2).log())])
    assert distance.min() > 0.06  # what bf16 logits of this size can be wrong by
    outside = (log_ratio.exp() - 1).abs() > cases.CLIP
    assert 0.1 < float(outside.double().mean()) < 0.5 and {-0.7, 1.0} == {round(float(a), 3) for a in data.advantages}


def test_bad_arguments_are_explained(bench, capsys):
    for arguments, message in (
        (["--shape", "1,2"], "allowed: N,H,V"),
        (["--impl", "eager,wrong"], "['wrong'], allowed: fastreason, eager"),
    ):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    path = tmp_path / "picture.png"
    figures(bench, tmp_path, "--only", "cross_entropy", "--impl", "eager,fastreason", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
