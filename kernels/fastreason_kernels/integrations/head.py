"""`FusedLMHead`: an LM head as a module, whose forward gives log-probabilities or a policy loss instead of logits.

It owns the parameters and the reshaping of [B, L] inputs. It refuses to compute anything outside `forward`: DeepSpeed's
ZeRO-3 and FSDP gather a module's parameters around its forward and backward only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreason_kernels.linear_logprob.function import linear_logprob
from fastreason_kernels.linear_policy_loss.function import linear_policy_loss
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.policy_math import PolicyLossOutput
from fastreason_kernels.policy_spec import PolicyLossSpec


class FusedLMHead(torch.nn.Module):
    """A linear LM head that never holds the logits of all tokens.

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias + scale * (hidden @ a.T) @ b.T) / softcap)

    weight [V, D], bias [V]: parameters, kept as they are (a tied head passes the embedding's weight), under the names
    that torch.nn.Linear has. lora: the pair and its scale; a [r, D], b [V, r] become the parameters lora_a, lora_b.
    softcap, logit_scale: as in the model's own forward (Gemma; Cohere). group: a process group whose ranks hold equal
    shards of the vocabulary in order; weight, bias and lora.b are this rank's.

    Raises ValueError for shapes that do not match. Left out: LoRA dropout, DoRA.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        lora: LoraHead | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        group: Any = None,
    ) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight: shape {tuple(weight.shape)}, allowed: [V, D]")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: shape {tuple(bias.shape)}, allowed: [V] = [{weight.shape[0]}]")
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)
        self.lora_a = None if lora is None else _parameter(lora.a)
        self.lora_b = None if lora is None else _parameter(lora.b)
        self.lora_scale = 1.0 if lora is None else lora.scale
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.group = group

    @classmethod
    def from_linear(
        cls, lm_head: torch.nn.Module, *, lora: LoraHead | None = None, softcap: float | None = None, **options: Any
    ) -> FusedLMHead:
        """A head that shares the parameters of a torch.nn.Linear; other options as in the constructor.

        Raises TypeError for a module that is not linear, such as an adapter around one: pass its base layer and `lora`.
        """
        if not isinstance(lm_head, torch.nn.Linear):
            raise TypeError(
                f"lm_head: got {type(lm_head).__name__}, allowed: torch.nn.Linear; of an adapter pass the base layer, and "
                "its pair as lora=LoraHead(a, b, scale)"
            )
        return cls(lm_head.weight, lm_head.bias, lora=lora, softcap=softcap, **options)

    def forward(
        self,
        hidden: Tensor,
        ids: Tensor | None = None,
        spec: PolicyLossSpec | None = None,
        *,
        temperature: float | Tensor = 1.0,
        **columns: Any,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor] | PolicyLossOutput:
        """With a spec: the PolicyLossOutput of linear_policy_loss. Without: (logp, entropy, lse) of linear_logprob.

        hidden [N, D] or [B, L, D], ids [N] or [B, L] int64. temperature: a float, or one for each token. columns: the
        other keyword arguments of the two functions (advantages, mask, token_weight, ... with a spec; ignore_index, ...
        without); tensors have the shape of ids, and so have the results. Without ids: the plain linear layer's
        outputs [..., V] (no softcap or logit_scale, which a model applies to its head's outputs itself), so that the
        module can stand where generation expects a torch.nn.Linear.
        """
        if ids is None:
            return self._plain(hidden)
        if ids.shape != hidden.shape[:-1]:
            raise ValueError(
                f"ids: shape {tuple(ids.shape)}, allowed: {tuple(hidden.shape[:-1])}, that of hidden without D"
            )
        options = {name: _flat(name, value, ids) for name, value in {**columns, "temperature": temperature}.items()}
        options |= {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale, "group": self.group}
        options["lora"] = self._lora()
        rows = hidden.reshape(-1, hidden.shape[-1])
        if spec is None:
            logp, entropy, lse = linear_logprob(rows, self.weight, ids.reshape(-1), **options)
            return logp.view(ids.shape), entropy.view(ids.shape), lse.view(ids.shape)
        out = linear_policy_loss(rows, self.weight, ids.reshape(-1), spec=spec, **options)
        return PolicyLossOutput(out.loss_sum, *(x.view(ids.shape) for x in out[1:]))

    def _lora(self) -> LoraHead | None:
        if self.lora_a is None or self.lora_b is None:
            return None
        return LoraHead(self.lora_a, self.lora_b, self.lora_scale)

    def _plain(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return logits
        low_rank = torch.nn.functional.linear(hidden, self.lora_a) * self.lora_scale
        return logits + torch.nn.functional.linear(low_rank, self.lora_b)

    def extra_repr(self) -> str:
        """Sizes and options, as torch.nn.Linear shows its own."""
        vocab, width = self.weight.shape
        rank = 0 if self.lora_a is None else self.lora_a.shape[0]
        return (
            f"in_features={width}, out_features={vocab}, bias={self.bias is not None}, lora_rank={rank}, "
            f"softcap={self.softcap}, logit_scale={self.logit_scale}"
        )


def _parameter(x: Tensor) -> torch.nn.Parameter:
    return x if isinstance(x, torch.nn.Parameter) else torch.nn.Parameter(x.detach(), requires_grad=x.requires_grad)


def _flat(name: str, value: Any, ids: Tensor) -> Any:
    """Tensors of one value a token as [N]; everything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != ids.shape:
        raise ValueError(f"{name}: shape {tuple(value.shape)}, allowed: that of ids, {tuple(ids.shape)}")
    return value.reshape(-1)
