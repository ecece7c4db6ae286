"""The table of policy losses: each a spec of the one policy-loss function in fastreason_kernels.

The arithmetic is not here but in the loss library, once; a row here only names a setting of it.
"""

from fastreason_kernels import PolicyLossSpec

LOSSES: dict[str, PolicyLossSpec] = {
    # min(rho A, clip(rho, 1 - low, 1 + high) A), rho per token: PPO (arXiv 1707.06347), GRPO, Reinforce with a clip.
    "clip": PolicyLossSpec(ratio="token", clip_low=0.2, clip_high=0.2),
    # More room above, so that unlikely tokens can become likely (DAPO, arXiv 2503.14476).
    "clip_higher": PolicyLossSpec(ratio="token", clip_low=0.2, clip_high=0.28),
    # The same with at most c |A| for A < 0 (arXiv 1912.09729), c = 3.
    "dual_clip": PolicyLossSpec(ratio="token", clip_low=0.2, clip_high=0.2, dual_clip=3.0),
    # rho A with no bound: importance sampling alone.
    "ratio": PolicyLossSpec(ratio="token", clip_low=None, clip_high=None),
    # -A log pi: no ratio, no clip (plain policy gradient; with A = 1 the SFT loss).
    "log_prob": PolicyLossSpec(ratio="none"),
    # The ratio of a whole sequence, its mean log-ratio exponentiated: its clips are three orders closer (arXiv 2507.18071).
    "gspo": PolicyLossSpec(ratio="sequence", clip_low=3e-4, clip_high=4e-4),
    # -sg(min(rho, 1 + high)) A log pi (arXiv 2506.13585): no lower bound, as there. Its upper one is not printed; 5 is
    # from the range tried in arXiv 2510.13786.
    "cispo": PolicyLossSpec(ratio="token", gate="cispo", clip_low=None, clip_high=4.0),
    # A sigmoid instead of a clip, steeper where A < 0 (arXiv 2511.20347).
    "sapo": PolicyLossSpec(ratio="token", gate="sapo", sapo_tau_pos=1.0, sapo_tau_neg=1.05),
}
