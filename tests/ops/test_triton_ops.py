"""Both operations with impl="triton", every strategy, in Triton's interpreter on CPU tensors, against float64.

The interpreter is chosen when triton is imported, so these run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import torch
from fastreason_kernels import LoraHead, PolicyLossSpec, dispatch, linear_logprob, linear_policy_loss
from fastreason_kernels.row_kernels import launch
from fastreason_kernels.testing import assert_no_worse, head_case

N, V = 13, 301
options = json.loads(sys.argv[1])
launches = []
launch_once = launch._launch
launch._launch = lambda call: (launches.append(call.kernel), launch_once(call))[1]


def logprob(case, **call):
    outputs = linear_logprob(case.hidden, case.weight, case.ids, bias=case.bias, temperature=case.temperature, **call)
    logp, entropy, _ = outputs
    return *outputs, *torch.autograd.grad((logp + 0.3 * entropy).sum(), (case.hidden, case.weight, case.bias))


def frozen(case, **call):
    outputs = linear_logprob(case.hidden, case.weight.detach(), case.ids, bias=case.bias.detach(), **call)
    return *outputs, *torch.autograd.grad((outputs[0] + 0.3 * outputs[1]).sum(), (case.hidden,))


def policy(case, ratio, **call):
    spec = PolicyLossSpec(ratio=ratio, clip_low=None, clip_high=None, entropy_coef=0.1, kl="k3", kl_coef=0.1)
    generator = torch.Generator().manual_seed(1)
    out = linear_policy_loss(
        case.hidden, case.weight, case.ids, torch.randn(N, generator=generator), spec, bias=case.bias,
        ref_logp=torch.full((N,), -6.0), behaviour_logp=torch.full((N,), -6.0), sequence_ids=torch.arange(N) // 5,
        mask=torch.arange(N) % 4 != 1, **call,
    )
    computed = out.computed
    grads = torch.autograd.grad(out.loss_sum, (case.hidden, case.weight, case.bias))
    return out.logp[computed], out.entropy[computed], out.ratio[computed], *grads


def compare(function, dtype, *args, **call):
    head = {key: options[key] for key in ("softcap", "logit_scale") if key in options}
    case = head_case(N, V, dtype=torch.bfloat16)
    exact = function(case.to(torch.float64), *args, impl="reference", **head)
    eager = function(case.to(dtype), *args, impl="reference", **head)
    actual = function(case.to(dtype), *args, impl="triton", **{**options, **call})
    for i, values in enumerate(zip(actual, eager, exact, strict=True)):
        assert_no_worse(f"{function.__name__}[{i}]", *values, dtype=dtype)


assert dispatch.resolve("linear_logprob", "auto", "cpu") == "triton"
for dtype in (torch.float32, torch.bfloat16):
    compare(logprob, dtype, strategy="B", chunk_vocab=100)
    compare(frozen, dtype, strategy="F", chunk_tokens=8)
    compare(policy, dtype, "token", chunk_tokens=8)
    compare(policy, dtype, "sequence", chunk_tokens=8)
assert {"partials_kernel", "dlogits_kernel"} <= set(launches), launches
print("passed")
"""

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("options", ["{}", '{"logits": "fp32"}', '{"softcap": 3.0, "logit_scale": 1.5}'])
def test_interpreted(options):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", SCRIPT, options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and done.stdout.endswith("passed\n"), done.stderr[-3000:]
