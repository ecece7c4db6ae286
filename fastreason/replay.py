"""Groups on disk, for the phases of a run alone: generation writes them, training reads them again.

A folder of files `batch-000001.msgpack`, each the groups of one batch. Owns their format and stands in for the producer
where a trainer runs without one; starts no engine, generates nothing, and changes no group: what it hands over has the
token versions that it was sampled with.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from fastreason.config import Config
from fastreason.errors import ConfigError, DataError, InterruptedWaitError
from fastreason.rollout.wire import Batch
from fastreason.types import EvalResult, Group, LoadReport, WeightUpdate

REPLAYED = b"replayed groups"  # in place of the producer's state, in the checkpoints of a trainer that had none

_NAME = re.compile(r"batch-(\d{6,})\.msgpack")
_decoder = msgspec.msgpack.Decoder(list[Group])


def batch_path(folder: Path, number: int) -> Path:
    """The file of a batch; the first one has the number 1."""
    return folder / f"batch-{number:06d}.msgpack"


def write_batch(folder: Path, number: int, groups: list[Group]) -> Path:
    """Write a batch aside, rename it into place and return its path; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = batch_path(folder, number)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(msgspec.msgpack.encode(groups))
    os.replace(aside, path)
    return path


def count_batches(folder: Path) -> int:
    """How many batches there are, from the first one on without a gap; 0 for a folder that does not exist.

    Raises DataError where a number is missing below the highest.
    """
    names = [found for path in folder.glob("batch-*") if (found := _NAME.fullmatch(path.name))]
    numbers = {int(name[1]) for name in names}
    missing = set(range(1, max(numbers, default=0) + 1)) - numbers
    if missing:
        raise DataError(
            f"{folder}: {batch_path(folder, min(missing)).name} is missing, and later batches are there. "
            "Write them again: fastreason train CONFIG --only rollout"
        )
    return len(numbers)


def read_batch(folder: Path, number: int) -> list[Group]:
    """The graded groups of one batch; raises DataError with the file's name where it holds anything else."""
    path = batch_path(folder, number)
    try:
        groups = _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} is no batch of groups: {error}. Write it again.") from error
    for group in groups:
        where = f"{path}, ticket {group.ticket}"
        for sample in group.samples:
            if sample.grade is None:
                raise DataError(f"{where}: a sample has no grade. Write the groups again.")
            lengths = {len(sample.token_ids), len(sample.sampler_logp), len(sample.token_versions)}
            if len(lengths) > 1:
                raise DataError(
                    f"{where}: {len(sample.token_ids)} tokens have {len(sample.sampler_logp)} log-probabilities and "
                    f"{len(sample.token_versions)} versions. Write the groups again."
                )
            if sample.teacher_logp is not None and len(sample.teacher_logp) != len(sample.token_ids):
                raise DataError(
                    f"{where}: {len(sample.token_ids)} tokens have {len(sample.teacher_logp)} log-probabilities of a teacher. "
                    "Write the groups again."
                )
    return groups


def check_batches(folder: Path, config: Config, done: int = 0, *, greedy: bool = False, scored: bool = False) -> None:
    """Read all batches that a run will train on, of which `done` are trained already.

    greedy, scored: whether the algorithm needs the reward of a greedy response, and the scores of a teacher's server. Raises
    ConfigError where there are too few batches, or they are of another size than the config's or without what is needed;
    DataError where one cannot be read.
    """
    num, steps = count_batches(folder), config.train.steps
    if num < steps:
        raise ConfigError(
            f"--groups {folder}: {num or 'no'} batch(es) there, train.steps={steps}. "
            + (f"Pass train.steps={num}, or write more" if num else "Write them first")
            + ": fastreason train CONFIG --only rollout"
        )
    wanted = {
        "train.prompts_per_step": config.train.prompts_per_step,
        "rollout.samples_per_prompt": config.rollout.samples_per_prompt,
    }
    for number in range(done + 1, steps + 1):
        groups = read_batch(folder, number)
        found = [("train.prompts_per_step", len(groups))]
        found += [("rollout.samples_per_prompt", len(group.samples)) for group in groups]
        for key, size in found:
            if size != wanted[key]:
                raise ConfigError(
                    f"{batch_path(folder, number)} was written with {key}={size}, this run has {key}={wanted[key]}. "
                    f"Pass {key}={size}, or write the groups again."
                )
        for group in groups:
            if greedy and group.greedy_reward is None:
                lacks = f"a greedy response, which algorithm.name={config.algorithm.name} compares with"
            elif scored and not group.is_scored:
                lacks = "a teacher's log-probabilities, which teacher.where=server takes from there"
            else:
                continue
            raise ConfigError(
                f"{batch_path(folder, number)}, ticket {group.ticket}: written without {lacks}. Write the groups again with "
                "this config: fastreason train CONFIG --only rollout"
            )


class Deliveries(Protocol):
    """The producer's client, as far as it gives batches."""

    def next_batch(self) -> Batch: ...


def collect(client: Deliveries, folder: Path, num_batches: int, on_batch: Callable[[int], None]) -> int:
    """Write the batches that a started `client` gives, and return how many: fewer where the run is told to stop.

    `on_batch(number)` is called once that batch is in the folder.
    """
    for number in range(1, num_batches + 1):
        try:
            batch = client.next_batch()
        except InterruptedWaitError:
            return number - 1
        write_batch(folder, number, batch.groups)
        on_batch(number)
    return num_batches


class ReplayRollouts:
    """The loop's `Rollouts` over a folder of batches: step k trains on batch k, also after a resume.

    There is no engine: publishing loads nothing, and there is nothing to evaluate with.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0

    def start(self, version: int, trained: int, state: bytes | None) -> None:
        """Go on behind the `version` batches that the weights have been trained on."""
        self._number = version

    def next_batch(self) -> Batch:
        """Raises DataError where the file is missing or cannot be read."""
        self._number += 1
        return Batch(groups=read_batch(self._folder, self._number), generate_s=0.0, grade_s=0.0, figures={})

    def publish(self, update: WeightUpdate, trained: int) -> LoadReport:
        return LoadReport(version=update.version, checksum=update.checksum, num_tensors=0, held_bytes=0)

    def evaluate(self, name: str) -> EvalResult:
        raise ConfigError("eval.num_prompts: --only train has no engine to evaluate with. Pass eval.num_prompts=0.")

    def save_state(self, trained: int, settle: bool) -> bytes:
        return REPLAYED

    def stop(self) -> None:
        """There is nobody to tell."""
