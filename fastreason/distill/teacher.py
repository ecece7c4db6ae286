"""Who answers: a model in an engine of ours, a server that somebody else runs, or the data itself; and what a sampling is.

A part of the composition root: it chooses the sampler and the graders. It refuses to know what the responses are for.
"""

import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastreason.distill.section import DistillRun, engine_config, named
from fastreason.rollout.sampling_job import EngineSampler, RecordedSampler, Sampler
from fastreason.types import SamplingParams

SAMPLED_BY = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")
RENDERED_BY = ("system_prompt", "user_template", "chat_template")


async def _just(work: Coroutine[Any, Any, None]) -> None:
    await work


@dataclass(frozen=True)
class Teacher:
    """The sampler, what awaits work on it (and sees meanwhile that it lives), and who hears of each response."""

    sampler: Sampler
    beside: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]] = _just
    note_life: Callable[[], None] = lambda: None


def load_tokenizer(config: DistillRun) -> tuple[Path | None, Any | None]:
    """The folder and the tokenizer of the teacher, where it is a model of ours; None and None where it is not."""
    if config.model is None:
        return None, None
    from fastreason.models import resolve_model

    folder = resolve_model(config.model)
    check_length(config, folder)
    from transformers import AutoTokenizer

    return folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)


def check_length(config: DistillRun, folder: Path) -> None:
    """Raise ConfigError where the model's positions do not reach the longest prompt with the longest response."""
    from fastreason.models import max_model_len, read_model_config

    with named(("rollout.max_new_tokens", "distill.max_new_tokens")):
        max_model_len(engine_config(config), read_model_config(folder))


@contextlib.asynccontextmanager
async def open_teacher(config: DistillRun, out: Path, model_dir: Path | None, tokenizer: Any) -> AsyncIterator[Teacher]:
    """Whoever `config` says, answering; raises EngineError where nobody does. Nothing of it is left afterwards."""
    distill = config.distill
    params = SamplingParams(**{key: getattr(distill, key) for key in SAMPLED_BY if key != "seed"})
    if config.source == "recorded":
        yield Teacher(RecordedSampler())
    elif distill.url is not None:
        from fastreason.rollout.served_sampler import ServedSampler

        timeout_s = config.rollout.request_timeout_s
        server = ServedSampler(distill.url, config.data, params, distill.seed, timeout_s, distill.concurrency)
        await server.start()
        try:
            yield Teacher(server)
        finally:
            await server.close()
    else:
        from fastreason.data import render_token_ids
        from fastreason.preflight import choose_device
        from fastreason.serving import served_engine

        assert model_dir is not None
        print(f"starting the engine {config.rollout.engine}", flush=True)
        render = partial(render_token_ids, config=config.data, tokenizer=tokenizer)
        log_path = out / "logs" / "engine.log"
        async with served_engine(engine_config(config), model_dir, log_path, choose_device("auto"), _say) as served:
            sampler = EngineSampler(served.engine, tokenizer, render, params, distill.seed)
            yield Teacher(sampler, served.beside, served.note_life)


def make_grading(config: DistillRun) -> Any:
    """The graders of section reward, not yet started."""
    from fastreason.data import render_messages
    from fastreason.rewards import resolve_rewards
    from fastreason.rollout.graders import GraderPool
    from fastreason.rollout.grading import Grading
    from fastreason.rollout.reward_model import RewardModelClient

    spec = resolve_rewards(config.reward)
    reward_model = RewardModelClient(config.reward) if spec.needs_reward_model else None
    return Grading(spec, GraderPool(config.reward), reward_model, partial(render_messages, config=config.data))


def sampling_settings(config: DistillRun, model_dir: Path | None, tokenizer: Any | None) -> dict[str, Any]:
    """What must be the same for two responses to be of one sampling; where a model's folder is does not matter."""
    settings: dict[str, Any] = {
        "source": config.source,
        "reward.functions": config.reward.functions,
        "reward.range": config.reward.range,
    }
    if config.source == "recorded":
        return settings | {"distill.responses_column": config.distill.responses_column}
    settings |= {f"distill.{key}": getattr(config.distill, key) for key in SAMPLED_BY}
    settings |= {f"data.{key}": getattr(config.data, key) for key in RENDERED_BY}
    if config.model is None:
        return settings | {"distill.url": config.distill.url}
    assert model_dir is not None
    from fastreason.models import checksum, model_checksum

    template = getattr(tokenizer, "chat_template", None) if config.data.chat_template else None
    return settings | {
        "model (checksum)": model_checksum(model_dir),
        "model.dtype": config.model.dtype,
        "chat template (checksum)": checksum([str(template).encode()]) if template else None,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
