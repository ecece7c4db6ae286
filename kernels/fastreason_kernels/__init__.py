"""The public functions of fastreason_kernels: losses straight from hidden states and the LM head."""

from fastreason_kernels.linear_divergence.function import DivergenceOutput, linear_divergence
from fastreason_kernels.linear_logprob.function import linear_logprob
from fastreason_kernels.linear_policy_loss.function import linear_policy_loss
from fastreason_kernels.lora import LoraHead
from fastreason_kernels.policy_math import PolicyLossOutput, importance_weight, policy_loss
from fastreason_kernels.policy_spec import PolicyLossSpec

__all__ = [
    "DivergenceOutput",
    "LoraHead",
    "PolicyLossOutput",
    "PolicyLossSpec",
    "importance_weight",
    "linear_divergence",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
]
