"""TRL 1.16's `ChunkedLogProbFunction` with the same arguments and results, and a patch that puts it under TRL's trainers.

It owns the three statistics that only TRL asks for, and the list of what the patch replaced. It refuses to patch a TRL whose
function has other arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import sys
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.linear_logprob.function import linear_logprob

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# TRL's trainers pass this value always; its tile of tokens x vocabulary is this high.
TRAINER_CHUNK, TILE_TOKENS = 32768, 4096

# Logits of the statistics pass at a time, as fp32.
STATISTICS_BYTES = 256 << 20


class ChunkedLogProbFunction:
    """Log-probabilities of targets, and what else TRL asks for, with the arguments of TRL's autograd function.

    Not an autograd function itself: `apply` calls linear_logprob, which owns the node.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(logp, entropy, log_sum_sq_probs, mean_logits, is_top1) of targets, None for what `outputs` leaves out.

            y = logit_scale * (hidden @ weight.T + bias),  z = softcap * tanh(y / softcap) / temperature
            log_sum_sq_probs = log sum_j p_j^2,  mean_logits = mean_j z_j,  is_top1 = (argmax_j z_j == target)

        hidden [N, D] (bf16, fp32, fp64), weight [V, D], bias [V]: differentiated; another dtype of weight and bias is
        cast to that of hidden, or to autocast's. targets [N] int64. All results are [N], fp32 in nats, is_top1 bool
        (the first of equal logits counts). logp and entropy are differentiable. chunk_size: columns of TRL's tile;
        the trainers' 32768 leaves the buffer to the library, another value bounds it by 4096 * chunk_size elements.
        The last three statistics cost one more head GEMM, without gradients.

        Raises ValueError for an unknown output or a chunk_size below 1.
        """
        unknown = set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS}
        if unknown:
            raise ValueError(f"outputs: got {sorted(unknown)}, allowed: log_probs, {', '.join(OPTIONAL_OUTPUTS)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}, allowed: >= 1")
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        bound = max(1, TILE_TOKENS * chunk_size // weight.shape[0])
        logp, entropy, _ = linear_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            entropy_grad="entropy" in outputs,
            chunk_tokens=None if chunk_size == TRAINER_CHUNK else bound,
        )
        _gather_in_backward(logp, weight, bias)
        extra: dict[str, Tensor] = {}
        if not {"log_sum_sq_probs", "mean_logits", "is_top1"}.isdisjoint(outputs):
            extra = _statistics(hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale)
        found = {"entropy": entropy, **extra}
        first, second, third, fourth = (found[name] if name in outputs else None for name in OPTIONAL_OUTPUTS)
        return logp, first, second, third, fourth


class TrlPatch:
    """What `patch_trl` replaced; `undo` puts it back, and so does leaving a `with` block."""

    def __init__(self, original: type, replaced: list[tuple[ModuleType, str]]) -> None:
        self.replaced = tuple(f"{module.__name__}.{name}" for module, name in replaced)
        self._original = original

    def undo(self) -> None:
        """Puts TRL's function back wherever a TRL module holds ours; a second call changes nothing."""
        for module, name in _holders(ChunkedLogProbFunction):
            setattr(module, name, self._original)

    def __enter__(self) -> TrlPatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def patch_trl() -> TrlPatch:
    """Makes every TRL trainer with a fused LM head (GRPO, RLOO, DPO, KTO, SFT) compute log-probabilities with ours.

    It replaces the name in every loaded module of TRL that holds the function, among them trl.trainer.utils, whose
    add_fused_lm_head is the one place where trainers call it; so trainers that exist already are covered, and modules
    loaded later import ours. Use it before training, plainly or as `with patch_trl():`.

    Raises ImportError without TRL, RuntimeError when TRL's function has other arguments than version 1.16's or is
    patched already. Left out: the distillation trainer, whose divergence is another function.
    """
    original = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    user = importlib.import_module("trl.trainer.utils")
    if original is ChunkedLogProbFunction:
        raise RuntimeError("patch_trl: TRL is patched already; call undo() of the first patch before")
    theirs = list(inspect.signature(original.forward).parameters.values())[1:]
    ours = list(inspect.signature(ChunkedLogProbFunction.apply).parameters.values())
    if [(x.name, x.default) for x in theirs] != [(x.name, x.default) for x in ours]:
        raise RuntimeError(
            f"patch_trl: ChunkedLogProbFunction of TRL {_version()} takes {[x.name for x in theirs]}, allowed: "
            f"{[x.name for x in ours]}; use TRL 1.16"
        )
    holders = _holders(original)
    if user not in [module for module, _ in holders]:
        raise RuntimeError(f"patch_trl: trl.trainer.utils of TRL {_version()} does not hold ChunkedLogProbFunction")
    for module, name in holders:
        setattr(module, name, ChunkedLogProbFunction)
    return TrlPatch(original, holders)


def _version() -> str:
    return importlib.metadata.version("trl")


def _holders(value: type) -> list[tuple[ModuleType, str]]:
    """(module, name) of every loaded module of TRL with a global that is `value`."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "trl" and module is not None]
    # vars(), as asking a lazy module for a name would import it.
    return [(module, name) for module in modules for name, held in list(vars(module).items()) if held is value]


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
) -> dict[str, Tensor]:
    """The three statistics without gradient, each [N], from one more pass over the logits."""
    rows = max(1, STATISTICS_BYTES // (4 * weight.shape[0]))
    found: dict[str, list[Tensor]] = {"log_sum_sq_probs": [], "mean_logits": [], "is_top1": []}
    with torch.no_grad():
        for part, ids in zip(hidden.split(rows), targets.split(rows), strict=True):
            z = torch.nn.functional.linear(part, weight, bias)
            z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            z = z / temperature
            found["log_sum_sq_probs"].append((2 * z).logsumexp(-1) - 2 * z.logsumexp(-1))
            found["mean_logits"].append(z.mean(-1))
            found["is_top1"].append(z.argmax(-1) == ids)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _gather_in_backward(logp: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Under DeepSpeed's ZeRO-3: the head is whole again while the logits are recomputed, as in TRL's own backward."""
    if not hasattr(weight, "ds_id") or logp.grad_fn is None:
        return
    context = importlib.import_module("trl.trainer.utils").maybe_gather_lm_head_ctx
    gathered = contextlib.ExitStack()

    def gather(*_: Any) -> None:
        gathered.enter_context(context(weight, bias))

    logp.grad_fn.register_prehook(gather)
    logp.grad_fn.register_hook(lambda *_: gathered.close())
