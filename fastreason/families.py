"""What differs between families of models: how a head scales or caps its logits, caps of attention scores, windows.

It owns what is read from a model's config for that, and the test of a loaded model against what was read. It refuses to
know how a head is computed (`policy.py`) and where a model comes from (`models.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastreason_kernels.transform import IDENTITY, Transform
from torch import Tensor

from fastreason.errors import ModelError

# Keys of a config that say what a head does to hidden @ weight.T + bias: by key, the factor of its value. Granite divides.
SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,
    "lm_head_multiplier": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
}
# Model types that use a key of that name the other way.
EXCEPTIONS: dict[tuple[str, str], Callable[[float], float]] = {("hyperclovax", "logits_scaling"): lambda value: value}
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")

# The largest logit of the test, where any cap shows, and how far a rounding to bf16 may take its results.
PROBE_LOGIT = 100.0
PROBE_ERROR = 0.02


def head_transform(config: Any) -> Transform:
    """What a model's head does to a raw logit, from its config: z = softcap tanh(scale raw / softcap), or scale raw.

    Raises ModelError for a value that is no number above 0.
    """
    text = config.get_text_config()
    transform = IDENTITY
    for key in (*SCALES, *SOFTCAPS):
        if (value := getattr(text, key, None)) is None:
            continue
        try:
            if key in SOFTCAPS:
                transform = Transform(transform.scale, float(value))
            else:
                factor = EXCEPTIONS.get((text.model_type, key), SCALES[key])
                transform = Transform(transform.scale * float(factor(value)), transform.softcap)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(
                f"model.path: {key}={value!r} in the config of a {text.model_type} model: {error}. Allowed: a number > 0."
            ) from error
    return transform


@torch.no_grad()
def check_head(model: Any, transform: Transform, folder: Path | str) -> None:
    """Raise ModelError where a loaded causal LM's logits are not its head's product of its body's states, under `transform`.

    The model is asked for the logits of three tokens, with its states blown up, so that the largest raw logit is 100: a
    scale, a cap or a norm that its config did not tell shows.
    """
    head = model.get_output_embeddings()
    kind = f"{folder} is a {model.config.model_type} model"
    if head is None:
        raise ModelError(f"model.path: {kind} without an LM head.")
    ids_BL = torch.arange(3, device=head.weight.device)[None]
    states_BLD = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    factor = PROBE_LOGIT / head(states_BLD).abs().max().clamp_min(1e-6)
    seen: list[Tensor] = []

    def blown_up(module: Any, arguments: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(arguments[0])
        return (arguments[0] * factor,)

    hook = head.register_forward_pre_hook(blown_up)
    try:
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    finally:
        hook.remove()
    if not seen or _differ(seen[0], states_BLD):
        raise ModelError(
            f"model.path: {kind} whose head reads something else than its body's last states: not supported."
        )
    if _differ(logits_BLV, transform.apply(head(states_BLD * factor).float())):
        raise ModelError(
            f"model.path: {kind} whose logits are not those of {transform}, which its config tells: not supported."
        )


def _differ(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.float(), expected.float()
    return found.shape != expected.shape or bool((found - expected).norm() > PROBE_ERROR * expected.norm())


def attention_of(config: Any, chosen: str, wanted: str, folder: Path | str) -> str:
    """The attention of a model: sdpa has no cap of scores, so that models with one (Gemma 2) take eager under `auto`.

    chosen: what the run has settled on. wanted: model.attn_implementation. Raises ModelError where sdpa was asked for.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is None or chosen != "sdpa":
        return chosen
    if wanted == "sdpa":
        raise ModelError(
            f"model.attn_implementation=sdpa: {folder} caps its attention scores, which sdpa does not. Use auto or eager."
        )
    return "eager"


def layer_masks(config: Any, mask_B1LL: Tensor, position_ids_BL: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask of a model's layers from that of whole attention, or one by kind of layer where a line outgrows a window.

    mask_B1LL: bool, True where a query may look; position_ids_BL: a token sees those less than `sliding_window` positions
    before it, whatever lies between them in the line. Raises ModelError for layers that look in another way, or remember.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"train.share_prompts: a {text.model_type} model has layers of {', '.join(sorted(strange))}, for which responses "
            "cannot share a line. Pass train.share_prompts=off."
        )
    window = getattr(text, "sliding_window", None)
    if window is None or mask_B1LL.shape[-1] <= window or kinds == {"full_attention"}:
        return mask_B1LL
    distance_BLL = position_ids_BL[:, :, None] - position_ids_BL[:, None, :]
    # Padding sees itself at least: a query that saw nothing would be NaN.
    itself_LL = torch.eye(mask_B1LL.shape[-1], dtype=torch.bool, device=mask_B1LL.device)
    near_B1LL = mask_B1LL & (distance_BLL < window)[:, None] | itself_LL
    return {"full_attention": mask_B1LL, "sliding_attention": near_B1LL} if kinds else near_B1LL
