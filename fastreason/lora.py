"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen model, through peft: the only importer of it.

It owns which layers get one, what such a model is called from outside (merged weights under the names of the model without
an adapter, and the adapter's own), and the folder that other programs load. It refuses to know optimizers, and how weights
lie on the ranks: it names the parameters that must be whole for a weight to be made.
"""

import copy
import importlib.util
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fastreason_kernels import LoraHead
from torch import Tensor, nn

from fastreason.config import LoraConfig, ModelConfig
from fastreason.errors import ConfigError

ADAPTER = "default"  # peft's name of the only adapter of a model
PREFIX = "base_model.model."  # of every name in a file that peft reads
ADAPTER_FILE = "adapter_model.safetensors"


class Weight(NamedTuple):
    """A weight by its Hugging Face name; `make` gives it, without changing anything, while `parameters` are whole."""

    name: str
    parameters: Sequence[Tensor]
    make: Callable[[], Tensor]


def check_lora(lora: LoraConfig, model: ModelConfig, folder: Path | None) -> None:
    """Raise ConfigError where the adapter cannot be had on the model in `folder` (None: that is not known yet).

    Reads config.json and lays the model out without its weights; that takes seconds, and only where layers are named.
    """
    for key in type(lora).model_fields:
        if lora.rank is None and getattr(lora, key) != type(lora).model_fields[key].default:
            raise ConfigError(
                f"lora.{key}={getattr(lora, key)}: has no effect without lora.rank. Set that too, e.g. 16."
            )
    if lora.rank is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            f"lora.rank={lora.rank}: peft is not installed. Run `make setup` (CPU) or pip install 'fastreason[lora]', or leave "
            "section lora out."
        )
    if folder is not None and (lora.head or lora.targets is not None):
        target_layers(laid_out(folder, model), lora)


def laid_out(folder: Path, model: ModelConfig) -> Any:
    """A model without its weights, on torch's meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)


def target_layers(model: Any, lora: LoraConfig) -> list[str]:
    """Ends of the names of the layers that get an adapter, as peft takes them; raises ConfigError for what there is not."""
    head = model.get_output_embeddings()
    heads: set[str] = set()
    names: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            last = name.rpartition(".")[2]
            (heads if module is head else names).add(name if last.isdigit() else last)
    if lora.head and head.weight is model.get_input_embeddings().weight:
        raise ConfigError(
            "lora.head=true: the head of the model of model.path is its embedding, and merged weights could not be both. Use "
            "lora.head=false."
        )
    unknown = sorted(set(lora.targets or ()) - names)
    if unknown:
        raise ConfigError(
            f"lora.targets={lora.targets}: the model of model.path has no linear layer {' or '.join(unknown)}; it has: "
            f"{', '.join(sorted(names))}. For its head, use lora.head=true."
        )
    return sorted([*(names if lora.targets is None else set(lora.targets)), *(heads if lora.head else ())])


def add_adapter(model: Any, lora: LoraConfig) -> None:
    """Freeze a loaded causal LM and put an adapter of product 0 beside its layers, in the dtype of their weights.

    The factors are drawn from torch's generator; they are the only parameters that require a gradient.
    """
    import peft

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=target_layers(model, lora),
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(settings, model, ADAPTER)


def split_head(head: Any) -> tuple[Any, LoraHead | None]:
    """A model's head, and the factors of its adapter where it has one."""
    if not is_adapted(head):
        return head, None
    return head.get_base_layer(), factors(head)


def is_adapted(module: Any) -> bool:
    """Whether a layer has an adapter beside it."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def factors(layer: Any) -> LoraHead:
    """(a [r, D], b [V, r], scale) of a layer with an adapter."""
    return LoraHead(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])


def is_trained_in_part(module: nn.Module) -> bool:
    """Whether some parameters rest: those of a frozen model beside its adapter."""
    return not all(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model as it was without the adapter, as long as the context lasts; nothing is differentiated in it."""
    layers: list[Any] = [module for module in model.modules() if is_adapted(module) or hasattr(module, "pair")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


Spread = Callable[[Tensor, int], None]


@torch.no_grad()
def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, number: int = 0, spread: Spread | None = None) -> Tensor:
    """weight + scale b a, in the dtype of weight [V, D], a new tensor; a [r, D], b [V, r].

    In fp32 to the last bit what peft's merge_and_unload makes. In bf16 it is rounded once, from fp32; peft rounds the product
    first. Either way a product below half of what bf16 resolves would be lost, in all of its elements alike: so `spread` puts
    each fp32 weight, the same every time, anywhere in the cell that rounds to it, and the sum moves by the product in the mean.
    number: of the weight in its model.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.to(dtype, copy=True)
    if spread is not None and weight.dtype == torch.bfloat16:
        spread(whole, number)
    return whole.add_(b.to(dtype) @ a.to(dtype) * scale).to(weight.dtype)


def merged_weights(model: nn.Module, spread: Spread | None = None) -> list[Weight]:
    """Every weight of a model, with or without an adapter, under its name without one; a tied one once. spread: of `merged`."""
    adapted: dict[str, LoraHead] = {
        f"{name}.base_layer.weight": factors(module) for name, module in model.named_modules() if is_adapted(module)
    }
    adapted |= {f"{name}.weight": pair for name, pair in head_pairs(model)}
    found, seen = [], {id(part) for pair in adapted.values() for part in pair[:2]}
    for name, parameter in model.named_parameters():
        # A tied head is the embedding under a second name: absent from a checkpoint, so absent here.
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        plain, pair = name.replace(".base_layer.", "."), adapted.get(name)
        if pair is None:
            found.append(Weight(plain, [parameter], parameter.detach))
        else:
            make = partial(merged, parameter, *pair, number=len(found), spread=spread)
            found.append(Weight(plain, [parameter, *pair[:2]], make))
    return found


def adapter_weights(model: nn.Module) -> list[Weight]:
    """The factors of a model's adapter, named as in a file that peft reads."""
    pairs = [(name, factors(module)) for name, module in model.named_modules() if is_adapted(module)]
    return [
        Weight(f"{PREFIX}{name}.{factor}.weight", [parameter], parameter.detach)
        for name, pair in [*pairs, *head_pairs(model)]
        for factor, parameter in zip(("lora_A", "lora_B"), pair[:2], strict=True)
    ]


def head_pairs(model: nn.Module) -> list[tuple[str, LoraHead]]:
    """(name, factors) of the fused head, where it has an adapter."""
    heads = [(name, getattr(module, "pair", None)) for name, module in model.named_modules()]
    return [(name, pair) for name, pair in heads if pair is not None]


def save_settings(model: Any, base: str, folder: Path) -> None:
    """Write what peft and vLLM must know of an adapter beside its factors: adapter_config.json."""
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.inference_mode, settings.base_model_name_or_path = True, base
    settings.save_pretrained(str(folder))


def write_first_adapter(
    lora: LoraConfig, model: ModelConfig, model_dir: Path, dtype: torch.dtype, target: Path
) -> None:
    """The folder of an adapter whose factors are 0, for an engine to start with; the model is laid out without weights."""
    whole = laid_out(model_dir, model)
    with torch.device("meta"):
        add_adapter(whole, lora)
    factors = ((weight.name, weight.parameters[0]) for weight in adapter_weights(whole))
    zeros = ((name, torch.zeros(factor.shape, dtype=dtype)) for name, factor in factors)
    save_adapter(zeros, whole, model.path, target)


def save_adapter(tensors: Iterable[tuple[str, Tensor]], model: Any, base: str, target: Path) -> None:
    """Write an adapter's folder, which peft and vLLM load, aside and renamed; `base` is what it says it was trained on."""
    from safetensors.torch import save_file

    aside = target.with_name(target.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_settings(model, base, aside)
    save_file({name: tensor.contiguous() for name, tensor in tensors}, aside / ADAPTER_FILE, {"format": "pt"})
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
