"""Problems and prompts: where they come from, their order, the held-out split, and how a model sees them."""

from fastreason.data.order import PromptCursor, normalise_text, split_held_out
from fastreason.data.render import drop_long_prompts, render_messages, render_token_ids
from fastreason.data.sources import check_data, load_problems

__all__ = [
    "PromptCursor",
    "check_data",
    "drop_long_prompts",
    "load_problems",
    "normalise_text",
    "render_messages",
    "render_token_ids",
    "split_held_out",
]
