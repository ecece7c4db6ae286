"""One training step: from graded groups to optimizer updates. Advantages, packing, micro-batches, figures; no I/O, no clock."""

import math
from dataclasses import dataclass, field, replace

import torch
from fastreason_kernels import PolicyLossSpec
from torch import Tensor

from fastreason import credit
from fastreason.advantages import Pairs, pair_members, rewards_tensor
from fastreason.algorithms import ResolvedAlgorithm
from fastreason.config import Config, updates_prompts
from fastreason.critic import Critic, fit_figures
from fastreason.errors import DataError
from fastreason.figures import TokenTotals, pair_figures
from fastreason.filtering import overshoot, verdict
from fastreason.frozen import FrozenModel, HeadDivergence
from fastreason.kl import CoefficientState
from fastreason.packing import Layout, MicroBatch, Row, loss_denominator, makes_row, micro_batches_of, rows_of
from fastreason.ranks import Ranks, imbalance
from fastreason.types import Group
from fastreason.update.updater import Updater, UpdateResult


@dataclass(frozen=True)
class Plan:
    """One update: the rows that its denominator counts, and this rank's micro-batches of those that are computed.

    kl_scale multiplies the KL term, to make it a mean over what its mask keeps.
    """

    rows: list[Row]
    batches: list[MicroBatch]
    kl_scale: float = 1.0


@dataclass
class TrainingStep:
    """Called on every rank with the same groups; what makes algorithms differ is in `algorithm`.

    target: the model that KL terms and pairs compare with, where it is in the trainer. silent: token ids on which a KL term
    does not act (ends of responses that policy and teacher write differently). coefficients: the adaptive ones, of the step
    to come; part of a checkpoint. attention_tokens: of the model, as in `packing.unit_cost`.
    """

    config: Config
    algorithm: ResolvedAlgorithm
    updater: Updater
    ranks: Ranks
    layout: Layout
    pad_token_id: int
    target: FrozenModel | None = None
    critic: Critic | None = None
    silent: frozenset[int] = frozenset()
    attention_tokens: float = math.inf
    coefficients: CoefficientState = field(init=False)

    def __post_init__(self) -> None:
        self.coefficients = self.algorithm.initial_state()

    def __call__(self, groups: list[Group], step: int = 0) -> dict[str, float]:
        """All optimizer updates of one batch, `step` (from 0) of the run; returns the step's loss figures."""
        algorithm = self.algorithm
        spec, coef = algorithm.spec_at(step, self.coefficients), algorithm.kl.coefficient(step, self.coefficients)
        plans = self._prepare(groups, spec, coef)
        totals, results, fits, pairs = TokenTotals(spec, algorithm.kl.target), [], [], []
        for plan in plans:
            if not plan.batches:  # on every rank alike
                results.append(self.updater.skip())
                continue
            denominator = self._denominator(plan.rows)
            if algorithm.pairs:
                pairs.append(self._set_pairs(plan, groups, spec))
                denominator = float(max(1, pairs[-1].num))
            warming_up = self.critic is not None and step < self.critic.warmup_steps
            if warming_up or (algorithm.pairs and not pairs[-1].num):
                results.append(self.updater.skip())
            else:
                first = all(result.empty for result in results)
                results.append(self._update(plan, spec, denominator))
                for batch, output in zip(plan.batches, results[-1].outputs, strict=True):
                    totals.add(batch, output, first_update=first)
            if self.critic is not None:
                fits.append(self.critic.fit(plan.batches, sum(row.num_response for row in plan.rows)))
        batches = [batch for plan in plans for batch in plan.batches]
        sums, maxima = totals.packed()
        (computed,) = self.ranks.sum([float(sum(batch.num_tokens for batch in batches))])
        figures = totals.figures(self.ranks.sum(sums), self.ranks.max(maxima))
        figures |= update_figures(results) | self._left_out(groups) | self._coefficient_figures(coef)
        figures |= fit_figures(fits, batches, self.ranks) if fits else {}
        figures |= pair_figures(pairs) if algorithm.pairs else {}
        if not all(result.empty for result in results):
            self._adapt(figures, num_responses=sum(len(plan.rows) for plan in plans))
        return figures | {
            "train/tokens": float(sum(len(row) for plan in plans for row in plan.rows)),
            "train/tokens_computed": computed,
            "train/imbalance": imbalance(self.ranks, sum(batch.cost for batch in batches)),
        }

    def _prepare(self, groups: list[Group], spec: PolicyLossSpec, coef: float) -> list[Plan]:
        """The updates of a batch, in order, with everything that they need from models but pairs."""
        algorithm, term = self.algorithm, self.algorithm.kl
        rewards_PG = self._rewards(groups)
        trained_PG = self._trained(groups)
        if algorithm.pairs and self.config.train.skip_zero_advantage:
            advantages_PG = trained_PG * self._pair_members(groups, rewards_PG)
        elif self._late:
            advantages_PG = trained_PG  # stands for what is not known yet: not 0 where anything may come
        else:
            advantages_PG = self._advantages(groups, rewards_PG) * trained_PG
        plans = self._plans(groups, advantages_PG)
        batches = [batch for plan in plans for batch in plan.batches]
        if term.estimator != "none" or algorithm.pairs:
            self._compare(groups, plans, spec, coef)
        else:
            for batch in batches:
                batch.ref_logp_N = None  # a teacher's, in groups that were written for another algorithm
        place = term.place if term.active else "loss"
        several = algorithm.ratio_against == "trainer" and sum(bool(plan.batches) for plan in plans) > 1
        logp = self._logprobs(batches, spec) if (place != "loss" or several) and batches else []
        self._set_behaviour(batches, logp if several else None)
        costs: list[Tensor] | None = None
        if place == "reward":
            costs = [coef * credit.token_kl(batch, own, term) for batch, own in zip(batches, logp, strict=True)]
        if self.critic is not None:
            values = self.critic.engine.values(batches)
            credit.set_gae(batches, rewards_PG, trained_PG, values, algorithm.advantage, costs, self.ranks)
        elif costs is not None:
            cost_PG = credit.response_sums(batches, costs, (len(groups), len(groups[0].samples)), self.ranks)
            credit.set_advantages(batches, self._advantages(groups, rewards_PG - cost_PG) * trained_PG)
        if place == "advantage":
            scales = [plan.kl_scale for plan in plans for _ in plan.batches]
            for batch, own, scale in zip(batches, logp, scales, strict=True):
                credit.add_kl_to_advantages(batch, own, term, coef * scale)
        return plans

    @property
    def _late(self) -> bool:
        """Whether advantages need what only the models say."""
        algorithm = self.algorithm
        return algorithm.critic or algorithm.pairs or (algorithm.kl.active and algorithm.kl.place == "reward")

    def _pair_members(self, groups: list[Group], rewards_PG: Tensor) -> Tensor:
        """[P, G]: 1 for responses that will be in a pair, which rewards say; 0 for those that no model needs to run on."""
        with_truncated = self.algorithm.truncated != "mask"
        there_PG = torch.tensor([[makes_row(sample, with_truncated) for sample in group.samples] for group in groups])
        return pair_members(credit.only_there(rewards_PG, there_PG))

    def _advantages(self, groups: list[Group], rewards_PG: Tensor) -> Tensor:
        """[P, G] of an algorithm whose advantages are made of rewards."""
        if not self.algorithm.greedy_baseline:
            return self.algorithm.advantage(rewards_PG)
        return self.algorithm.advantage(rewards_PG, greedy_P=self._greedy_rewards(groups))

    def _trained(self, groups: list[Group]) -> Tensor:
        """[P, G]: 0 for responses whose rewards do not count, because of a filter or because none do; else 1."""
        algorithm = self.algorithm
        rows = [
            [float(algorithm.use_rewards and verdict(g, algorithm.filter) is None)] * len(g.samples) for g in groups
        ]
        return torch.tensor(rows)

    def _plans(self, groups: list[Group], advantages_PG: Tensor) -> list[Plan]:
        size = updates_prompts(self.config)
        plans = []
        for first in range(0, len(groups), size):
            rows = self._rows(groups[first : first + size], advantages_PG[first : first + size], first)
            plans.append(Plan(rows, self.micro_batches(rows)))
        return plans

    def _compare(self, groups: list[Group], plans: list[Plan], spec: PolicyLossSpec, coef: float) -> None:
        """What the batches need of the model that they are compared with; scales of the KL term."""
        term, batches = self.algorithm.kl, [batch for plan in plans for batch in plan.batches]
        kept_PG = credit.kept_responses(groups, term)
        credit.set_kl_weights(batches, kept_PG, self.silent)
        if self.target is not None and (term.sampled or self.algorithm.pairs):
            scores = self.target.logprobs(batches, spec, self.config.rollout.temperature)
            for batch, ref_logp_N in zip(batches, scores, strict=True):
                batch.ref_logp_N = ref_logp_N
        # Of all groups, not of this rank's: every rank raises, or none.
        if self.target is None and (unscored := [group.ticket for group in groups if not group.is_scored]):
            raise DataError(
                f"groups {unscored[:5]} hold no log-probabilities of a teacher, which teacher.where=server writes into them. "
                "They were generated without one: generate them again, or use teacher.where=trainer."
            )
        by_sequence = self.algorithm.aggregation != "token_mean"
        for number, plan in enumerate(plans):
            plans[number] = replace(plan, kl_scale=credit.kl_scale(plan.rows, kept_PG, term, by_sequence))
            if self.target is not None and term.estimator in ("exact", "top_k"):
                top_k = term.top_k if term.estimator == "top_k" else None
                for batch in plan.batches:
                    batch.divergence = HeadDivergence(self.target, coef * plans[number].kl_scale, top_k)

    def _logprobs(self, batches: list[MicroBatch], spec: PolicyLossSpec) -> list[Tensor]:
        """The trainer's own, through the same products as an update of these rows."""
        if self.algorithm.kl.active and self.algorithm.kl.place == "advantage":
            batches = [replace(batch, advantages_N=torch.ones_like(batch.advantages_N)) for batch in batches]
        return [logp.cpu() for logp in self.updater.logprobs(batches, spec, self.config.rollout.temperature)]

    def _set_behaviour(self, batches: list[MicroBatch], logp: list[Tensor] | None) -> None:
        """What the ratios divide by; with the trainer's own and a single update the ratio is 1 and needs nothing."""
        for number, batch in enumerate(batches):
            if self.algorithm.ratio_against == "sampler":
                batch.behaviour_logp_N = batch.sampler_logp_N
            elif logp is not None:
                batch.behaviour_logp_N = logp[number]

    def _set_pairs(self, plan: Plan, groups: list[Group], spec: PolicyLossSpec) -> Pairs:
        """The coefficients of an update's pairs, at the weights that it starts from."""
        logp = self._logprobs(plan.batches, spec)
        rewards_PG = self._rewards(groups)
        return credit.set_pairs(plan.batches, logp, rewards_PG, self.ranks, self.algorithm.advantage)

    def _update(self, plan: Plan, spec: PolicyLossSpec, denominator: float) -> UpdateResult:
        scaled = replace(spec, kl_coef=spec.kl_coef * plan.kl_scale)
        return self.updater.update(plan.batches, scaled, self.config.rollout.temperature, denominator)

    def _coefficient_figures(self, coef: float) -> dict[str, float]:
        algorithm, found = self.algorithm, {}
        if algorithm.kl.estimator != "none":
            found["kl/coef"] = coef
        if algorithm.entropy.goal is not None:
            found["loss/entropy_coef"] = algorithm.entropy.coefficient(self.coefficients)
        return found

    def _adapt(self, figures: dict[str, float], num_responses: int) -> None:
        # Where the term acted on no token, nothing was measured, and nothing is to adapt.
        kl = figures.get(f"kl/{self.algorithm.kl.target}", self.algorithm.kl.goal)
        self.coefficients = self.algorithm.next_state(
            self.coefficients, kl=kl, entropy=figures["loss/entropy"], num_responses=num_responses
        )

    def _rewards(self, groups: list[Group]) -> Tensor:
        """[P, G] rewards that the advantages are made of: where the algorithm says so, less a penalty on overlong responses."""
        penalties = [[self._penalty(len(s.token_ids), s.truncated) for s in group.samples] for group in groups]
        return rewards_tensor(groups) - torch.tensor(penalties)

    def _greedy_rewards(self, groups: list[Group]) -> Tensor:
        """[P], less the same penalty: of a baseline that does not pay it, all responses of a long prompt would look bad."""
        penalises = self.algorithm.truncated == "penalise"
        known = [(group.greedy_reward, group.greedy_num_tokens if penalises else 0) for group in groups]
        missing = [group.ticket for group, values in zip(groups, known, strict=True) if None in values]
        if missing:
            raise DataError(
                f"groups {missing[:5]} have no greedy response, or not its length, which algorithm.name="
                f"{self.config.algorithm.name} compares with. They were generated for another algorithm, or by an earlier "
                "version: generate them again."
            )
        penalties = [self._penalty(group.greedy_num_tokens or 0, group.greedy_truncated) for group in groups]
        return torch.tensor([group.greedy_reward for group in groups]) - torch.tensor(penalties)

    def _penalty(self, num_tokens: int, truncated: bool) -> float:
        """What a response pays for its length."""
        algorithm = self.algorithm
        if algorithm.truncated != "penalise":
            return 0.0
        limit = self.config.rollout.max_new_tokens
        return algorithm.truncation_penalty * overshoot(num_tokens, truncated, limit, algorithm.truncation_buffer)

    def _rows(self, groups: list[Group], advantages_PG: Tensor, first: int) -> list[Row]:
        """The rows that an update counts: without masked responses; of filtered groups none, or without an advantage."""
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
                # Terms beside the advantage act on a filtered group all the same.
                weight=0.0 if filtered and algorithm.zero_advantage_is_zero_gradient else 1.0,
                with_truncated=algorithm.truncated != "mask",
                first_index=(first + number) * len(group.samples),
            )
        return rows

    def _left_out(self, groups: list[Group]) -> dict[str, float]:
        algorithm = self.algorithm
        masked = [s.truncated and len(s.token_ids) > 0 for group in groups for s in group.samples]
        return {
            "train/masked_rows": float(sum(masked)) if algorithm.truncated == "mask" else 0.0,
            "train/filtered_groups": float(sum(verdict(group, algorithm.filter) is not None for group in groups)),
        }

    def _denominator(self, rows: list[Row]) -> float:
        num_tokens = sum(row.num_response for row in rows)
        return loss_denominator(num_tokens, len(rows), self.config.rollout.max_new_tokens, self.algorithm.aggregation)

    def micro_batches(self, rows: list[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of an update; every rank makes equally many, as ZeRO's collectives need.

        None where no row has a weight.
        """
        train = self.config.train
        rows = [row for row in rows if row.token_weight]
        pairs, known = self.algorithm.pairs, self.algorithm.pairs or not self._late
        if train.skip_zero_advantage and self.algorithm.zero_advantage_is_zero_gradient and known:
            # The denominator counts them all the same. One row stays where none has a gradient; no pairs are no update.
            rows = [row for row in rows if row.advantage] or rows[: 0 if pairs else 1]
        budget, ranks = train.micro_batch_tokens, self.ranks
        return micro_batches_of(
            rows, self.layout, budget, ranks.rank, ranks.num, self.pad_token_id, attention_tokens=self.attention_tokens
        )


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
