"""The implementations that bench/ops.py compares, each called as its own users call it.

It owns one builder for each operation of each implementation: `builder(case, data, options)` returns a function of no
arguments whose result has "loss", to be differentiated, and any values to be compared. A builder raises UnavailableError with
the reason where its package, device or option is not there. It refuses to time or judge anything.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fastreason_kernels
import torch
import torch.nn.functional as F
from fastreason_kernels import PolicyLossSpec, linear_logprob, linear_policy_loss
from ops_cases import CLIP, Case, Data, loss_of
from torch import Tensor

Call = Callable[[], dict[str, Tensor]]
Options = Mapping[str, Any]
Builder = Callable[[Case, Data, Options], Call]


class UnavailableError(Exception):
    """An implementation cannot run here; the message says why."""


def variants(impl: str, case: Case) -> list[tuple[str, dict[str, Any]]]:
    """(label, keyword arguments) of each way to call `impl` for `case`; only options that it has in this version."""
    found: list[tuple[str, dict[str, Any]]] = [("", {})]
    if impl != "fastreason":
        return found
    function = fastreason_functions().get(case.op)
    known = inspect.signature(function).parameters if function else {}
    if case.half:
        found.append(("active only", {"statistics": "active"}))
    if case.frozen and case.op == "policy_loss" and "strategy" in known:
        found += [(strategy, {"strategy": strategy}) for strategy in "AF"]
    elif case.op == "policy_loss" and "strategy" in known and not case.half:
        found.append(("B", {"strategy": "B"}))
    if "logits" in known and case.dtype == "bf16" and not case.half:
        # The default rounds logits to bf16 on a CPU and nowhere else.
        found.append(("unrounded", {"logits": "fp32"}) if case.device == "cpu" else ("rounded", {"logits": "bf16"}))
    return found


def fastreason_functions() -> dict[str, Callable[..., Any]]:
    """The library's function behind each operation, without those that this version does not have."""
    found: dict[str, Callable[..., Any]] = {
        "policy_loss": linear_policy_loss,
        "logprob": linear_logprob,
        "cross_entropy": linear_policy_loss,
    }
    # Where the function is not exported the name may still be that of its folder.
    if callable(divergence := getattr(fastreason_kernels, "linear_divergence", None)):
        found["divergence"] = divergence
    return found


def _fastreason(case: Case, data: Data, options: Options) -> Call:
    function = fastreason_functions().get(case.op)
    if function is None:
        raise UnavailableError(f"this version of fastreason_kernels has no linear_{case.op}")
    if case.op == "logprob":

        def logprob() -> dict[str, Tensor]:
            logp, entropy, _ = function(data.hidden, data.weight, data.ids, **options)
            return {"loss": loss_of("logprob", logp, entropy, data), "logp": logp, "entropy": entropy}

        return logprob
    share = torch.full((case.n,), 1 / case.n, device=data.ids.device)
    if case.op == "divergence":
        heads = (data.hidden, data.weight, data.teacher_hidden, data.teacher_weight)
        return lambda: {"loss": function(*heads, direction="reverse", token_weight=share, **options).loss_sum}
    if case.op == "cross_entropy":
        spec, ones = PolicyLossSpec(ratio="none"), torch.ones_like(share)
        given = (data.hidden, data.weight, data.ids, ones, spec)
        return lambda: {"loss": function(*given, token_weight=share, **options).loss_sum}
    spec = PolicyLossSpec(clip_low=CLIP, clip_high=CLIP)
    given = (data.hidden, data.weight, data.ids, data.advantages, spec)
    columns = {"behaviour_logp": data.behaviour_logp, "token_weight": share}
    return lambda: {"loss": function(*given, **columns, **options).loss_sum}


def _eager(case: Case, data: Data, _: Options) -> Call:
    """Whole logits in the inputs' dtype, the softmax in fp32, plain autograd."""
    if case.op == "cross_entropy":
        return lambda: {"loss": F.cross_entropy(F.linear(data.hidden, data.weight).float(), data.ids)}
    if case.op == "divergence":
        assert data.teacher_hidden is not None and data.teacher_weight is not None
        teacher = (data.teacher_hidden, data.teacher_weight)

        def divergence() -> dict[str, Tensor]:
            with torch.no_grad():
                log_q = torch.log_softmax(F.linear(*teacher).float(), -1)
            log_p = torch.log_softmax(F.linear(data.hidden, data.weight).float(), -1)
            return {"loss": (log_p.exp() * (log_p - log_q)).sum(-1).mean()}

        return divergence

    def logp_and_entropy() -> tuple[Tensor, Tensor | None]:
        log_p = torch.log_softmax(F.linear(data.hidden, data.weight).float(), -1)
        logp = log_p.gather(1, data.ids[:, None])[:, 0]
        return logp, -(log_p.exp() * log_p).sum(-1) if case.op == "logprob" else None

    return _from_logp(case, data, logp_and_entropy)


def _from_logp(case: Case, data: Data, function: Callable[[], tuple[Tensor, Tensor | None]]) -> Call:
    """For implementations that stop at log-probabilities: the loss in plain torch on top."""

    def call() -> dict[str, Tensor]:
        logp, entropy = function()
        values = {"loss": loss_of(case.op, logp, entropy, data)}
        return values if entropy is None else {**values, "logp": logp, "entropy": entropy}

    return call


def _torch_lce(case: Case, data: Data, _: Options) -> Call:
    function = getattr(F, "linear_cross_entropy", None)
    options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options_class is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    given = (data.hidden, data.weight, data.ids)
    if case.op == "cross_entropy":
        return lambda: {"loss": function(*given, options=options_class())}
    return _from_logp(case, data, lambda: (-function(*given, reduction="none", options=options_class()), None))


def _liger_grpo(case: Case, data: Data, _: Options) -> Call:
    module = _import("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP)
    count = data.num_sequences
    hidden = data.hidden.view(count, -1, case.h)
    ids, old = data.ids.view(count, -1), data.behaviour_logp.view(count, -1)
    mask, advantages = torch.ones_like(old), data.advantages.view(count, -1)[:, 0].contiguous()
    return lambda: {"loss": loss(hidden, data.weight, ids, mask, advantages, old_per_token_logps=old)[0]}


def _liger_cross_entropy(case: Case, data: Data, _: Options) -> Call:
    if case.device == "cpu":
        raise UnavailableError("liger's fused linear cross-entropy is a Triton kernel and needs a GPU")
    loss = _import("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda: {"loss": loss(data.weight, data.hidden, data.ids)}


def _liger_divergence(case: Case, data: Data, _: Options) -> Call:
    module = _import("liger_kernel.chunked_loss")
    # Its beta = 1 is the reverse KL.
    loss = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    given = (data.hidden, data.weight, data.teacher_hidden, data.teacher_weight, data.ids)
    return lambda: {"loss": loss(*given)}


def _trl(case: Case, data: Data, _: Options) -> Call:
    function = _import("trl.kernels").ChunkedLogProbFunction
    outputs = ("entropy",) if case.op == "logprob" else ()
    # 32768 is the vocabulary chunk that trl's own trainers pass.
    given = (data.hidden, data.weight, None, data.ids, 1.0, 32768, None, 1.0, outputs)
    return _from_logp(case, data, lambda: function.apply(*given)[:2])


def _verl(case: Case, data: Data, _: Options) -> Call:
    function = load_verl("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def logp_and_entropy() -> tuple[Tensor, Tensor | None]:
        logp, entropy = function(data.hidden, data.weight, data.ids)
        return logp, entropy if case.op == "logprob" else None

    return _from_logp(case, data, logp_and_entropy)


def _verl_triton(case: Case, data: Data, _: Options) -> Call:
    if case.device == "cpu":
        raise UnavailableError("verl's linear_cross_entropy is a Triton kernel and needs a GPU")
    function = load_verl("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def logp_and_entropy() -> tuple[Tensor, Tensor | None]:
        logp, entropy = function(data.hidden, data.weight, data.ids, 1.0, "none")
        return logp, entropy if case.op == "logprob" else None

    return _from_logp(case, data, logp_and_entropy)


def _cce(case: Case, data: Data, _: Options) -> Call:
    if case.device == "cpu":
        raise UnavailableError("cut-cross-entropy is a Triton kernel and needs a GPU")
    function = _import("cut_cross_entropy").linear_cross_entropy
    given = (data.hidden, data.weight, data.ids)
    if case.op == "cross_entropy":
        return lambda: {"loss": function(*given)}
    return _from_logp(case, data, lambda: (-function(*given, reduction="none"), None))


def _import(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name.split('.')[0]} is not importable here: {error}") from error


def load_verl(name: str) -> types.ModuleType:
    """A module of verl without verl/__init__.py, which imports ray: its packages stand in sys.modules, empty."""
    spec = importlib.machinery.PathFinder.find_spec("verl")
    if spec is None or spec.origin is None:
        raise UnavailableError("verl is not installed")
    for package in ("verl", "verl.utils"):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(Path(spec.origin).parent.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = module
    return _import(name)


_LOGP_OPS = ("policy_loss", "logprob", "cross_entropy")
REGISTRY: dict[str, dict[str, Builder]] = {
    "fastreason": {op: _fastreason for op in (*_LOGP_OPS, "divergence")},
    "eager": {op: _eager for op in (*_LOGP_OPS, "divergence")},
    "torch_lce": {op: _torch_lce for op in ("policy_loss", "cross_entropy")},
    "liger": {
        "policy_loss": _liger_grpo,
        "cross_entropy": _liger_cross_entropy,
        "divergence": _liger_divergence,
    },
    "trl": {op: _trl for op in _LOGP_OPS},
    "verl": {op: _verl for op in ("policy_loss", "logprob")},
    "verl_triton": {op: _verl_triton for op in ("policy_loss", "logprob")},
    "cce": {op: _cce for op in ("policy_loss", "cross_entropy")},
}
