"""A fastreason job in the terms of TRL's trainers: what is the same for all of them, translated and never repeated."""

from __future__ import annotations

from typing import Any

from fastreason_kernels import PolicyLossSpec

from fastreason.config import Config


def training_arguments(config: Config, folder: str, attention: str, cuda: bool) -> dict[str, Any]:
    """Model, optimizer, precision and length of the run, without anything written but to the log.

    bf16 is autocast over fp32 weights, which is how TRL trains in bf16 with fp32 master weights.
    """
    train = config.train
    return {
        "output_dir": folder,
        "use_cpu": not cuda,
        "bf16": config.model.dtype == "bfloat16",
        "model_init_kwargs": {"attn_implementation": attention},
        "gradient_checkpointing": config.model.gradient_checkpointing,
        "max_steps": train.steps,
        "learning_rate": train.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_eps,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": config.run.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def policy_arguments(spec: PolicyLossSpec) -> dict[str, Any]:
    """GRPO's own: the clip of `spec`, one update a generation, no KL, the rows in the order of the data."""
    return {
        "shuffle_dataset": False,
        "beta": 0.0,
        "num_iterations": 1,
        "epsilon": spec.clip_low,
        "epsilon_high": spec.clip_high,
    }
