"""The model that bench/train.py trains, as the command line names it: its settings, its shape, and itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from fastreason.config import ModelConfig
from fastreason.plan.shapes import Shape, named_shape, shape_of


def random_model(shape: Shape, dtype: str, device: str, attention: str) -> Any:
    """A causal LM of a shape with random weights, made on the device: no file of them is needed to measure."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        tie_word_embeddings=shape.tied,
        attn_implementation=attention,
        max_position_embeddings=1 << 17,
    )
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_policy(options: argparse.Namespace, model: ModelConfig, shape: Shape) -> Any:
    """Our policy: of a shape with random weights, else of the model's folder."""
    from fastreason.policy import Policy, load_policy

    if not options.shape:
        return load_policy(Path(model.path), model, options.device, options.attention, liger=options.liger)
    body = random_model(shape, model.dtype, options.device, options.attention)
    if model.gradient_checkpointing:
        body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(body).train()


def model_and_shape(options: argparse.Namespace) -> tuple[ModelConfig, Shape]:
    """The settings of the model, its dtype known and its path a folder, and its shape: --shape, else that of --model."""
    from fastreason.models import read_model_config, resolve_model
    from fastreason.preflight import choose_dtype

    dtype = choose_dtype(options.dtype, options.device)
    model = ModelConfig(path=options.model, dtype=dtype, gradient_checkpointing=options.checkpointing)
    if options.shape:
        return model, named_shape(options.shape)
    folder = resolve_model(model)
    shape = shape_of(read_model_config(folder), options.model)
    return model.model_copy(update={"path": str(folder)}), shape
