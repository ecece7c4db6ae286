"""What a config asks of an algorithm and cannot work, or could not have an effect: refused before anything starts.

Each check reads a resolved algorithm and the config beside it, and raises ConfigError with the key, the value, what is
allowed and what to do. It decides nothing: a value that passes is used as it stands. What works, but not as its formula
says, is in `algorithm_warnings`, which the command line prints.
"""

from typing import TYPE_CHECKING

from fastreason.advantages import advantage_arguments
from fastreason.config import Config, updates_prompts
from fastreason.errors import ConfigError
from fastreason.sections import Section

if TYPE_CHECKING:
    from fastreason.algorithms import Algorithm, ResolvedAlgorithm

# Keys of the KL term, and what each of them needs beside an estimator.
KL_KEYS = {
    "kl_coef": None,
    "kl_place": None,
    "kl_target": None,
    "kl_schedule": None,
    "kl_mask": None,
    "kl_anneal": ("schedule", "annealed"),
    "kl_floor": ("schedule", "annealed"),
    "kl_goal": ("schedule", "adaptive"),
    "kl_horizon": ("schedule", "adaptive"),
    "kl_top_k": ("estimator", "top_k"),
}


def check_row(row: "Algorithm", config: Config) -> None:
    """Raise ConfigError where the row's advantage does not take an argument, or the groups are too small for it."""
    wanted, size = config.algorithm, config.rollout.samples_per_prompt
    allowed = advantage_arguments(row.advantage)
    for key in wanted.advantage:
        if key not in allowed:
            raise ConfigError(
                f"algorithm.advantage.{key}: {row.advantage!r} has no such argument; it takes: "
                f"{', '.join(allowed) or 'none'}."
            )
    if size < row.min_group:
        raise ConfigError(
            f"rollout.samples_per_prompt={size} with algorithm.name={wanted.name}: it compares the samples of a prompt and "
            f"needs at least {row.min_group}. Raise it, or use algorithm.name=reinforce."
        )


def check_algorithm(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Every check of a resolved algorithm."""
    check_ratio(algorithm, config)
    check_importance(algorithm, config)
    check_left_out(algorithm, config)
    check_kl(algorithm, config)
    check_kl_place(algorithm, config)
    check_kind(algorithm, config)
    check_models(algorithm, config)


def check_ratio(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where keys of the ratio and its gate could have no effect."""
    wanted, spec = config.algorithm, algorithm.spec
    clips = spec.ratio != "none" and spec.gate != "sapo"
    for key in ("clip_low", "clip_high"):
        require_use(wanted, key, clips, "a ratio, and a gate other than sapo")
    for key in ("sapo_tau_pos", "sapo_tau_neg"):
        require_use(wanted, key, spec.gate == "sapo", "algorithm.gate=sapo")
    compares = spec.ratio != "none" or spec.importance != "none" or algorithm.kl.weight == "ratio"
    require_use(wanted, "ratio_against", compares, "a ratio, importance weights or algorithm.kl_weight=ratio")
    require_use(wanted, "entropy_step", wanted.entropy_goal is not None, "algorithm.entropy_goal")


def check_importance(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where importance weights, or their keys, could have no effect."""
    spec = algorithm.spec
    if spec.importance == "none":
        for key in ("importance_level", "importance_cap", "importance_floor"):
            require_use(config.algorithm, key, False, "algorithm.importance=truncate or mask")
    elif algorithm.ratio_against == "sampler":
        raise ConfigError(
            f"algorithm.importance={spec.importance} with algorithm.ratio_against=sampler: that ratio corrects for the "
            "sampler by itself, and a weight would do it twice. Use algorithm.ratio_against=trainer, or "
            "algorithm.importance=none."
        )


def check_left_out(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where a filter leaves nothing, or keys of filters and of truncation could have no effect."""
    wanted, rollout = config.algorithm, config.rollout
    penalises, refills = algorithm.truncated == "penalise", algorithm.filtered == "refill"
    require_use(wanted, "filtered", algorithm.filter != "none", "algorithm.filter other than none")
    require_use(wanted, "max_refills", algorithm.filter != "none" and refills, "algorithm.filtered=refill")
    for key in ("truncation_penalty", "truncation_buffer"):
        require_use(wanted, key, penalises, "algorithm.truncated=penalise")
    if algorithm.filter in ("constant", "both") and rollout.samples_per_prompt == 1:
        raise ConfigError(
            f"algorithm.filter={algorithm.filter} with rollout.samples_per_prompt=1: every group of one response is left "
            "out. Raise rollout.samples_per_prompt, or use algorithm.filter=none."
        )
    if penalises and algorithm.truncation_buffer > rollout.max_new_tokens:
        raise ConfigError(
            f"algorithm.truncation_buffer={algorithm.truncation_buffer} is more than "
            f"rollout.max_new_tokens={rollout.max_new_tokens}: it counts the last tokens before that limit. Lower it."
        )


def check_kl(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where keys of the KL term could have no effect, or one that it needs is missing."""
    wanted, term = config.algorithm, algorithm.kl
    for key, needed in KL_KEYS.items():
        require_use(wanted, key, term.estimator != "none", "algorithm.kl other than none")
        if needed is not None:
            name, value = needed
            require_use(
                wanted,
                key,
                getattr(term, name) == value,
                f"algorithm.kl{'' if name == 'estimator' else '_' + name}={value}",
            )
    require_use(wanted, "kl_mask_mean", term.mask != "none", "algorithm.kl_mask other than none")
    require_use(wanted, "kl_weight", term.weighable, "algorithm.kl=k2 or k3 and algorithm.kl_place=loss")
    if term.estimator == "none":
        return
    if wanted.kl_coef is None and not term.coef:
        raise ConfigError(
            f"algorithm.kl_coef: missing; algorithm.kl={term.estimator} needs a coefficient, e.g. "
            "algorithm.kl_coef=0.001 (0: measured, not trained on)."
        )
    if term.schedule == "annealed" and not term.anneal:
        raise ConfigError(
            "algorithm.kl_anneal: missing; algorithm.kl_schedule=annealed takes it off kl_coef each step."
        )
    if term.schedule == "annealed" and term.floor > term.coef:
        raise ConfigError(
            f"algorithm.kl_floor={term.floor} is above algorithm.kl_coef={term.coef}: the coefficient falls. Lower it."
        )
    if term.schedule == "adaptive" and not (term.goal and term.coef):
        key = "kl_coef" if term.goal else "kl_goal"
        raise ConfigError(
            f"algorithm.{key}={getattr(wanted, key)} with algorithm.kl_schedule=adaptive: it multiplies kl_coef up or down "
            f"until the KL is kl_goal, nats per token. Set algorithm.{key} to a number above 0."
        )


def check_kl_place(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where the KL term stands where it has no gradient, a wrong one, or nothing to be made of."""
    term, where = algorithm.kl, f"algorithm.kl={algorithm.kl.estimator} with algorithm.kl_place={algorithm.kl.place}"
    if term.estimator == "k1" and term.place == "loss":
        raise ConfigError(
            f"{where}: the gradient of log pi - log target through the policy is that of log pi alone, zero in "
            "expectation, and the target drops out. Use algorithm.kl=k2 (reverse KL) or k3 (forward KL), or "
            "algorithm.kl_place=advantage."
        )
    if term.estimator in ("exact", "top_k") and term.place != "loss":
        raise ConfigError(
            f"{where}: a divergence of whole distributions is a loss. Use algorithm.kl_place=loss, or algorithm.kl=k1."
        )
    if term.estimator in ("exact", "top_k") and term.target == "teacher" and config.teacher.where == "server":
        raise ConfigError(
            f"algorithm.kl={term.estimator} with teacher.where=server: the server gives log-probabilities of the sampled "
            "tokens alone. Use teacher.where=trainer, or algorithm.kl=k2."
        )
    if term.estimator != "none" and term.place == "advantage" and algorithm.spec.ratio == "sequence":
        raise ConfigError(
            f"{where}: a ratio of whole sequences takes one advantage per sequence. Use algorithm.kl_place=loss or reward."
        )
    if term.place == "reward" and term.mask != "none":
        raise ConfigError(
            f"algorithm.kl_mask={term.mask} with algorithm.kl_place=reward: rewards are compared within a group, and a "
            "penalty on some of them would be an advantage of the others. Use algorithm.kl_place=loss or advantage."
        )


def algorithm_warnings(algorithm: "ResolvedAlgorithm", config: Config) -> list[str]:
    """What a person should know of a config that passed every check, before it runs; empty where there is nothing.

    An estimate of the KL on sampled tokens is one of the policy that sampled them. In the advantage or the reward the weights
    of the policy term are its own, in the loss kl_weight gives them. Over the vocabulary it needs none for a token.
    """
    term = algorithm.kl
    causes = _uncorrected(algorithm, config) if term.active and term.sampled else []
    if not causes:
        return []
    sampled = algorithm.ratio_against == "sampler" or algorithm.spec.importance != "none"
    against = "algorithm.ratio_against=sampler, or algorithm.importance=truncate"
    if term.place != "loss":
        ways = "algorithm.ratio=token" if algorithm.spec.ratio == "none" else against
    elif term.weight == "none":
        ways = "algorithm.kl_weight=ratio" if sampled else f"algorithm.kl_weight=ratio with {against}"
    else:
        ways = against
    return [
        f"warning: algorithm.kl={term.estimator} with algorithm.kl_place={term.place} and {' and '.join(causes)}: some tokens "
        "are of an older policy, and the KL term is not weighted by their ratio to it, so that its gradient is biased (as in "
        f"most published code). Use {ways}; or rollout.max_staleness=0 and train.prompts_per_update=null."
    ]


def _uncorrected(algorithm: "ResolvedAlgorithm", config: Config) -> list[str]:
    """Why a KL term's tokens may be of another policy than its weights know of: keys with their values.

    Against the trainer's own log-probabilities a ratio knows of the step's updates alone, an importance weight of the rest.
    """
    train, staleness, spec = config.train, config.rollout.max_staleness, algorithm.spec
    in_loss = algorithm.kl.place == "loss"
    rated = algorithm.kl.weight == "ratio" if in_loss else spec.ratio != "none"
    weighed = spec.importance != "none" and (rated or not in_loss)
    causes = []
    if staleness and not weighed and not (rated and algorithm.ratio_against == "sampler"):
        causes.append(f"rollout.max_staleness={staleness}")
    if train.prompts_per_step // updates_prompts(config) > 1 and not rated:
        causes.append(
            f"train.prompts_per_update={train.prompts_per_update} of train.prompts_per_step={train.prompts_per_step}"
        )
    return causes


def check_kind(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where a row that needs more than rewards is asked for what it cannot be combined with."""
    wanted, name = config.algorithm, config.algorithm.name
    if not algorithm.use_rewards:
        if not algorithm.kl.active or algorithm.kl.place == "reward" or algorithm.critic or algorithm.pairs:
            raise ConfigError(
                f"algorithm.use_rewards=false with algorithm.name={name}, algorithm.kl={algorithm.kl.estimator}, "
                f"kl_coef={algorithm.kl.coef}, kl_place={algorithm.kl.place}: nothing else would train. It needs a KL term "
                "in the loss or the advantage, and no critic or pairs; or leave it out."
            )
        without = {
            "advantage": bool(wanted.advantage),
            "truncated": wanted.truncated == "penalise",
            "filter": wanted.filter not in (None, "none") and algorithm.filtered == "zero",
        }
        for key in (key for key, unused in without.items() if unused):
            raise ConfigError(
                f"algorithm.{key}={getattr(wanted, key)}: has no effect with algorithm.use_rewards=false. Leave it out"
                f"{', or use algorithm.filtered=remove or refill' if key == 'filter' else ''}."
            )
    if algorithm.pairs:
        for key in ("aggregation", "entropy_coef", "entropy_goal", "kl"):
            value = getattr(wanted, key)
            if value not in (None, 0, "none"):
                raise ConfigError(
                    f"algorithm.{key}={value} with algorithm.name={name}: its loss is a mean over pairs, with the reference "
                    "inside. Leave the key out."
                )
    if algorithm.critic and algorithm.spec.ratio == "sequence":
        raise ConfigError(
            f"algorithm.ratio=sequence with algorithm.name={name}: a critic gives every token its own advantage. Use "
            "algorithm.ratio=token."
        )


def check_models(algorithm: "ResolvedAlgorithm", config: Config) -> None:
    """Raise ConfigError where a teacher or a critic is missing, or described and not used."""
    teacher, taught = config.teacher, algorithm.compares_with_teacher
    for key in type(teacher).model_fields:
        require_use(teacher, key, taught, "algorithm.kl_target=teacher and algorithm.kl", section="teacher")
    for key in type(config.critic).model_fields:
        require_use(config.critic, key, algorithm.critic, "an algorithm with a critic (ppo)", section="critic")
    if algorithm.critic and config.critic.warmup_steps >= config.train.steps:
        raise ConfigError(
            f"critic.warmup_steps={config.critic.warmup_steps} with train.steps={config.train.steps}: the policy would never "
            "train. Lower critic.warmup_steps."
        )
    if not taught:
        return
    require_use(teacher, "dtype", teacher.where == "trainer", "teacher.where=trainer", section="teacher")
    if teacher.path is None:
        raise ConfigError(
            f"teacher.path: missing; algorithm.name={config.algorithm.name} has algorithm.kl_target=teacher. Give the folder "
            "or hub name of a model with the same tokenizer (with teacher.where=server: of the model that is served)."
        )
    require_use(teacher, "url", teacher.where == "server", "teacher.where=server", section="teacher")
    if teacher.where == "server" and teacher.url is None:
        raise ConfigError("teacher.url: missing; teacher.where=server needs the URL of a running vLLM server.")
    if teacher.url is not None and not teacher.url.startswith(("http://", "https://")):
        raise ConfigError(f"teacher.url={teacher.url!r}: teacher.where=server needs a URL, as http://host:port.")
    if teacher.where == "server" and config.rollout.temperature != 1:
        raise ConfigError(
            f"rollout.temperature={config.rollout.temperature} with teacher.where=server: the server scores at temperature "
            "1, and both sides of the KL need the same. Use rollout.temperature=1, or teacher.where=trainer."
        )


def require_use(wanted: Section, key: str, used: bool, needs: str, section: str = "algorithm") -> None:
    """Raise ConfigError where a key is not at its default, but not used."""
    value = getattr(wanted, key)
    if not used and value != type(wanted).model_fields[key].default:
        raise ConfigError(
            f"{section}.{key}={value}: has no effect without {needs}. Set that too, or leave the key out."
        )
