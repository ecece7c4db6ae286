"""The figures of a step, from its groups and the outputs of its updates. Pure, but for the sums over the ranks."""

import math
import statistics
from collections.abc import Sequence

import torch
from fastreason_kernels import PolicyLossOutput, PolicyLossSpec, importance_weight
from torch import Tensor

from fastreason.advantages import Pairs
from fastreason.kl import estimate
from fastreason.packing import MicroBatch
from fastreason.types import Group

# As in the loss library: log-ratios beyond it would overflow a sum of squares.
LOG_RATIO_BOUND = 20.0


def rollout_figures(groups: Sequence[Group], version: int, max_staleness: int | None = None) -> dict[str, float]:
    """Reward, length, truncation, signal and staleness of a batch of groups that is trained at `version`.

    The staleness of a group is that of its oldest token. staleness/share_0 to share_S are the shares of the groups, S being
    `max_staleness` (None: the largest found); what admission did not bound, groups replayed from elsewhere, count at the
    ends. staleness/tokens_mean is the mean over tokens.
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples]
    lengths = [len(sample.token_ids) for sample in samples]
    staleness = [version - group.oldest_version for group in groups]
    bound = max(0, *staleness) if max_staleness is None else max_staleness
    buckets = [min(max(age, 0), bound) for age in staleness]
    ages = [version - token_version for sample in samples for token_version in sample.token_versions]
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
        **{f"staleness/share_{age}": buckets.count(age) / len(buckets) for age in range(bound + 1)},
        "staleness/tokens_mean": statistics.fmean(ages) if ages else 0.0,
    }


class TokenTotals:
    """Sums and maxima over the response tokens of a step's micro-batches, on this rank.

    The trainer's log-probability of a sampled token is compared with the sampler's at every update: at the first update
    of a fresh batch their difference is numerics alone, of an older one what the policy has moved since; at later updates
    it holds this step's own movement too. So ratios w = exp(trainer - sampler) and their effective sample sizes are of the
    first update, over tokens and over sequences (w of a sequence: the product over its tokens, bounded by exp(+-20)):

        ess = (sum w)^2 / (n sum w^2), the share of n equally weighted samples that would tell as much

    The weights that `spec` puts on the policy term are of all updates, and so is the KL to the model of name `target`, over
    the tokens that its term acts on (not those that a mask of responses or a silent id leaves out): its estimates k3 and k1,
    or the divergence itself.
    """

    SUMS = (
        *("num", "logp", "entropy", "kl", "ratio", "clipped", "weight", "bounded"),
        *("counted", "abs_diff", "mismatch_kl", "sampler_ratio", "sampler_ratio_square"),
        *("sequences", "sequence_ratio", "sequence_ratio_square"),
        *("compared", "k1", "k3", "acted", "term"),
    )
    MAXIMA = ("ratio_max", "abs_diff_max", "sampler_ratio_max", "minus_sampler_ratio_min")

    def __init__(self, spec: PolicyLossSpec, target: str = "reference") -> None:
        self._spec, self._target = spec, target
        self._sums = dict.fromkeys(self.SUMS, 0.0)
        self._maxima = dict.fromkeys(self.MAXIMA, 0.0) | {"minus_sampler_ratio_min": -math.inf}

    def add(self, batch: MicroBatch, output: PolicyLossOutput, first_update: bool) -> None:
        """Add one micro-batch; rows of weight zero (padding among ranks) and tokens not computed count nothing."""
        kept = output.computed.cpu() & (batch.token_weight_N.cpu() != 0)
        if not bool(kept.any()):
            return
        pick = {
            k: getattr(output, k).detach().float().cpu()[kept] for k in ("logp", "entropy", "kl", "ratio", "clipped")
        }
        weight, bounded = self._weights(batch, output)
        pick |= {"weight": weight[kept], "bounded": bounded[kept]}
        self._sums["num"] += float(kept.sum())
        for key, values in pick.items():
            self._sums[key] += float(values.double().sum())
        self._raise("ratio_max", pick["ratio"])
        self._add_comparison(batch, pick["logp"], pick["kl"], kept)
        if first_update:
            self._add_mismatch(pick["logp"] - batch.sampler_logp_N.cpu()[kept], batch.sequence_N.cpu()[kept])

    def _add_comparison(self, batch: MicroBatch, logp_N: Tensor, kl_N: Tensor, kept: Tensor) -> None:
        """Add the distance to the model that the run compares with; logp_N and kl_N are of the tokens in `kept`."""
        sums = self._sums
        acted_N = torch.ones_like(logp_N) if batch.kl_weight_N is None else batch.kl_weight_N.cpu()[kept]
        if batch.ref_logp_N is not None:
            ref_logp_N = batch.ref_logp_N.cpu()[kept]
            sums["compared"] += float(acted_N.sum())
            for name in ("k1", "k3"):
                sums[name] += float((estimate(logp_N, ref_logp_N, name) * acted_N).double().sum())
        if batch.divergence is not None:
            sums["acted"] += float(acted_N.sum())
            sums["term"] += float((kl_N * acted_N).double().sum())

    def _weights(self, batch: MicroBatch, output: PolicyLossOutput) -> tuple[Tensor, Tensor]:
        """([N] importance weight on the policy term, [N] bool: changed by its bounds)."""
        trainer_logp = output.logp.detach() if batch.behaviour_logp_N is None else batch.behaviour_logp_N
        return importance_weight(
            trainer_logp.cpu(),
            batch.sampler_logp_N.cpu(),
            self._spec,
            sequence_ids=batch.sequence_N.cpu(),
            mask=output.computed.cpu(),
        )

    def _add_mismatch(self, log_ratio_N: Tensor, sequence_N: Tensor) -> None:
        """Add the log-ratios trainer - sampler of tokens, and the sequences that they belong to."""
        bounded_N = log_ratio_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        sums, ratio_N = self._sums, bounded_N.double().exp()
        sums["counted"] += float(len(log_ratio_N))
        sums["abs_diff"] += float(log_ratio_N.abs().double().sum())
        # k3 estimate of KL(sampler || trainer): e^d - 1 - d, d = trainer - sampler, on the sampler's tokens.
        sums["mismatch_kl"] += float((torch.expm1(bounded_N) - bounded_N).double().sum())
        sums["sampler_ratio"] += float(ratio_N.sum())
        sums["sampler_ratio_square"] += float(ratio_N.square().sum())
        _, row_N = sequence_N.unique(return_inverse=True)
        zeros_B = torch.zeros(int(row_N.max()) + 1, dtype=torch.float64)
        log_ratio_B = zeros_B.index_add(0, row_N, log_ratio_N.double()).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        sums["sequences"] += float(len(log_ratio_B))
        sums["sequence_ratio"] += float(log_ratio_B.exp().sum())
        sums["sequence_ratio_square"] += float(log_ratio_B.exp().square().sum())
        self._raise("abs_diff_max", log_ratio_N.abs())
        self._raise("sampler_ratio_max", ratio_N)
        self._raise("minus_sampler_ratio_min", -ratio_N)

    def _raise(self, key: str, values: Tensor) -> None:
        self._maxima[key] = max(self._maxima[key], float(values.max()))

    def packed(self) -> tuple[list[float], list[float]]:
        return [self._sums[k] for k in self.SUMS], [self._maxima[k] for k in self.MAXIMA]

    def figures(self, sums: list[float], maxima: list[float]) -> dict[str, float]:
        """The metrics from the sums and maxima over all ranks."""
        total, largest = dict(zip(self.SUMS, sums, strict=True)), dict(zip(self.MAXIMA, maxima, strict=True))
        num, counted = max(1.0, total["num"]), max(1.0, total["counted"])
        smallest = -largest["minus_sampler_ratio_min"]
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
            "mismatch/ratio_mean": total["sampler_ratio"] / counted,
            "mismatch/ratio_min": smallest if math.isfinite(smallest) else 0.0,
            "mismatch/ratio_max": largest["sampler_ratio_max"],
            "mismatch/ess": effective_share(counted, total["sampler_ratio"], total["sampler_ratio_square"]),
            "mismatch/sequence_ess": effective_share(
                total["sequences"], total["sequence_ratio"], total["sequence_ratio_square"]
            ),
            "mismatch/weight_mean": total["weight"] / num,
            "mismatch/weight_capped_share": total["bounded"] / num,
            **self._distance(total),
        }

    def _distance(self, total: dict[str, float]) -> dict[str, float]:
        """kl/reference or kl/teacher: exact or by k3, and its k1; nothing where no token was compared."""
        name = f"kl/{self._target}"
        if total["acted"]:
            return {name: total["term"] / total["acted"]}
        if total["compared"]:
            return {name: total["k3"] / total["compared"], f"{name}_k1": total["k1"] / total["compared"]}
        return {}


def pair_figures(pairs: Sequence[Pairs]) -> dict[str, float]:
    """Means over a step's pairs, and their number."""
    num = sum(each.num for each in pairs)

    def mean(values: list[float]) -> float:
        return sum(value * each.num for value, each in zip(values, pairs, strict=True)) / max(1, num)

    return {
        "pairs/num": float(num),
        "pairs/loss": mean([each.loss for each in pairs]),
        "pairs/accuracy": mean([each.accuracy for each in pairs]),
        "pairs/margin": mean([each.margin for each in pairs]),
    }


def effective_share(num: float, total: float, squares: float) -> float:
    """(sum w)^2 / (n sum w^2) of n weights: 1 where they are equal, 1 / n where one is all; 0 of none."""
    return total * total / (num * squares) if squares > 0 else 0.0
