"""The table of policy losses: each a spec of the one policy-loss function in fastreason_kernels.

The arithmetic is not here but in the loss library, once; a row here only names a setting of it.
"""

from fastreason_kernels import PolicyLossSpec

LOSSES: dict[str, PolicyLossSpec] = {
    # min(rho A, clip(rho, 1 - low, 1 + high) A), rho per token: PPO (arXiv 1707.06347), GRPO, Reinforce with a clip.
    "clip": PolicyLossSpec(ratio="token", clip_low=0.2, clip_high=0.2),
    # -A log pi: no ratio, no clip (plain policy gradient; with A = 1 the SFT loss).
    "log_prob": PolicyLossSpec(ratio="none"),
}
