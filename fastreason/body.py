"""What a model's body is given of a micro-batch: its lines, and which earlier tokens each token sees.

Lines of different lengths lie side by side with padding, since attention wants them so. Everything else in a transformer
acts on each token by itself, and takes most of the time: so the body gets the real tokens alone, as one line, and only
inside attention do they lie side by side again. Both give the same numbers but for rounding.

It owns attention's masks and the way from lines to real tokens and back. It refuses to know heads and losses (`policy.py`).
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastreason.families import layer_masks
from fastreason.packing import MicroBatch

PREFIX = "unpadded_"  # of the attention implementations that are registered here
BASES = ("eager", "sdpa")
KINDS = {"full_attention", "sliding_attention"}  # of layers, whose masks are known here
PROBE_ERROR = 0.02  # as far as a rounding to bf16 may take a model's states


def response_states(model: Any, batch: MicroBatch) -> Tensor:
    """[N, D] of a transformers causal LM: the last hidden states that predict the response tokens of a micro-batch."""
    if model.config._attn_implementation.startswith(PREFIX) and batch.num_tokens < batch.input_ids_BL.numel():
        states_TD = real_states(model, batch)
        # Where each position of the lines lies among the real tokens.
        place_M = torch.zeros(batch.input_ids_BL.numel(), dtype=torch.int64, device=states_TD.device)
        place_M[batch.real_T] = torch.arange(len(states_TD), device=states_TD.device)
        return states_TD.index_select(0, place_M[batch.head_index_N])
    hidden_BLD = model.base_model(
        input_ids=batch.input_ids_BL,
        position_ids=batch.position_ids_BL,
        attention_mask=_attention_mask(model, batch, batch.mask_B1LL),
        use_cache=False,
    ).last_hidden_state
    return hidden_BLD.flatten(0, 1).index_select(0, batch.head_index_N)


def real_states(model: Any, batch: MicroBatch) -> Tensor:
    """[T, D]: the last hidden states of the real tokens, in the order of `batch.real_T`."""
    ids_BL = batch.input_ids_BL
    # Four axes, so that transformers hands it on as it is; _attend reads one of a single element as "causal".
    causal_1111 = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids_BL.device)
    states_1TD = model.base_model(
        input_ids=ids_BL.flatten()[batch.real_T][None],
        position_ids=batch.position_ids_BL.flatten()[batch.real_T][None],
        attention_mask=_lines_mask(model, batch, causal_1111),
        use_cache=False,
        real_T=batch.real_T,
        line_shape=tuple(ids_BL.shape),
    ).last_hidden_state
    return states_1TD[0]


def enable_unpadded(model: Any) -> bool:
    """Let a loaded model's attention take real tokens alone, where that gives what it gave before; says whether it does.

    Not where its code does not hand on what attention is told, or mixes tokens elsewhere: a test of two lines shows.
    """
    before = model.config._attn_implementation
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    # Attention of other kinds differs from whole attention on lines far longer than any that could be tried here.
    if before not in BASES or kinds - KINDS:
        return False
    register()
    probe = _probe(model.device)
    with torch.no_grad():
        expected = _probe_states(model, probe)
        try:
            model.set_attn_implementation(PREFIX + before)
            found = real_states(model, probe)
        except Exception:  # whatever the code of a model from elsewhere makes of it: padding is right too
            found = None
    same = found is not None and bool((found - expected).norm() <= PROBE_ERROR * expected.norm())
    if not same:
        model.set_attn_implementation(before)
    return same


def _probe(device: torch.device) -> MicroBatch:
    """Two lines of four and two tokens."""
    none_N = torch.zeros(0, dtype=torch.int64)
    ids_BL = torch.tensor([[0, 1, 2, 3], [3, 2, 0, 0]])
    return MicroBatch(
        input_ids_BL=ids_BL,
        position_ids_BL=torch.arange(4).repeat(2, 1),
        real_T=torch.tensor([0, 1, 2, 3, 4, 5]),
        head_index_N=none_N,
        ids_N=none_N,
        sampler_logp_N=none_N,
        advantages_N=none_N,
        token_weight_N=none_N,
        sequence_N=none_N,
        index_B=none_N,
        num_rows=2,
        num_tokens=6,
    ).to(device)


def _probe_states(model: Any, batch: MicroBatch) -> Tensor:
    """[T, D]: the states of the real tokens, as the model gives them for padded lines."""
    states_BLD = model.base_model(
        input_ids=batch.input_ids_BL, position_ids=batch.position_ids_BL, use_cache=False
    ).last_hidden_state
    return states_BLD.flatten(0, 1)[batch.real_T]


def _lines_mask(model: Any, batch: MicroBatch, causal_1111: Tensor) -> Tensor | dict[str, Tensor] | None:
    """What attention is told of the lines; plain ones need a mask for eager attention, and where one outgrows a window."""
    if batch.mask_B1LL is not None:
        return _attention_mask(model, batch, batch.mask_B1LL)
    width, text, is_eager = batch.input_ids_BL.shape[1], model.config.get_text_config(), _base(model.config) == "eager"
    window = getattr(text, "sliding_window", None) or width
    kinds = set(getattr(text, "layer_types", None) or ())
    slides = width > window and kinds != {"full_attention"}
    if not is_eager and not slides:
        return causal_1111
    # Of all lines at once: padding comes after what is real, so that nothing real sees it.
    causal_11LL = torch.ones(1, 1, width, width, dtype=torch.bool, device=causal_1111.device).tril()
    near_11LL = causal_11LL.triu(1 - window) if slides else causal_11LL
    whole = causal_1111
    if is_eager:
        whole, near_11LL = _added(causal_11LL, model.dtype), _added(near_11LL, model.dtype)
    if slides and kinds:
        return {"full_attention": whole, "sliding_attention": near_11LL}
    return near_11LL if slides else whole


def _base(config: Any) -> str:
    return config._attn_implementation.removeprefix(PREFIX)


def _attention_mask(model: Any, batch: MicroBatch, mask_B1LL: Tensor | None) -> Tensor | dict[str, Tensor] | None:
    if mask_B1LL is None:
        return None
    masks = layer_masks(model.config, mask_B1LL, batch.position_ids_BL)
    # sdpa takes a bool mask; eager attention adds the mask to the scores, and would add True as 1.
    if _base(model.config) != "eager":
        return masks
    if isinstance(masks, dict):
        return {kind: _added(mask_B1LL, model.dtype) for kind, mask_B1LL in masks.items()}
    return _added(masks, model.dtype)


def _added(mask_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask_B1LL, dtype=dtype).masked_fill(~mask_B1LL, torch.finfo(dtype).min)


class _Pad(torch.autograd.Function):
    """[T, X] -> [M, X]: token t at place real_T[t], zeros elsewhere. Its gradient is _Unpad and the other way round."""

    @staticmethod
    def forward(ctx: Any, real_TX: Tensor, real_T: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(real_T)
        return real_TX.new_zeros(num_places, real_TX.shape[1]).index_copy_(0, real_T, real_TX)

    @staticmethod
    def backward(ctx: Any, grad_MX: Tensor) -> tuple[Tensor, None, None]:
        return grad_MX.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """[M, X] -> [T, X]. torch's own index_select adds gradients up, row by row, for indices that could repeat."""

    @staticmethod
    def forward(ctx: Any, padded_MX: Tensor, real_T: Tensor) -> Tensor:
        ctx.save_for_backward(real_T)
        ctx.num_places = len(padded_MX)
        return padded_MX.index_select(0, real_T)

    @staticmethod
    def backward(ctx: Any, grad_TX: Tensor) -> tuple[Tensor, None]:
        (real_T,) = ctx.saved_tensors
        return grad_TX.new_zeros(ctx.num_places, grad_TX.shape[1]).index_copy_(0, real_T, grad_TX), None


def _attend(base: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """An attention implementation: that of `base`, on lines made of the real tokens where the caller names these.

    query, key, value: [1, heads, T, d] with real_T; the output is [1, T, heads, d].
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        real_T: Tensor | None = None,
        line_shape: tuple[int, int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        if real_T is None or line_shape is None:
            return base(module)(module, query, key, value, attention_mask, **options)
        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = None
        lines = [_side_by_side(states, real_T, line_shape) for states in (query, key, value)]
        out_BLHd, _ = base(module)(module, *lines, attention_mask, **options)
        out_TX = _Unpad.apply(out_BLHd.flatten(2).flatten(0, 1), real_T)
        return out_TX.unflatten(1, out_BLHd.shape[2:])[None], None

    return attend


def _side_by_side(states_1HTd: Tensor, real_T: Tensor, line_shape: tuple[int, int]) -> Tensor:
    """[1, heads, T, d] -> [B, heads, L, d]."""
    states_THd = states_1HTd[0].transpose(0, 1)
    padded_MX = _Pad.apply(states_THd.flatten(1), real_T, line_shape[0] * line_shape[1])
    return padded_MX.view(*line_shape, *states_THd.shape[1:]).transpose(1, 2)


def _eager_of(module: Any) -> Callable[..., Any]:
    """Each family of models has eager attention of its own, beside its layers."""
    return sys.modules[type(module).__module__].eager_attention_forward


def _sdpa_of(module: Any) -> Callable[..., Any]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def register() -> None:
    """Make the implementations known to transformers, with the masks of those that they stand on."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for base, find in zip(BASES, (_eager_of, _sdpa_of), strict=True):
        AttentionInterface.register(PREFIX + base, _attend(find))
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])
