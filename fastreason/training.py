"""One training step: from graded groups to optimizer updates. Advantages, packing, micro-batches, figures; no I/O, no clock."""

from dataclasses import dataclass

from fastreason.advantages import rewards_tensor
from fastreason.algorithms import ResolvedAlgorithm
from fastreason.config import Config, updates_prompts
from fastreason.figures import TokenTotals
from fastreason.packing import (
    Layout,
    MicroBatch,
    Row,
    collate,
    loss_denominator,
    plan_micro_batches,
    rows_of,
    split_balanced,
    unit_length,
    units_of,
)
from fastreason.ranks import Ranks
from fastreason.types import Group
from fastreason.update.updater import Updater, UpdateResult


@dataclass(frozen=True)
class TrainingStep:
    """Called on every rank with the same groups; what makes algorithms differ is in `algorithm`."""

    config: Config
    algorithm: ResolvedAlgorithm
    updater: Updater
    ranks: Ranks
    layout: Layout
    pad_token_id: int

    def __call__(self, groups: list[Group]) -> dict[str, float]:
        """All optimizer updates of one batch; returns the step's loss figures."""
        config = self.config
        advantages_PG = self.algorithm.advantage(rewards_tensor(groups))
        size = updates_prompts(config)
        plans = []
        for first in range(0, len(groups), size):
            rows = rows_of(
                groups[first : first + size], advantages_PG[first : first + size], self.algorithm.aggregation
            )
            plans.append((rows, self.micro_batches(rows)))
        if self.algorithm.ratio_against == "sampler":
            for batch in (b for _, batches in plans for b in batches):
                batch.behaviour_logp_N = batch.sampler_logp_N
        elif len(plans) > 1:
            # Before the first update; with a single one the ratio is 1 and needs nothing.
            for _, batches in plans:
                for batch, logp_N in zip(
                    batches, self.updater.logprobs(batches, config.rollout.temperature), strict=True
                ):
                    batch.behaviour_logp_N = logp_N
        totals, results = TokenTotals(), []
        for number, (rows, batches) in enumerate(plans):
            result = self.updater.update(
                batches, self.algorithm.spec, config.rollout.temperature, self._denominator(rows)
            )
            for batch, output in zip(batches, result.outputs, strict=True):
                totals.add(batch, output, first_update=number == 0)
            results.append(result)
        num_tokens = sum(len(row) for rows, _ in plans for row in rows)
        computed = sum(self.ranks.sum([float(sum(batch.num_tokens for _, batches in plans for batch in batches))]))
        sums, maxima = totals.packed()
        figures = TokenTotals.figures(self.ranks.sum(sums), self.ranks.max(maxima))
        return (
            figures
            | update_figures(results)
            | {
                "train/tokens": float(num_tokens),
                "train/tokens_computed": computed,
            }
        )

    def _denominator(self, rows: list[Row]) -> float:
        num_tokens = sum(row.num_response for row in rows)
        return loss_denominator(num_tokens, len(rows), self.config.rollout.max_new_tokens, self.algorithm.aggregation)

    def micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of an update; every rank makes equally many, as ZeRO's collectives need."""
        train = self.config.train
        if train.skip_zero_advantage and self.algorithm.zero_advantage_is_zero_gradient:
            # The denominator counts them all the same. One row stays where none has a gradient.
            rows = [row for row in rows if row.advantage] or rows[:1]
        units = units_of(rows, self.layout)
        shares = split_balanced([unit_length(unit) for unit in units], self.ranks.num)
        plans = [
            plan_micro_batches([unit_length(units[i]) for i in share], train.micro_batch_tokens, self.layout)
            for share in shares
        ]
        share, plan = shares[self.ranks.rank], plans[self.ranks.rank]
        batches = [collate([units[share[i]] for i in part], self.layout, self.pad_token_id) for part in plan]
        while len(batches) < max(map(len, plans)):
            filler = collate([rows[:1]], self.layout, self.pad_token_id)
            filler.token_weight_N.zero_()
            filler.advantages_N.zero_()
            batches.append(filler)
        return batches


def update_figures(results: list[UpdateResult]) -> dict[str, float]:
    """Means over a step's updates; `train/skipped_updates` counts those whose gradient was not finite."""
    return {
        "loss/policy": sum(r.loss for r in results) / len(results),
        "train/grad_norm": sum(r.grad_norm for r in results) / len(results),
        "train/lr": results[-1].lr,
        "train/updates": float(len(results)),
        "train/skipped_updates": float(sum(not r.applied for r in results)),
    }
