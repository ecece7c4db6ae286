"""A head whose vocabulary is split over ranks: real gloo groups, in processes of its own.

This file is also the program of those processes (`python test_shards.py FOLDER RANK`): each rank writes what it computed
to FOLDER/<rank>.pt, and the tests judge it. Every wait has a limit.
"""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastreason_kernels import LoraHead, PolicyLossSpec, linear_logprob, linear_policy_loss
from fastreason_kernels.testing import assert_no_worse, head_case

WORLD, NUM_TOKENS, VOCAB, WIDTH, RANK = 3, 30, 54, 16, 3
# Members of each group: all ranks, and two pairs, in the last of which a member's rank differs from its global rank.
GROUPS = {"world": [0, 1, 2], "first two": [0, 1], "last two": [1, 2]}
TIMEOUT_S = 540

LEAVES = ("hidden", "weight", "bias", "lora_a", "lora_b")
SPLIT = ("weight", "bias", "lora_b")
PPO = PolicyLossSpec(dual_clip=3.0, kl="k3", kl_coef=0.1, entropy_coef=0.1, importance="mask")
WEIGHED = PolicyLossSpec(importance="truncate", importance_level="sequence", importance_cap=1e4)
FP32, BF16 = torch.float32, torch.bfloat16
# (dtype, which leaves, policy spec or None, what else the operation is given); a tensor's name stands for the tensor.
CASES = {
    "plain": (FP32, "", None, {}),
    "bf16": (BF16, "", None, {}),
    "no entropy": (FP32, "", None, {"entropy_grad": False}),
    "everything": (FP32, "bias lora", None, {"temperature": "temperature", "softcap": 5.0, "chunk_tokens": 7}),
    "everything in bf16": (BF16, "bias lora", None, {"temperature": "temperature", "logits": "fp32"}),
    "columns": (FP32, "", None, {"chunk_tokens": 7, "chunk_vocab": 5}),
    "ignored": (FP32, "", None, {"ignore_index": -100}),
    "an empty shard": (FP32, "bias removed", None, {}),
    "frozen head": (FP32, "frozen_head bias", None, {}),
    "frozen body": (FP32, "frozen_body lora", None, {}),
    "compiled": (FP32, "bias compiled", None, {}),
    "ppo": (FP32, "", PPO, {"mask": "mask"}),
    "active": (FP32, "frozen_head", PolicyLossSpec(), {"mask": "mask", "statistics": "active"}),
    "ppo in bf16": (BF16, "bias", PolicyLossSpec(clip_low=None, clip_high=None, entropy_coef=0.1), {"mask": "mask"}),
    "sequence": (FP32, "lora bias", PolicyLossSpec(ratio="sequence"), {"mask": "mask"}),
    "on-policy": (FP32, "", PolicyLossSpec(ratio="sequence", entropy_coef=0.1), {"behaviour_logp": None}),
    "weighed": (FP32, "bias", WEIGHED, {"mask": "mask"}),
    "weighed on-policy": (FP32, "", WEIGHED, {"mask": "mask", "behaviour_logp": None}),
    "nothing active": (FP32, "", PolicyLossSpec(), {"mask": "nothing"}),
    "ppo with an empty shard": (FP32, "bias removed", PPO, {"mask": "mask"}),
    "compiled ppo": (FP32, "compiled", PPO, {"mask": "mask"}),
}

# ---------------------------------------------------------------------------------------------------------------------
# What ranks and tests share


def inputs(name, dtype):
    """Whole leaves and columns of a case; the leaves are the same bf16 numbers in every dtype."""
    _, words, _, options = CASES[name]
    words = words.split()
    case = head_case(NUM_TOKENS, VOCAB, width=WIDTH, dtype=BF16)
    generator = torch.Generator().manual_seed(1)
    bias, ids = case.bias.detach().clone(), case.ids
    if "removed" in words:
        # Nothing is left of the last shard of any group, nor of a part of the one before it.
        kept = VOCAB // 2 - 4
        bias[kept:] = -torch.inf
        ids = ids % kept
    whole = {"hidden": case.hidden, "weight": case.weight}
    whole |= {"bias": bias} if "bias" in words else {}
    if "lora" in words:
        pair = {"lora_a": (RANK, WIDTH), "lora_b": (VOCAB, RANK)}
        whole |= {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in pair.items()}
    frozen = {"hidden"} if "frozen_body" in words else whole.keys() - {"hidden"} if "frozen_head" in words else set()

    def leaves(kind):
        return {key: x.detach().to(kind, copy=True).requires_grad_(key not in frozen) for key, x in whole.items()}

    rows = torch.arange(NUM_TOKENS)
    x = {
        "mask": rows % 5 > 0,
        "nothing": rows < 0,
        "temperature": case.temperature,
        "sequence_ids": rows // 7,
        "ids": ids,
    }
    # Ratios of 1, 0.6 and 1.6 stay far from the bounds 0.8 and 1.2.
    exact = {key: value for key, value in options.items() if key in ("softcap", "temperature")}
    with torch.no_grad():
        logp = compute({**x, **leaves(torch.float64)}, None, {**exact, "impl": "reference"})["logp"]
    x["advantages"] = torch.randn(NUM_TOKENS, generator=generator) * (rows % 4 > 0)
    x["token_weight"] = torch.rand(NUM_TOKENS, generator=generator) + 0.2
    x["behaviour_logp"] = (logp + torch.tensor([0.0, 0.5, -0.5])[rows % 3]).float()
    x["ref_logp"], x["sampler_logp"] = (logp + 0.3).float(), (x["behaviour_logp"] - torch.tensor([0.4, 1.2])[rows % 2])
    if "ignore_index" in options:
        x["ids"] = ids.masked_fill(~x["mask"], -100)
    return {**x, **leaves(dtype)}


def compute(x, spec, options):
    """The operation's tensors by name; "loss" is what the gradients are of."""
    options = {key: x[value] if isinstance(value, str) and value in x else value for key, value in options.items()}
    options["bias"] = x.get("bias")
    if "lora_a" in x:
        options["lora"] = LoraHead(x["lora_a"], x["lora_b"], 0.5)
    if spec is None:
        logp, entropy, lse = linear_logprob(x["hidden"], x["weight"], x["ids"], **options)
        loss = 0 if "advantages" not in x else (x["advantages"] * logp).sum() + (x["token_weight"] * entropy).sum()
        return {"loss": loss, "logp": logp, "entropy": entropy, "lse": lse}
    columns = {key: x[key] for key in ("behaviour_logp", "ref_logp", "sampler_logp", "token_weight", "sequence_ids")}
    out = linear_policy_loss(x["hidden"], x["weight"], x["ids"], x["advantages"], spec, **{**columns, **options})
    return {"loss": out.loss_sum, **dict(zip(out._fields[1:], out[1:], strict=True))}


def measure(x, spec, options, *, compiled=False):
    """The tensors, and the gradients of three times the loss with respect to every leaf that wants one."""
    function = torch.compile(compute, fullgraph=True, backend="aot_eager") if compiled else compute
    values = function(x, spec, options)
    leaves = {key: x[key] for key in LEAVES if key in x and x[key].requires_grad}
    grads = torch.autograd.grad(3 * values["loss"], list(leaves.values()))
    return {**values, **{f"d_{key}": grad for key, grad in zip(leaves, grads, strict=True)}}


# ---------------------------------------------------------------------------------------------------------------------
# The program of a rank


def shard(x, index, count):
    """This rank's leaves: rows index * V / count onward of what is split, the rest whole."""
    found = dict(x)
    for key in SPLIT:
        if key in x:
            found[key] = x[key].detach().chunk(count)[index].clone().requires_grad_(x[key].requires_grad)
    return found


def uneven(group, index):
    """The error of a vocabulary of 50 over 3 ranks, split as torch.chunk does."""
    case = head_case(4, 50)
    try:
        linear_logprob(case.hidden, case.weight.detach().chunk(3)[index], case.ids % 48, group=group)
    except ValueError as error:
        return str(error)
    return "no error"


def main(folder, rank):
    import torch.distributed as dist

    torch.set_num_threads(1)
    init = {"init_method": f"file://{folder}/store", "rank": int(rank), "world_size": WORLD}
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S / 3), **init)
    found = {}
    for group_name, members in GROUPS.items():
        group = dist.group.WORLD if len(members) == WORLD else dist.new_group(members)
        if int(rank) not in members:
            continue
        index = members.index(int(rank))
        for name, (dtype, words, spec, options) in CASES.items():
            x = shard(inputs(name, dtype), index, len(members))
            options = {**options, "group": group}
            # One group is enough for the compiler, which is the slow part.
            compiled = "compiled" in words and group_name == "last two"
            found[group_name, name] = [measure(x, spec, options), measure(x, spec, options, compiled=compiled)]
    found["uneven"] = uneven(dist.group.WORLD, int(rank))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a finished process alive


# ---------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found; nothing of the processes is left running."""
    folder = tmp_path_factory.mktemp("ranks")
    processes, logs = [], [folder / f"{rank}.txt" for rank in range(WORLD)]
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for rank, log in enumerate(logs):
            with open(log, "wb") as output:
                command = [sys.executable, __file__, str(folder), str(rank)]
                env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["out of time"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert codes == [0] * WORLD, f"exit codes {codes}:\n{text}"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def same_bits(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("group", GROUPS)
def test_shards_are_the_whole(ranks, group, name):
    dtype, _, spec, options = CASES[name]
    found = [ranks[member][group, name][0] for member in GROUPS[group]]
    eager, exact = (
        measure(inputs(name, kind), spec, {**options, "impl": "reference"}) for kind in (dtype, torch.float64)
    )
    assert found[0].keys() == exact.keys()
    if options.get("statistics") == "active":
        # The reference skips nothing.
        whole = inputs(name, dtype)
        exact["computed"] = whole["mask"] & (whole["advantages"] != 0)
        for key in ("logp", "entropy", "kl", "ratio"):
            exact[key] = exact[key].masked_fill(~exact["computed"], torch.nan)
    for key, expected in exact.items():
        if key.removeprefix("d_") in SPLIT:
            actual = torch.cat([each[key] for each in found])
        else:
            actual = found[0][key]
            assert all(same_bits(actual, each[key]) for each in found[1:]), f"{key} differs between ranks"
        known = ~expected.isnan()
        assert torch.equal(known, ~actual.isnan()), key
        if not actual.is_floating_point():
            assert torch.equal(actual, expected), key
            continue
        # Terms of the sum cancel: its rounding is measured against their size.
        atol = (4e-3 if dtype == BF16 else 2e-6) * NUM_TOKENS * 3 if key == "loss" else None
        assert_no_worse(key, actual[known], eager[key][known], expected[known], dtype=dtype, atol=atol)


@pytest.mark.parametrize("group", GROUPS)
def test_a_second_run_has_the_same_bits(ranks, group):
    """Also through the compiler, for the cases that say so."""
    for name in CASES:
        for member in GROUPS[group]:
            first, second = ranks[member][group, name]
            for key, value in first.items():
                assert same_bits(value, second[key]), (name, key)


def test_the_cases_reach_every_shard(ranks):
    """Without these the comparisons above would prove less than they say."""
    ids, mask = inputs("plain", FP32)["ids"], inputs("ppo", FP32)["mask"]
    assert set((ids // (VOCAB // 3)).tolist()) == {0, 1, 2}
    ppo, active = (ranks[0]["world", name][0] for name in ("ppo", "active"))
    assert ppo["clipped"].any() and torch.equal(ppo["computed"], mask) and (ppo["ratio"][mask] > 1.5).any()
    assert active["computed"].any() and (mask & ~active["computed"]).any()
    removed = inputs("an empty shard", FP32)["bias"].chunk(3)
    assert removed[2].isinf().all() and removed[1].isinf().any() and not removed[1].isinf().all()
    assert not ranks[2]["world", "an empty shard"][0]["d_weight"].any()
    assert not any(ranks[0]["world", "nothing active"][0][key].any() for key in ("d_hidden", "d_weight"))


def test_uneven_shards_are_refused(ranks):
    for found in ranks:
        assert "weight: shards of [17, 17, 16] rows" in found["uneven"]


def test_what_a_group_cannot_be_combined_with():
    case, group = head_case(4, 10), SimpleNamespace(group_name="none")
    arguments = (case.hidden, case.weight.detach(), case.ids)
    with pytest.raises(ValueError, match="strategy: got 'F', allowed: 'B'"):
        linear_logprob(*arguments, group=group, strategy="F")
    with pytest.raises(ValueError, match=r"strategy: got 'A', allowed: auto \| B \| F, as a group"):
        linear_policy_loss(*arguments, torch.ones(4), PolicyLossSpec(), group=group, strategy="A")
    with pytest.raises(ValueError, match="impl: got 'reference', allowed with a group"):
        linear_logprob(*arguments, group=group, impl="reference")


if __name__ == "__main__":
    main(*sys.argv[1:])
