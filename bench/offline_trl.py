"""TRL's side of bench/offline.py: SFTTrainer or DPOTrainer on the job of a fastreason config, in this process.

    python bench/offline_trl.py JOB.yaml OUT.jsonl --setting packed|flat|padded [--micro-batch 4] [--pack-tokens 1024]

Writes a JSON line per update. The rows are those that `fastreason train` makes of the same config: the same token ids, trained
tokens and order of updates. How TRL lays them out is its own, by the setting.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset
from trl_arguments import training_arguments

from fastreason.config import Config, load_config
from fastreason.data.traces import Trace, TraceOrder, Traces
from fastreason.models import edited_model, resolve_model
from fastreason.objectives import resolve_objective
from fastreason.offline_data import tokenize

SETTINGS = ("packed", "flat", "padded")


def updates_of(config: Config, folder: Path) -> list[list[Trace]]:
    """The rows of each update, as `fastreason train` takes them; within an update the longest first, which pads least."""
    tokenize(config, folder)
    traces = Traces(folder)
    order = TraceOrder(len(traces), config.train.prompts_per_step, config.run.seed)
    return [
        sorted((traces[i] for i in order.batch(step)), key=num_tokens, reverse=True)
        for step in range(config.train.steps)
    ]


def num_tokens(trace: Trace) -> int:
    return len(trace.prompt) + max(map(len, trace.responses))


def sft_columns(trace: Trace) -> dict[str, list[int]]:
    """What SFTTrainer takes as prepared: prompts are not in the loss."""
    response = trace.responses[0]
    return {"input_ids": trace.prompt + response, "labels": [-100] * len(trace.prompt) + response}


def dpo_columns(trace: Trace) -> dict[str, list[int]]:
    chosen, rejected = trace.responses
    return {"prompt_ids": trace.prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def micro_batches(batch: int, micro_batch: int) -> dict[str, int]:
    """Raises SystemExit where the rows of an update cannot be divided so."""
    if batch % micro_batch:
        raise SystemExit(f"--trl-micro-batch {micro_batch} does not divide the {batch} rows or pairs of an update")
    return {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": batch // micro_batch}


def pack_length(lengths: Sequence[int], most: int, count: Callable[[Sequence[int], int], int]) -> int:
    """The shortest length of packs of which `count(lengths, length)` needs at most `most`: the tightest packing."""
    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(lengths, middle) <= most else (middle + 1, high)
    return low


def num_packs(lengths: Sequence[int], length: int) -> int:
    """Packs that TRL's best-fit decreasing makes of rows of these lengths."""
    rows = Dataset.from_dict({"input_ids": [[0] * each for each in lengths]})
    return len(pack_dataset(rows, length, "bfd"))


def sft_layout(
    setting: str,
    updates: Sequence[Sequence[Trace]],
    micro_batch: int,
    pack_tokens: int,
    count: Callable[[Sequence[int], int], int] = num_packs,
) -> dict[str, Any]:
    """How SFTTrainer is to lay out the rows, in its keys.

    packed: all rows of the run in equally many packs of about `pack_tokens` for each update, which so takes other rows than
    ours and as many. flat: the rows of a micro-batch one behind the other. padded: side by side.
    """
    if setting != "packed":
        laid = {"padding_free": setting == "flat", "max_length": None}
        return laid | micro_batches(len(updates[0]), micro_batch)
    lengths = [num_tokens(trace) for update in updates for trace in update]
    num = math.ceil(sum(lengths) / len(updates) / pack_tokens)
    return {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": pack_length(lengths, num * len(updates), count),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": num,
    }


class Counted:
    """Counts the tokens of the rows that pass through `training_step`, and those of them in the loss."""

    tokens = tokens_in_loss = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        self.tokens += ids.numel() if mask is None else int(mask.sum())
        trained = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"]
        self.tokens_in_loss += int(trained.sum())
        return super().training_step(model, inputs, *rest)  # type: ignore[misc]


class CountedSFTTrainer(Counted, SFTTrainer):
    pass


class CountedDPOTrainer(Counted, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        # It is prepared: DPOTrainer itself would tokenize texts, and train the newline behind the end of a turn as well.
        return dataset


class Recorder(TrainerCallback):
    """Writes each update's seconds, tokens and loss; what the trainer does between two updates counts for the second."""

    def __init__(self, out: Path) -> None:
        self._file = open(out, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.trainer: Any = None
        self._step: dict[str, Any] = {}
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, ended = self.trainer, time.perf_counter()
        self._step = {"seconds": ended - self._started, "tokens": trainer.tokens}
        self._step["tokens_in_loss"] = trainer.tokens_in_loss
        trainer.tokens = trainer.tokens_in_loss = 0
        self._started = ended

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._file.write(json.dumps({**self._step, "loss": float(logs["loss"])}) + "\n")


def make_trainer(
    config: Config, updates: Sequence[Sequence[Trace]], options: argparse.Namespace, model: Path, folder: str
) -> Any:
    """The trainer of the config's objective, with its rows in the order of the updates."""
    objective = resolve_objective(config)
    arguments = training_arguments(config, folder, options.attention, cuda=False)
    arguments["train_sampling_strategy"] = "sequential"
    columns = dpo_columns if objective.pairs else sft_columns
    shared = {
        "model": str(model),
        "train_dataset": Dataset.from_list([columns(trace) for update in updates for trace in update]),
        "processing_class": AutoTokenizer.from_pretrained(model),
    }
    if not objective.pairs:
        arguments |= sft_layout(options.setting, updates, options.micro_batch, options.pack_tokens)
        return CountedSFTTrainer(args=SFTConfig(**arguments), **shared)
    if options.setting != "padded":
        raise SystemExit(f"--setting {options.setting}: DPOTrainer of TRL 1.16 pads, whatever it is told")
    arguments |= micro_batches(len(updates[0]), options.micro_batch)
    arguments |= {"beta": objective.beta, "precompute_ref_log_probs": True, "max_length": None}
    return CountedDPOTrainer(args=DPOConfig(**arguments), **shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, required=True)
    parser.add_argument("--micro-batch", type=int, default=4, help="rows, or pairs")
    parser.add_argument("--pack-tokens", type=int, default=1024, help="setting packed: about so long is a pack")
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    config = load_config(options.job)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        updates = updates_of(config, Path(folder) / "traces")
        model = edited_model(resolve_model(config.model), config.model, Path(folder) / "model")
        trainer = make_trainer(config, updates, options, model, folder)
        recorder = Recorder(options.out)
        recorder.trainer = trainer
        trainer.add_callback(recorder)
        trainer.train()


if __name__ == "__main__":
    main()
