"""samples.jsonl: graded responses, one a line, appended as they finish; what is there is found again after a kill.

It owns the file and where each response stands in it; texts stay on disk. It refuses to mix responses that were
sampled in different ways, responses to different problems under one id, and two writers.
"""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fastreason.errors import ConfigError, DataError
from fastreason.rollout.line_file import Line, LineFile, replace_file
from fastreason.types import Grade, Prompt

SAMPLES_FILE, SETTINGS_FILE = "samples.jsonl", "sampling.json"


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One line: response number `sample` to a problem, and the verdict on it.

    `num_tokens` counts the generated tokens (the end token included); it and `finish_reason` ("stop" | "length") are null
    where nobody said. `refusal` is why whoever was asked does not answer the question: then there is no response to judge.
    """

    id: str
    sample: int
    problem: str
    answer: str | None
    response: str
    num_tokens: int | None
    finish_reason: str | None
    correct: bool
    reward: float
    timed_out: bool = False
    refusal: str | None = None

    @property
    def refused(self) -> bool:
        return self.refusal is not None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A response before it is graded; None where the source does not say. `refusal`: why there is none, nor will be.

    `logp_sum` is its log-probability under the distribution that it was sampled from, nats.
    """

    text: str
    num_tokens: int | None = None
    finish_reason: str | None = None
    refusal: str | None = None
    logp_sum: float | None = None

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Kept(NamedTuple):
    """A response without its text: where its line stands, and what a choice among responses needs to know."""

    sample: int
    offset: int
    num_bytes: int
    correct: bool
    truncated: bool
    num_tokens: int | None
    num_chars: int
    empty: bool
    refused: bool
    timed_out: bool


class SampleStore:
    """The responses in one folder; `kept[id][sample]` are those there. Only one process at a time may hold it.

    Raises ConfigError where another process holds it, and DataError where a line in the middle cannot be read or comes twice.
    `add` raises DataError where the disk is full. A last line without its end, which is what a kill leaves, is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES_FILE
        self.kept: dict[str, dict[int, Kept]] = {}
        self._problems: dict[str, bytes] = {}
        self._file = LineFile(self.path)
        self._file.scan(partial(self._index, msgspec.json.Decoder(Response)))

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def record(self, prompt: Prompt, sample: int, reply: Reply, grade: Grade) -> Response:
        """Add response number `sample` to a prompt, as it was judged; returns it."""
        response = Response(
            id=prompt.id,
            sample=sample,
            problem=prompt.text,
            answer=prompt.answer,
            response=reply.text,
            num_tokens=reply.num_tokens,
            finish_reason=reply.finish_reason,
            correct=grade.correct,
            reward=grade.reward,
            timed_out=grade.timed_out,
            refusal=reply.refusal,
        )
        self.add(response)
        return response

    def add(self, response: Response) -> Kept:
        """Append one whole line in one write, so that a kill loses no other; nothing is left of one that did not fit."""
        line = msgspec.json.encode(response) + b"\n"
        return self._note(response, self._file.append(line), len(line), "the new response")

    def read(self, kept: Kept) -> Response:
        """The whole of a response that is kept."""
        return msgspec.json.decode(self._file.read(kept.offset, kept.num_bytes), type=Response)

    def check_problems(self, prompts: Iterable[Prompt]) -> None:
        """Raise ConfigError where the responses under a prompt's id are to another problem, or judged by another answer."""
        for prompt in prompts:
            if self._problems.get(prompt.id, identity := _identity(prompt.text, prompt.answer)) != identity:
                raise ConfigError(
                    f"{self.path} holds responses to another problem, or with another gold answer, under the id "
                    f"{prompt.id!r}: the section data has changed. Set it back, or use another folder."
                )

    def close(self) -> None:
        """Bring everything to the disk and let go of the lock. May be called twice."""
        self._file.close()

    def _index(self, decoder: msgspec.json.Decoder[Response], line: Line) -> None:
        place = f"{self.path}, line {line.number}"
        try:
            response = decoder.decode(line.content)
        except msgspec.DecodeError as error:
            raise DataError(f"{place} is no graded response: {error}. Repair or delete the line.") from error
        self._note(response, line.offset, len(line.content), place)

    def _note(self, response: Response, offset: int, num_bytes: int, place: str) -> Kept:
        identity = _identity(response.problem, response.answer)
        if self._problems.setdefault(response.id, identity) != identity:
            raise DataError(f"{place}: the id {response.id!r} was another problem's before. Delete the line.")
        of_problem = self.kept.setdefault(response.id, {})
        if response.sample in of_problem:
            raise DataError(f"{place}: response {response.sample} to {response.id!r} is there twice. Delete the line.")
        kept = Kept(
            sample=response.sample,
            offset=offset,
            num_bytes=num_bytes,
            correct=response.correct,
            truncated=response.truncated,
            num_tokens=response.num_tokens,
            num_chars=len(response.response),
            empty=not response.response.strip(),
            refused=response.refused,
            timed_out=response.timed_out,
        )
        of_problem[response.sample] = kept
        return kept


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write down how the responses of a folder are sampled; raises ConfigError where those there were sampled otherwise."""
    path, samples = folder / SETTINGS_FILE, folder / SAMPLES_FILE
    asked = msgspec.json.decode(msgspec.json.encode(dict(settings)))
    if not samples.is_file() or samples.stat().st_size == 0:
        replace_file(path, [msgspec.json.format(msgspec.json.encode(asked)) + b"\n"])
        return
    try:
        held = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path}: how the responses there were sampled cannot be read: {error}. Use another folder."
        ) from None
    differing = [key for key in sorted({*held, *asked}) if held.get(key) != asked.get(key)]
    if differing:
        told = "; ".join(f"{key}={held.get(key)!r} then, {asked.get(key)!r} now" for key in differing)
        raise ConfigError(
            f"--out {folder}: the responses there were made in another way, and would be mixed: {told}. Set it back, or use "
            "another folder."
        )


def _identity(problem: str, answer: str | None) -> bytes:
    return hashlib.blake2b(repr((problem, answer)).encode("utf-8", "replace"), digest_size=12).digest()
