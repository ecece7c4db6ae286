"""The reward `format`: does the response look as asked for? Says nothing about whether it is right."""

from fastreason.rewards.extract import last_answer_tag, last_boxed
from fastreason.types import Prompt


def format_reward(text: str, prompt: Prompt) -> float:
    r"""1.0 where the response ends properly with a marked answer, else 0.0.

    A marked answer is a complete, non-empty `\boxed{}` or `<answer></answer>`. Where the response thinks in tags, there
    is exactly one `</think>`, the answer comes after it, and a `<think>` is the first thing in the response (it may be
    absent: the prompt may have opened it). A response cut off at the token limit has not ended properly and gets 0:
    the text does not show that, so `RewardSpec.parts` applies it.
    """
    if "<think>" in text or "</think>" in text:
        thinking, _, text = text.partition("</think>")
        opened_late = "<think>" in thinking.strip().removeprefix("<think>")
        if opened_late or "<think>" in text or "</think>" in text or not text:
            return 0.0
    marked = last_boxed(text) or last_answer_tag(text) or ""
    return 1.0 if marked.strip() else 0.0
