"""The figures of a step, from its groups and the outputs of its updates. Pure, but for the sums over the ranks."""

import statistics
from collections.abc import Sequence

import torch
from fastreason_kernels import PolicyLossOutput

from fastreason.packing import MicroBatch
from fastreason.types import Group


def rollout_figures(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Reward, length, truncation, signal and staleness of a batch of groups."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples]
    lengths = [len(sample.token_ids) for sample in samples]
    staleness = [version - group.oldest_version for group in groups]
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/accuracy": statistics.fmean(bool(s.grade and s.grade.correct) for s in samples),
        "rollout/tokens": float(sum(lengths)),
        "rollout/response_tokens_mean": statistics.fmean(lengths),
        "rollout/truncated_share": statistics.fmean(sample.truncated for sample in samples),
        "rollout/signal_share": statistics.fmean(len(set(group.rewards_G)) > 1 for group in groups),
        "rollout/staleness_mean": statistics.fmean(staleness),
        "rollout/staleness_max": float(max(staleness)),
    }


class TokenTotals:
    """Sums and maxima over the response tokens of a step's micro-batches, on this rank.

    The trainer's log-probability of a sampled token is compared with the sampler's at every update: at the first update
    of a fresh batch their difference is numerics alone, afterwards it holds the policy's own movement too.
    """

    SUMS = ("num", "logp", "entropy", "kl", "ratio", "clipped", "abs_diff", "mismatch_kl", "counted")
    MAXIMA = ("ratio_max", "abs_diff_max")

    def __init__(self) -> None:
        self._sums = dict.fromkeys(self.SUMS, 0.0)
        self._maxima = dict.fromkeys(self.MAXIMA, 0.0)

    def add(self, batch: MicroBatch, output: PolicyLossOutput, first_update: bool) -> None:
        """Add one micro-batch; rows of weight zero (padding among ranks) and tokens not computed count nothing."""
        kept = output.computed.cpu() & (batch.token_weight_N.cpu() != 0)
        if not bool(kept.any()):
            return
        pick = {
            k: getattr(output, k).detach().float().cpu()[kept] for k in ("logp", "entropy", "kl", "ratio", "clipped")
        }
        sums = self._sums
        sums["num"] += float(kept.sum())
        for key, values in pick.items():
            sums[key] += float(values.double().sum())
        self._maxima["ratio_max"] = max(self._maxima["ratio_max"], float(pick["ratio"].max()))
        if first_update:
            log_ratio = pick["logp"] - batch.sampler_logp_N.cpu()[kept]
            sums["counted"] += float(kept.sum())
            sums["abs_diff"] += float(log_ratio.abs().double().sum())
            # k3 estimate of KL(sampler || trainer): e^d - 1 - d, d = trainer - sampler, on the sampler's tokens.
            sums["mismatch_kl"] += float(
                (torch.expm1(log_ratio.clamp(-20, 20)) - log_ratio.clamp(-20, 20)).double().sum()
            )
            self._maxima["abs_diff_max"] = max(self._maxima["abs_diff_max"], float(log_ratio.abs().max()))

    def packed(self) -> tuple[list[float], list[float]]:
        return [self._sums[k] for k in self.SUMS], [self._maxima[k] for k in self.MAXIMA]

    @classmethod
    def figures(cls, sums: list[float], maxima: list[float]) -> dict[str, float]:
        """The metrics from the sums and maxima over all ranks."""
        total, largest = dict(zip(cls.SUMS, sums, strict=True)), dict(zip(cls.MAXIMA, maxima, strict=True))
        num, counted = max(1.0, total["num"]), max(1.0, total["counted"])
        return {
            "loss/logp": total["logp"] / num,
            "loss/entropy": total["entropy"] / num,
            "loss/kl": total["kl"] / num,
            "loss/ratio_mean": total["ratio"] / num,
            "loss/ratio_max": largest["ratio_max"],
            "loss/clip_share": total["clipped"] / num,
            "mismatch/logp_abs_mean": total["abs_diff"] / counted,
            "mismatch/logp_abs_max": largest["abs_diff_max"],
            "mismatch/kl": total["mismatch_kl"] / counted,
        }
