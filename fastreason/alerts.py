"""What a person should act on while a run trains: a table of conditions over one step's metrics, each with advice.

Pure: it is fed one metrics dict a step and returns messages. It reads no file, prints nothing and stops no run.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastreason.config import Config

KL_LIMIT = 1.0  # nats per token: a policy that far from its reference no longer resembles it
ESS_FLOOR = 0.5  # of the tokens of a batch: with less, a few of them decide the gradient
PLUNGE = 0.2  # nats per token below the start: chosen and rejected responses both lost more than a fifth of each token
COLLAPSE_FROM = 0.1  # below this accuracy, half of the best is within the noise of a step


@dataclass(frozen=True)
class Rule:
    """One condition: fires when `holds(values of keys)` was true `steps` steps in a row.

    A step that lacks one of the keys says nothing about the rule: it neither counts nor clears. `message` is formatted
    with those values, in order.
    """

    keys: tuple[str, ...]
    steps: int
    holds: Callable[..., bool]
    message: str
    judges_nan: bool = False


class Alerts:
    """Turns a run's metrics into messages: each fires once, and again only after its condition has cleared."""

    def __init__(self, config: Config) -> None:
        self._rules = _rules(config)
        self._streaks = [0] * len(self._rules)

    def feed(self, metrics: Mapping[str, Any]) -> list[str]:
        """Judge one step (a dict of `MetricsLog` or a line of its file) and return what is new, with what to do."""
        messages = []
        for index, rule in enumerate(self._rules):
            if any(key not in metrics for key in rule.keys):
                continue
            # The file has null where the number was not finite.
            values = [math.nan if metrics[key] is None else float(metrics[key]) for key in rule.keys]
            if not rule.judges_nan and any(math.isnan(value) for value in values):
                continue
            self._streaks[index] = self._streaks[index] + 1 if rule.holds(*values) else 0
            if self._streaks[index] == rule.steps:
                messages.append(f"step {int(metrics['step'])}: {rule.message.format(*values)}")
        return messages


class _Collapse:
    """Whether accuracy over the last `window` steps is below half of the best such window seen."""

    def __init__(self, window: int) -> None:
        self._recent: deque[float] = deque(maxlen=window)
        self._best = 0.0

    def __call__(self, accuracy: float) -> bool:
        self._recent.append(accuracy)
        if len(self._recent) < (self._recent.maxlen or 1):
            return False
        mean = sum(self._recent) / len(self._recent)
        self._best = max(self._best, mean)
        return self._best >= COLLAPSE_FROM and mean < self._best / 2


def _rules(config: Config) -> list[Rule]:
    return _reward_rules(config) + _training_rules(config)


def _reward_rules(config: Config) -> list[Rule]:
    after, longest = config.log.warn_after, config.rollout.max_new_tokens
    row = f"{after} step(s) in a row"
    return [
        Rule(
            ("reward/accuracy", "reward/std", "reward/mean"),
            after,
            lambda accuracy, std, _: accuracy == 0 and std < 1e-9,
            f"no response was correct and every reward was {{2:g}}, {row}: there is nothing to learn from. Read "
            "samples.jsonl: if answers are right but graded wrong, mend reward.functions or data.answer_column; if "
            "they are wrong, use easier problems or a stronger model.",
        ),
        Rule(
            ("rollout/truncated_share",),
            after,
            lambda share: share >= 1,
            f"every response was cut off at rollout.max_new_tokens={longest}, {row}: the model never finishes. "
            "Raise rollout.max_new_tokens, or check that the chat template's end token is the model's.",
        ),
        Rule(
            ("rollout/signal_share", "reward/accuracy", "reward/std"),
            after,
            # All rewards equal and wrong is the first rule's case; saying it twice helps nobody.
            lambda share, accuracy, std: share == 0 and not (accuracy == 0 and std < 1e-9),
            f"no group had two different rewards (accuracy {{1:.3f}}), {row}: every advantage is zero. Use problems "
            "that are neither all solved nor all failed, raise rollout.samples_per_prompt, or raise the temperature.",
        ),
        Rule(
            ("reward/timeouts",),
            after,
            lambda timeouts: timeouts > 0,
            f"grading ran past reward.deadline_s={config.reward.deadline_s:g} s, {row}, and counted those responses "
            "as wrong. Raise reward.deadline_s or reward.workers.",
        ),
        Rule(
            ("reward/accuracy",),
            after,
            _Collapse(after),
            "accuracy ({0:.3f}) has fallen below half of the best of this run. Go back to the best checkpoint and "
            f"continue with a lower train.lr (now {config.train.lr:g}) or a smaller clip distance.",
        ),
    ]


def _training_rules(config: Config) -> list[Rule]:
    floor, limit = config.log.entropy_floor, config.rollout.mismatch_warning
    after = config.log.warn_after
    return [
        Rule(
            ("mismatch/ess",),
            after,
            # 0 stands for a step without a token.
            lambda share: 0 < share < ESS_FLOOR,
            f"the effective sample size against the sampler is {{0:.2f}} of the tokens, below {ESS_FLOOR:g}, {after} step(s) "
            "in a row: the batches are too far off-policy. Lower rollout.max_staleness or train.lr, or correct with "
            "algorithm.ratio_against=trainer algorithm.importance=truncate.",
        ),
        Rule(
            ("loss/entropy",),
            1,
            # 0 stands for a step without an update of the policy: a critic that warms up, no pair.
            lambda entropy: 0 < entropy < floor,
            f"token entropy {{0:.4f}} is below log.entropy_floor={floor:g}: the samples of a prompt become the same. "
            "Lower train.lr, raise algorithm.clip_high, or set algorithm.entropy_coef.",
        ),
        Rule(
            ("mismatch/logp_abs_mean", "rollout/staleness_max"),
            1,
            # Against an older sampler the difference holds the policy's own movement, which is no fault.
            lambda mismatch, staleness: staleness == 0 and mismatch > limit,
            f"trainer and sampler disagree by {{0:.4f}} nats per token, above rollout.mismatch_warning={limit:g}: the "
            "ratio is biased. Check that the weights arrive (time/publish_s), that model.dtype is the engine's, and "
            "lower rollout.max_staleness.",
        ),
        Rule(
            ("train/grad_norm",),
            1,
            lambda norm: not math.isfinite(norm),
            "the gradient is not finite. Stop, go back to the last checkpoint and lower train.lr; if it happens at "
            "once, try model.dtype=float32 and model.attn_implementation=eager to find the cause.",
            judges_nan=True,
        ),
        Rule(
            ("logp/chosen_change", "logp/rejected_change"),
            after,
            lambda chosen, rejected: chosen < -PLUNGE and rejected < -PLUNGE,
            f"the log-probabilities of chosen and rejected responses both plunge ({{0:.2f}} and {{1:.2f}} nats per token since "
            f"the start, {after} step(s) in a row): the model collapses. Go back to a checkpoint; lower train.lr (now "
            f"{config.train.lr:g}) or offline.alpha, or raise offline.beta.",
        ),
        Rule(
            ("kl/reference",),  # a teacher may be far away: it is where the policy is to go
            1,
            lambda kl: kl > KL_LIMIT,
            f"KL to the reference is {{0:.2f}} nats per token, above {KL_LIMIT:g}: the policy has left it. Lower "
            "train.lr or raise the algorithm's KL coefficient.",
        ),
    ]
