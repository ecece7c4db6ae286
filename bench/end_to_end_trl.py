"""TRL's side of bench/end_to_end.py: GRPOTrainer on the job of a fastreason config, in this process.

    python bench/end_to_end_trl.py JOB.yaml OUT.jsonl [--micro-batch 32]

Writes a JSON line per step and per evaluation. What the config says is translated, never repeated; what TRL adds by
itself stays as TRL has it: fp32 weights under bf16 autocast, the head over every position on a CPU, on a GPU the
log-probabilities recomputed for its correction of vLLM's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_arguments import policy_arguments, training_arguments

from fastreason.algorithms import resolve_algorithm
from fastreason.config import Config, load_config
from fastreason.data import PromptCursor, load_problems, render_messages, render_token_ids, split_held_out
from fastreason.models import max_model_len, read_model_config, resolve_model
from fastreason.rewards import resolve_rewards
from fastreason.types import Prompt

LOSS_TYPES = {"token_mean": "dapo", "sequence_mean": "grpo", "constant": "dr_grpo"}


def grpo_config(config: Config, micro_batch: int, attention: str, cuda: bool, folder: str) -> GRPOConfig:
    """The job in TRL's terms; one generation and one update a step, as many micro-batches as fit."""
    train, rollout = config.train, config.rollout
    algorithm = resolve_algorithm(config)
    num_samples = train.prompts_per_step * rollout.samples_per_prompt
    if num_samples % micro_batch:
        raise SystemExit(f"--micro-batch {micro_batch} does not divide the {num_samples} samples of a step")
    vllm: dict[str, Any] = {}
    if cuda:
        vllm = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": rollout.gpu_memory_utilization,
            "vllm_max_model_length": config.data.max_prompt_tokens + rollout.max_new_tokens,
        }
    return GRPOConfig(
        **training_arguments(config, folder, attention, cuda),
        **policy_arguments(algorithm.spec),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=num_samples // micro_batch,
        num_generations=rollout.samples_per_prompt,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        loss_type=LOSS_TYPES[algorithm.aggregation],
        scale_rewards="group" if config.algorithm.advantage.get("std", True) else "none",
        **vllm,
    )


class Recorder(TrainerCallback):
    """Writes the steps' seconds and the evaluations; its clock stands still while it evaluates."""

    def __init__(self, out: Path, config: Config, held_out: list[Prompt]) -> None:
        self._file = open(out, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._config, self._held_out = config, held_out
        self._rewards: list[float] = []
        self._trained_s, self._tokens, self._started = 0.0, 0, 0.0
        self.trainer: GRPOTrainer | None = None
        self._spec = resolve_rewards(config.reward)

    def reward(self, texts: list[str], prompts: list[Prompt]) -> list[float]:
        """The step's rewards; graded here, without a process of their own."""
        self._rewards = [self._spec.grade(text, prompt).reward for text, prompt in zip(texts, prompts, strict=True)]
        return self._rewards

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._evaluate()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = time.perf_counter() - self._started
        tokens, self._tokens = state.num_input_tokens_seen - self._tokens, state.num_input_tokens_seen
        self._trained_s += seconds
        step = {"seconds": seconds, "tokens": tokens, "reward": statistics.fmean(self._rewards)}
        self._write({"step": step})
        every, steps = self._config.eval.every, self._config.train.steps
        if state.global_step == steps or (every and state.global_step % every == 0):
            self._evaluate()
        self._started = time.perf_counter()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Held-out accuracy with TRL's own generation, as many samples at once as in a step."""
        trainer, config = self.trainer, self._config
        if not self._held_out:
            return
        assert trainer is not None
        tokenizer = trainer.processing_class
        prompts = [prompt for prompt in self._held_out for _ in range(config.eval.samples_per_prompt)]
        size = config.train.prompts_per_step * config.rollout.samples_per_prompt
        right = []
        for first in range(0, len(prompts), size):
            some = prompts[first : first + size]
            ids = [render_token_ids(prompt, config.data, tokenizer) for prompt in some]
            completions, _ = trainer._generate_single_turn(ids, None, {}, config.eval.samples_per_prompt)
            texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
            right += [self._spec.grade(text, prompt).correct for text, prompt in zip(texts, some, strict=True)]
        self._write({"eval": [self._trained_s, statistics.fmean(right)]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--attention", default="sdpa")
    options = parser.parse_args()
    config = load_config(options.job)
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = resolve_model(config.model)
    max_model_len(config, read_model_config(model))
    train, held_out = split_held_out(load_problems(config.data), config.eval.num_prompts, config.data.seed)
    cursor = PromptCursor(train, config.run.seed)
    prompts = [cursor.next() for _ in range(config.train.steps * config.train.prompts_per_step)]
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    recorder = Recorder(options.out, config, held_out)

    def right_answer(completions: list[Any], number: list[int], **_: Any) -> list[float]:
        return recorder.reward([answer[0]["content"] for answer in completions], [prompts[i] for i in number])

    rows = [{"prompt": render_messages(p, config.data), "number": i} for i, p in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model),
            reward_funcs=right_answer,
            args=grpo_config(config, options.micro_batch, options.attention, cuda, folder),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        recorder.trainer = trainer
        ids = trainer._tokenize_prompts([rows[0]["prompt"]])[0][0]
        assert list(ids) == render_token_ids(prompts[0], config.data, tokenizer), "the two sides see other prompts"
        trainer.train()


if __name__ == "__main__":
    main()
