"""The drop-ins for verl's fused head against verl's own; its Triton function has no CPU path, so there only the signature."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Optional

import pytest
import torch
from fastreason_kernels import PolicyLossSpec, importance_weight
from fastreason_kernels.integrations import verl as drop_in
from fastreason_kernels.integrations.verl import FusedLinearForPPO, linear_cross_entropy
from fastreason_kernels.testing import assert_no_worse, head_case

verl = importlib.util.find_spec("verl")
if verl is None:
    pytest.skip("verl is not installed (bench.lock has it)", allow_module_level=True)


def load(path):
    """A module of verl by its file: verl/__init__.py imports ray."""
    file = Path(verl.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"verl_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs():
    return load("utils/experimental/torch_functional.py").FusedLinearForPPO


def run(function, case, dtype, *, shape, temperature=1.0, ids_dtype=torch.int64):
    fresh = case.to(dtype)
    hidden, ids = fresh.hidden.view(*shape, -1), case.ids.view(shape).to(ids_dtype)
    logp, entropy = function(hidden, fresh.weight, ids, temperature)
    factor = torch.linspace(-1, 2, ids.numel()).view(entropy.shape)
    loss = (logp * (factor if logp.dim() else 1.0)).sum() + 0.4 * (entropy.float() * factor.flip(0)).sum()
    return logp, entropy, *torch.autograd.grad(loss, (fresh.hidden, fresh.weight))


def eager(hidden, weight, ids, temperature):
    log_p = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return log_p.gather(-1, ids[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def names(parameters):
    return [(x.name, x.default) for x in parameters]


def test_signatures(theirs):
    for name in ("__init__", "forward"):
        ours, peer = (
            names(inspect.signature(getattr(c, name)).parameters.values()) for c in (FusedLinearForPPO, theirs)
        )
        assert ours == peer
    function = load("utils/kernel/linear_cross_entropy.py").LinearCrossEntropy.forward
    peer = names(inspect.signature(function).parameters.values())[1:]
    assert names(inspect.signature(linear_cross_entropy).parameters.values()) == peer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize(("shape", "temperature"), [((60,), 1.0), ((4, 15), 0.7)])
def test_values_and_gradients(theirs, shape, temperature, backend, dtype):
    # verl's own "liger" backend runs Triton only, so both of ours are judged by its "torch" one.
    case = head_case(60, 301, dtype=dtype)
    exact = run(eager, case, torch.float64, shape=shape, temperature=temperature)
    peer = run(theirs(chunk_size=16), case, dtype, shape=shape, temperature=temperature)
    ours = run(FusedLinearForPPO(16, backend), case, dtype, shape=shape, temperature=temperature, ids_dtype=torch.int32)
    for name, our, their, right in zip(("logp", "entropy", "hidden", "weight"), ours, peer, exact, strict=True):
        assert_no_worse(name, our, their, right, dtype=dtype)
    assert ours[0].dtype == peer[0].dtype == torch.float32


def their_weights():
    """verl's compute_rollout_correction_weights by its source: its module imports ray."""
    source = (Path(verl.submodule_search_locations[0]) / "trainer/ppo/rollout_corr_helper.py").read_text()
    wanted = {"SAFETY_BOUND", "_parse_rollout_is_threshold", "compute_rollout_correction_weights"}
    body = [
        node
        for node in ast.parse(source).body
        if {getattr(node, "name", ""), *(x.id for x in getattr(node, "targets", []) if isinstance(x, ast.Name))}
        & wanted
    ]
    means = SimpleNamespace(
        masked_sum=lambda x, mask, axis: (x * mask).sum(axis), masked_mean=lambda x, mask: (x * mask).sum() / mask.sum()
    )
    names = {"torch": torch, "Optional": Optional, "verl_F": means, "compute_is_metrics": lambda **_: {}}
    exec(compile(ast.Module(body, []), "rollout_corr_helper.py", "exec"), names)
    return names["compute_rollout_correction_weights"]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("threshold", [1.5, "0.5_1.5"])
def test_importance_weights_are_those_of_its_rollout_correction(level, threshold):
    generator = torch.Generator().manual_seed(0)
    log_ratio, mask = 0.4 * torch.randn(6, 9, generator=generator), torch.rand(6, 9, generator=generator) > 0.3
    mask[2] = False
    log_ratio[4, 0], mask[4, 0] = 30.0, True
    expected, _ = their_weights()(log_ratio, mask.float(), level, threshold)
    kind = {"importance": "truncate"} if threshold == 1.5 else {"importance": "mask", "importance_floor": 0.5}
    spec = PolicyLossSpec(**kind, importance_level=level, importance_cap=1.5)
    ids = torch.arange(6)[:, None].expand(6, 9).reshape(-1)
    options = {"sequence_ids": ids, "mask": mask.reshape(-1)}
    weight, bounded = importance_weight(log_ratio.reshape(-1), torch.zeros(54), spec, **options)
    torch.testing.assert_close(weight.view(6, 9)[mask], expected[mask])
    assert 0 < int(bounded[mask.reshape(-1)].sum()) < int(mask.sum())


def test_entropy_is_not_rounded_to_bf16(theirs):
    # verl returns the entropy in the dtype of the hidden states: at 5 nats bf16 has steps of 0.03. The inputs are exact
    # in bf16 here, so that the logits are too, and all that differs is that last rounding.
    weight = torch.zeros(301, 16, dtype=torch.bfloat16)
    hidden, ids = torch.zeros(4, 16, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64)
    exact = torch.tensor(301.0, dtype=torch.float64).log()
    assert (theirs()(hidden, weight, ids)[1].double() - exact).abs().min() > 4e-3
    assert (FusedLinearForPPO()(hidden, weight, ids)[1].double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "MEAN"])
def test_linear_cross_entropy_is_flat_and_reduces_log_probabilities(reduction):
    case = head_case(60, 301)

    def ours(hidden, weight, ids, temperature):
        return linear_cross_entropy(hidden, weight, ids, temperature, reduction)

    logp, entropy, *grads = run(ours, case, torch.float32, shape=(4, 15), temperature=0.7)
    exact_logp, exact_entropy = eager(case.hidden.double(), case.weight.double(), case.ids, 0.7)
    reduced = {"none": exact_logp, "sum": exact_logp.sum(), "mean": exact_logp.mean()}[reduction.lower()]
    torch.testing.assert_close(logp.double(), reduced, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().max() > 0.1 for gradient in grads)


RANKS = 2
RANK_PROGRAM = """
import sys, torch, torch.distributed as dist
from fastreason_kernels.integrations.verl import linear_cross_entropy
from fastreason_kernels.testing import head_case
folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
case = head_case(24, 60)
shard = case.weight.detach().chunk(ranks)[rank].requires_grad_()
logp, entropy = linear_cross_entropy(case.hidden, shard, case.ids, 0.7, "none", dist.group.WORLD)
loss = (logp * torch.linspace(-1, 2, 24)).sum() + 0.4 * entropy.sum()
torch.save((logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (case.hidden, shard))), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_vocabulary_shards(tmp_path):
    """Results equal on every rank; the gradient of hidden adds up over ranks, as verl's callers expect."""
    command = [sys.executable, "-P", "-c", RANK_PROGRAM, str(tmp_path)]
    started = [subprocess.Popen([*command, str(rank), str(RANKS)]) for rank in range(RANKS)]
    assert [process.wait(timeout=120) for process in started] == [0] * RANKS
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    case = head_case(24, 60)
    logp, entropy = eager(case.hidden, case.weight, case.ids, 0.7)
    loss = (logp * torch.linspace(-1, 2, 24)).sum() + 0.4 * entropy.sum()
    d_hidden, d_weight = torch.autograd.grad(loss, (case.hidden, case.weight))
    for part in parts:
        torch.testing.assert_close(part[:2], (logp.detach(), entropy.detach()))
    torch.testing.assert_close(sum(part[2] for part in parts), d_hidden)
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), d_weight)


def test_ignored_labels():
    case = head_case(6, 10)
    case.ids[2:4] = -100
    for logp, entropy in (
        FusedLinearForPPO()(case.hidden, case.weight, case.ids),
        linear_cross_entropy(case.hidden, case.weight, case.ids),
    ):
        assert logp[2:4].tolist() == entropy[2:4].tolist() == [0.0, 0.0] and (logp != 0).sum() == 4
        (gradient,) = torch.autograd.grad((logp + entropy).sum(), case.hidden)
        assert not gradient[2:4].any() and gradient[:2].any()


def test_chunk_size_bounds_the_chunk_unless_it_is_the_default(monkeypatch):
    seen = []
    real = drop_in.linear_logprob
    monkeypatch.setattr(
        drop_in, "linear_logprob", lambda *args, **kwargs: seen.append(kwargs["chunk_tokens"]) or real(*args, **kwargs)
    )
    case = head_case(4, 10)
    for head in (FusedLinearForPPO(), FusedLinearForPPO(3)):
        head(case.hidden, case.weight, case.ids)
    assert seen == [None, 3]


def test_errors():
    case = head_case(4, 10)
    with pytest.raises(ValueError, match=r"impl_backend: got 'triton', allowed: torch \| liger"):
        FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match=r"input_ids: shape \(2, 2\)"):
        FusedLinearForPPO()(case.hidden, case.weight, case.ids.view(2, 2))
    with pytest.raises(ValueError, match="temperature: got 1, allowed: a float"):
        linear_cross_entropy(case.hidden, case.weight, case.ids, 1)
    with pytest.raises(ValueError, match="reduction: got 'batch'"):
        linear_cross_entropy(case.hidden, case.weight, case.ids, 1.0, "batch")
