"""Which problems are asked: those of section data, less the held-out, the too long, and what the student cannot solve.

It owns the filters on questions and their counts. It refuses a student that was asked other problems.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from fastreason.data import drop_long_prompts, load_problems, split_held_out
from fastreason.data.recorded import recorded_responses
from fastreason.distill.section import DistillRun, named
from fastreason.distill.selection import Passage
from fastreason.errors import ConfigError, DataError
from fastreason.rewards import check_prompts, resolve_rewards
from fastreason.rollout.sample_store import SAMPLES_FILE, Reply, SampleStore
from fastreason.rollout.sampling_job import Ask, missing_asks
from fastreason.types import Prompt


@dataclass(frozen=True)
class Questions:
    """The problems that are asked, and how many of those in the data are not."""

    prompts: list[Prompt]
    passage: Passage


class Solved(msgspec.Struct, frozen=True):
    """What is read of a line of the student's samples."""

    id: str
    problem: str
    correct: bool


def check_recorded(config: DistillRun) -> list[str]:
    """Look at the first responses of the data; returns what stays unchecked without the network."""
    if config.data.source == "hub":
        return [f"data.path={config.data.path!r}: a hub data set; that it exists and has the columns is unchecked"]
    list(islice(recorded_responses(config.data, str(config.distill.responses_column)), 8))
    return []


def load_questions(config: DistillRun, tokenizer: Any | None) -> Questions:
    """The problems of section `data` behind every filter; raises DataError where none is left."""
    distill = config.distill
    if distill.responses_column is not None:
        by_id: dict[str, Prompt] = {}
        for recorded in recorded_responses(config.data, distill.responses_column):
            by_id.setdefault(recorded.prompt.id, recorded.prompt)
        problems = list(by_id.values())
    else:
        problems = load_problems(config.data)
    passage = Passage(len(problems))
    with named(("eval.num_prompts", "distill.held_out"), ("training", "distillation")):
        prompts, _ = split_held_out(problems, distill.held_out, config.data.seed, min_train=0)
    passage.drop("held_out", len(problems) - len(prompts))
    if prompts and tokenizer is not None:
        prompts, num_long = drop_long_prompts(prompts, config.data, tokenizer)
        passage.drop("long_prompt", num_long)
    if distill.student is not None:
        solved = _read_student(distill.student, prompts)
        passage.drop("student_not_asked", sum(prompt.id not in solved for prompt in prompts))
        passage.drop("student_unsolved", sum(solved.get(prompt.id) is False for prompt in prompts))
        prompts = [prompt for prompt in prompts if solved.get(prompt.id)]
    if not prompts:
        raise DataError(
            f"no question is left of {passage.num_in}: {passage.dropped}. Give more problems, or filter fewer."
        )
    check_prompts(resolve_rewards(config.reward), prompts)
    return Questions(prompts, passage)


def wanted(config: DistillRun, questions: Questions, store: SampleStore) -> tuple[Iterable[Ask], int]:
    """What is not there yet, and how many that are."""
    if config.source != "recorded":
        make = partial(missing_asks, questions.prompts, config.distill.samples_per_prompt, store)
    else:
        make = partial(_recorded_asks, config, {prompt.id: prompt for prompt in questions.prompts}, store)
    return make(), sum(1 for _ in make())


def _recorded_asks(config: DistillRun, prompts: dict[str, Prompt], store: SampleStore) -> Iterator[Ask]:
    for recorded in recorded_responses(config.data, str(config.distill.responses_column)):
        id = recorded.prompt.id
        if id in prompts and recorded.sample not in store.kept.get(id, {}):
            reply = Reply(text=recorded.text, num_tokens=recorded.num_tokens, finish_reason=recorded.finish_reason)
            yield Ask(prompt=recorded.prompt, sample=recorded.sample, recorded=reply)


def _read_student(path: str, prompts: Iterable[Prompt]) -> dict[str, bool]:
    """Whether the student had a right response, by question; raises ConfigError where its ids are those of other problems."""
    file, texts = student_file(path), {prompt.id: prompt.text for prompt in prompts}
    decoder, solved = msgspec.json.Decoder(Solved), dict[str, bool]()
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break  # it is being written, or its writer was killed
            try:
                row = decoder.decode(line)
            except msgspec.DecodeError as error:
                raise DataError(
                    f"distill.student={path!r}: line {number} of {file} is no graded response: {error}."
                ) from error
            if texts.get(row.id, row.problem) != row.problem:
                raise ConfigError(
                    f"distill.student={path!r}: line {number} of {file} has another problem under the id {row.id!r} than the "
                    "data here. Sample the student on the same section data."
                )
            solved[row.id] = solved.get(row.id, False) or row.correct
    return solved


def student_file(path: str) -> Path:
    file = Path(path) / SAMPLES_FILE
    if not file.is_file():
        raise ConfigError(
            f"distill.student={path!r}: there is no {file}. Give the folder of a finished run of: fastreason distill CONFIG "
            "model.path=STUDENT --out FOLDER"
        )
    return file
