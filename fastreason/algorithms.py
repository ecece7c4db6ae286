"""The table of algorithms: a row is an advantage, a loss, an aggregation, what the ratio divides by, and what is left out.

The loop, the producer and the updater know no algorithm: they move batches. A new algorithm is a new row. What a config asks
for and could not have an effect is refused by `algorithm_checks.py`.
"""

import difflib
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

from fastreason_kernels import PolicyLossSpec

from fastreason.advantages import ADVANTAGES, AdvantageFunction
from fastreason.algorithm_checks import check_algorithm, check_row
from fastreason.config import AlgorithmConfig, Config
from fastreason.errors import ConfigError
from fastreason.kl import CoefficientState, EntropyTerm, KlTerm
from fastreason.losses import LOSSES

Aggregation = Literal["token_mean", "sequence_mean", "constant"]
Filter = Literal["none", "constant", "all_right", "all_wrong", "both"]
Filtered = Literal["zero", "remove", "refill"]
Truncated = Literal["keep", "mask", "penalise"]

NO_KL, NO_ENTROPY = KlTerm(), EntropyTerm()


@dataclass(frozen=True)
class Algorithm:
    """One row. `min_group` is the fewest samples per prompt with which its advantage means anything.

    `advantage_args` and `loss_args` are overrides of the advantage's arguments and of the loss's PolicyLossSpec (its
    importance weights too); `kl`, `use_rewards`, `filter`, `filtered` and `truncated` are defaults of the config's keys of
    these names, `truncation_buffer` is one as a share of rollout.max_new_tokens.

    What the advantage needs beside rewards: `greedy_baseline`, the reward of one more response per prompt at temperature 0;
    `critic`, values of every token; `pairs`, log-probabilities of whole responses, the reference's too, and then the loss
    is divided by the number of pairs and not as `aggregation` says.
    """

    advantage: str
    loss: str
    paper: str
    aggregation: Aggregation = "token_mean"
    ratio_against: Literal["sampler", "trainer"] = "sampler"
    advantage_args: dict[str, Any] = field(default_factory=dict)
    loss_args: dict[str, Any] = field(default_factory=dict)
    kl: KlTerm = NO_KL
    use_rewards: bool = True
    filter: Filter = "none"
    filtered: Filtered = "zero"
    truncated: Truncated = "keep"
    truncation_buffer: float = 0.0
    min_group: int = 1
    greedy_baseline: bool = False
    critic: bool = False
    pairs: bool = False


@dataclass(frozen=True)
class ResolvedAlgorithm:
    """A row with a config's overrides applied: what the loop runs.

    `spec` is the loss without a KL term and with the entropy coefficient of the start; `spec_at` has those of a step.
    """

    advantage: AdvantageFunction
    spec: PolicyLossSpec
    aggregation: Aggregation
    ratio_against: Literal["sampler", "trainer"]
    kl: KlTerm = NO_KL
    entropy: EntropyTerm = NO_ENTROPY
    use_rewards: bool = True
    filter: Filter = "none"
    filtered: Filtered = "zero"
    truncated: Truncated = "keep"
    truncation_penalty: float = 1.0
    truncation_buffer: int = 0
    greedy_baseline: bool = False
    critic: bool = False
    pairs: bool = False

    @property
    def zero_advantage_is_zero_gradient(self) -> bool:
        """Whether a token of reward advantage zero has no other term that would move the policy."""
        return not self.entropy.active and (not self.kl.active or self.kl.place == "reward")

    @property
    def compares_with_teacher(self) -> bool:
        """Whether a teacher's log-probabilities are wanted: for a gradient, or with a coefficient of 0 for figures."""
        return self.kl.estimator != "none" and self.kl.target == "teacher"

    @property
    def compares_with_reference(self) -> bool:
        """The same of the initial model's, which pairs want too."""
        return not self.compares_with_teacher and (self.pairs or self.kl.estimator != "none")

    def initial_state(self) -> CoefficientState:
        """The adaptive coefficients before the first step."""
        return CoefficientState(kl=self.kl.coef, entropy=self.entropy.coef)

    def next_state(self, state: CoefficientState, *, kl: float, entropy: float, num_responses: int) -> CoefficientState:
        """The coefficients after a step in which KL and entropy were measured, means over its tokens in nats."""
        return CoefficientState(
            kl=self.kl.adapted(state.kl, kl, num_responses),
            entropy=self.entropy.adapted(state.entropy, entropy),
            entropy_acts=self.entropy.goal is None or entropy <= self.entropy.goal,
        )

    def kept_state(self, state: CoefficientState) -> dict[str, Any]:
        """What a checkpoint holds of a state: the coefficients that adapt, by their names there."""
        kept: dict[str, Any] = {"kl": state.kl} if self.kl.schedule == "adaptive" else {}
        if self.entropy.goal is not None:
            kept |= {"entropy": state.entropy, "entropy_acts": state.entropy_acts}
        return kept

    def spec_at(self, step: int, state: CoefficientState) -> PolicyLossSpec:
        """The loss of a step, from 0 on: with its entropy coefficient, and its KL term where that is k2 or k3 in the loss."""
        spec = replace(self.spec, entropy_coef=self.entropy.coefficient(state))
        if not (self.kl.active and self.kl.place == "loss" and self.kl.sampled):
            return spec
        changes: dict[str, Any] = {"kl": self.kl.estimator, "kl_weight": self.kl.weight}
        return replace(spec, kl_coef=self.kl.coefficient(step, state), **changes)


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(advantage="grpo", loss="clip", paper="arXiv 2402.03300", min_group=2),
    "dr_grpo": Algorithm(
        advantage="grpo",
        advantage_args={"std": False},
        loss="clip",
        aggregation="constant",
        paper="arXiv 2503.20783",
        min_group=2,
    ),
    "dapo": Algorithm(
        advantage="grpo",
        loss="clip_higher",
        filter="both",
        filtered="refill",
        truncated="penalise",
        truncation_buffer=0.2,  # 4096 of 20480 tokens there
        paper="arXiv 2503.14476",
        min_group=2,
    ),
    "reinforce": Algorithm(advantage="reinforce", loss="clip", paper="arXiv 2504.11343"),
    "reinforce_rej": Algorithm(
        advantage="reinforce", loss="clip", filter="both", filtered="remove", paper="arXiv 2504.11343", min_group=2
    ),
    "raft": Algorithm(advantage="raft", loss="log_prob", paper="arXiv 2304.06767"),
    "raft_pp": Algorithm(advantage="raft", loss="clip", paper="arXiv 2504.11343"),
    "raft_pp_no_clip": Algorithm(advantage="raft", loss="ratio", paper="arXiv 2504.11343"),
    "rloo": Algorithm(advantage="rloo", loss="clip", paper="arXiv 2402.14740", min_group=2),
    "remax": Algorithm(advantage="remax", loss="clip", greedy_baseline=True, paper="arXiv 2310.10505"),
    "reinforce_pp": Algorithm(advantage="reinforce_pp", loss="clip", paper="arXiv 2501.03262"),
    "reinforce_pp_baseline": Algorithm(
        advantage="reinforce_pp",
        advantage_args={"baseline": True},
        loss="clip",
        paper="arXiv 2501.03262",
        min_group=2,
    ),
    "gspo": Algorithm(
        advantage="grpo", loss="gspo", aggregation="sequence_mean", paper="arXiv 2507.18071", min_group=2
    ),
    "cispo": Algorithm(advantage="grpo", loss="cispo", paper="arXiv 2506.13585", min_group=2),
    "sapo": Algorithm(
        advantage="grpo", loss="sapo", aggregation="sequence_mean", paper="arXiv 2511.20347", min_group=2
    ),
    "ppo": Algorithm(advantage="gae", loss="clip", critic=True, paper="arXiv 1707.06347"),
    "iterative_dpo": Algorithm(advantage="pairs", loss="log_prob", pairs=True, paper="arXiv 2305.18290", min_group=2),
    "kdrl": Algorithm(
        advantage="grpo",
        loss="clip",
        kl=KlTerm(estimator="k2", target="teacher", coef=2e-3, weight="ratio"),
        paper="arXiv 2506.02208",
        min_group=2,
    ),
    "kd_rkl": Algorithm(
        advantage="reinforce",
        loss="clip",
        kl=KlTerm(estimator="k2", target="teacher", coef=1.0, weight="ratio"),
        use_rewards=False,
        paper="arXiv 2506.02208",
    ),
}


def resolve_algorithm(config: Config) -> ResolvedAlgorithm:
    """The row that a config names, with its overrides; raises ConfigError naming key, value and what is allowed."""
    wanted = config.algorithm
    row = ALGORITHMS.get(wanted.name)
    if row is None:
        near = difflib.get_close_matches(wanted.name, ALGORITHMS, n=1)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"algorithm.name={wanted.name!r}: no such row. {guess}There are: {', '.join(ALGORITHMS)}.")
    check_row(row, config)
    spec = _override_spec(replace(LOSSES[row.loss], **row.loss_args), wanted)
    limit, buffer = config.rollout.max_new_tokens, wanted.truncation_buffer
    algorithm = ResolvedAlgorithm(
        advantage=partial(ADVANTAGES[row.advantage], **{**row.advantage_args, **wanted.advantage}),
        spec=spec,
        aggregation=wanted.aggregation or row.aggregation,
        ratio_against=wanted.ratio_against or row.ratio_against,
        kl=_override_kl(row.kl, wanted),
        entropy=EntropyTerm(spec.entropy_coef, wanted.entropy_goal, wanted.entropy_step or EntropyTerm.step),
        use_rewards=row.use_rewards if wanted.use_rewards is None else wanted.use_rewards,
        filter=wanted.filter or row.filter,
        filtered=wanted.filtered or row.filtered,
        truncated=wanted.truncated or row.truncated,
        truncation_penalty=wanted.truncation_penalty,
        truncation_buffer=int(row.truncation_buffer * limit) if buffer is None else buffer,
        greedy_baseline=row.greedy_baseline,
        critic=row.critic,
        pairs=row.pairs,
    )
    check_algorithm(algorithm, config)
    return algorithm


def _override_spec(spec: PolicyLossSpec, wanted: AlgorithmConfig) -> PolicyLossSpec:
    """The spec with the config's keys of the same names; its KL term is the step's, not the config's."""
    names = {f.name for f in fields(PolicyLossSpec)} - {"kl", "kl_coef", "kl_weight"}
    changes = {k: v for k, v in wanted.model_dump().items() if k in names and v is not None}
    try:
        return replace(spec, **changes)
    except ValueError as error:
        raise ConfigError(str(error).replace(f"{PolicyLossSpec.__name__}.", "algorithm.")) from error


def _override_kl(term: KlTerm, wanted: AlgorithmConfig) -> KlTerm:
    """The term with the config's keys: kl is its estimator, kl_x its x. A row's weight falls away where it could not act."""
    keys = {f.name: "kl" if f.name == "estimator" else f"kl_{f.name}" for f in fields(KlTerm)}
    values = {name: getattr(wanted, key) for name, key in keys.items()}
    term = replace(term, **{name: value for name, value in values.items() if value is not None})
    return term if term.weighable else replace(term, weight="none")
