"""One training step: from graded groups to optimizer updates. Advantages, packing, micro-batches, figures; no I/O, no clock."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastreason.advantages import rewards_tensor
from fastreason.algorithms import ResolvedAlgorithm
from fastreason.config import Config, updates_prompts
from fastreason.figures import TokenTotals
from fastreason.filtering import overshoot, verdict
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
class Plan:
    """One update: the rows that its denominator counts, and this rank's micro-batches of those that are computed."""

    rows: list[Row]
    batches: list[MicroBatch]


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
        plans = self._plans(groups)
        self._set_behaviour(plans)
        totals, results = TokenTotals(self.algorithm.spec), []
        temperature = self.config.rollout.temperature
        for plan in plans:
            if not plan.batches:  # on every rank alike
                results.append(self.updater.skip())
                continue
            first = all(result.empty for result in results)
            denominator = self._denominator(plan.rows)
            result = self.updater.update(plan.batches, self.algorithm.spec, temperature, denominator)
            for batch, output in zip(plan.batches, result.outputs, strict=True):
                totals.add(batch, output, first_update=first)
            results.append(result)
        sums, maxima = totals.packed()
        mine = sum(batch.num_tokens for plan in plans for batch in plan.batches)
        (computed,) = self.ranks.sum([float(mine)])
        return (
            TokenTotals.figures(self.ranks.sum(sums), self.ranks.max(maxima))
            | update_figures(results)
            | self._left_out(groups)
            | {
                "train/tokens": float(sum(len(row) for plan in plans for row in plan.rows)),
                "train/tokens_computed": computed,
            }
        )

    def _plans(self, groups: list[Group]) -> list[Plan]:
        """The updates of a batch, in order."""
        advantages_PG = self.algorithm.advantage(self._rewards(groups))
        size = updates_prompts(self.config)
        plans = []
        for first in range(0, len(groups), size):
            rows = self._rows(groups[first : first + size], advantages_PG[first : first + size])
            plans.append(Plan(rows, self.micro_batches(rows)))
        return plans

    def _rewards(self, groups: list[Group]) -> Tensor:
        """[P, G] rewards that the advantages are made of: where the algorithm says so, less a penalty on overlong responses."""
        algorithm, rewards_PG = self.algorithm, rewards_tensor(groups)
        if algorithm.truncated != "penalise":
            return rewards_PG
        limit, buffer = self.config.rollout.max_new_tokens, algorithm.truncation_buffer
        overshoot_PG = torch.tensor([[overshoot(sample, limit, buffer) for sample in g.samples] for g in groups])
        return rewards_PG - algorithm.truncation_penalty * overshoot_PG

    def _rows(self, groups: list[Group], advantages_PG: Tensor) -> list[Row]:
        """The rows that an update counts: without masked responses; of filtered groups none, or with weight 0."""
        algorithm = self.algorithm
        rows: list[Row] = []
        for number, group in enumerate(groups):
            filtered = verdict(group, algorithm.filter) is not None
            # A batch that was refilled has no such groups; those of a batch from elsewhere are not trained on either.
            if filtered and algorithm.filtered != "zero":
                continue
            rows += rows_of(
                [group],
                advantages_PG[number : number + 1],
                algorithm.aggregation,
                weight=0.0 if filtered else 1.0,
                with_truncated=algorithm.truncated != "mask",
            )
        return rows

    def _left_out(self, groups: list[Group]) -> dict[str, float]:
        algorithm = self.algorithm
        masked = [s.truncated and len(s.token_ids) > 0 for group in groups for s in group.samples]
        return {
            "train/masked_rows": float(sum(masked)) if algorithm.truncated == "mask" else 0.0,
            "train/filtered_groups": float(sum(verdict(group, algorithm.filter) is not None for group in groups)),
        }

    def _set_behaviour(self, plans: list[Plan]) -> None:
        """What the ratios divide by; the trainer's own log-probabilities are those of before the first update."""
        algorithm = self.algorithm
        if algorithm.ratio_against == "sampler":
            for batch in (batch for plan in plans for batch in plan.batches):
                batch.behaviour_logp_N = batch.sampler_logp_N
        elif sum(bool(plan.batches) for plan in plans) > 1:  # with a single update the ratio is 1 and needs nothing
            for plan in plans:
                logp = self.updater.logprobs(plan.batches, algorithm.spec, self.config.rollout.temperature)
                for batch, logp_N in zip(plan.batches, logp, strict=True):
                    batch.behaviour_logp_N = logp_N

    def _denominator(self, rows: list[Row]) -> float:
        num_tokens = sum(row.num_response for row in rows)
        return loss_denominator(num_tokens, len(rows), self.config.rollout.max_new_tokens, self.algorithm.aggregation)

    def micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of an update; every rank makes equally many, as ZeRO's collectives need.

        None where no row has a weight.
        """
        train = self.config.train
        rows = [row for row in rows if row.token_weight]
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
    """Means over a step's updates that had rows; `train/skipped_updates` counts gradients that were not finite."""
    made = [result for result in results if not result.empty]
    num = max(1, len(made))
    return {
        "loss/policy": sum(r.loss for r in made) / num,
        "train/grad_norm": sum(r.grad_norm for r in made) / num,
        "train/lr": results[-1].lr,
        "train/updates": float(len(results)),
        "train/skipped_updates": float(sum(not r.applied for r in results)),
        "train/empty_updates": float(len(results) - len(made)),
    }
