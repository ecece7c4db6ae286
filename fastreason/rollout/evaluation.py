"""One held-out evaluation: every prompt sampled and graded, each response written down, accuracy with its error.

It runs beside the generation of groups, on the same engine, and has a limit of its own: it takes no group's place in admission,
and no group takes its.
"""

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from fastreason.types import EvalResult, Prompt, Sample


async def evaluate(
    prompts: list[Prompt],
    *,
    render: Callable[[Prompt], list[int]],
    sample: Callable[[Prompt, list[int], int], Awaitable[list[Sample]]],
    version: int,
    temperature: float,
    path: Path,
    max_running: int,
    on_progress: Callable[[int, int], None],
) -> EvalResult:
    """Sample and grade every prompt, `max_running` at a time; writes a JSON line per response to `path`.

    accuracy = mean over prompts of the share of right responses; its standard error is that of the prompts' means,
    since responses to one prompt are not independent.
    """
    started = time.perf_counter()
    turn = asyncio.Semaphore(max_running)
    done = 0

    async def one(index: int, prompt: Prompt) -> list[Sample]:
        nonlocal done
        async with turn:
            samples = await sample(prompt, render(prompt), index)
        done += 1
        on_progress(done, len(prompts))
        return samples

    on_progress(0, len(prompts))
    answers = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
    encoder = msgspec.json.Encoder()
    with open(path, "wb") as file:
        for prompt, samples in zip(prompts, answers, strict=True):
            for response in samples:
                row = {
                    "prompt_id": prompt.id,
                    "problem": prompt.text,
                    "answer": prompt.answer,
                    "completion": response.text,
                    "reward": response.reward,
                    "correct": bool(response.grade and response.grade.correct),
                    "finish_reason": response.finish_reason,
                    "num_tokens": len(response.token_ids),
                }
                file.write(encoder.encode(row) + b"\n")
    return summarise(answers, version=version, temperature=temperature, wall_s=time.perf_counter() - started)


def summarise(answers: list[list[Sample]], *, version: int, temperature: float, wall_s: float) -> EvalResult:
    """Accuracy and its standard error from the graded responses of each prompt."""
    shares = [statistics.fmean(s.grade is not None and s.grade.correct for s in samples) for samples in answers]
    samples = [sample for group in answers for sample in group]
    error = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return EvalResult(
        accuracy=statistics.fmean(shares),
        standard_error=error,
        reward_mean=statistics.fmean(s.reward for s in samples),
        num_samples=len(samples),
        num_prompts=len(answers),
        num_tokens=sum(len(s.token_ids) for s in samples),
        truncated_share=statistics.fmean(s.truncated for s in samples),
        temperature=temperature,
        wall_s=wall_s,
        version=version,
    )
