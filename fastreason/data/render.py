"""How a model sees a problem: the messages of a chat, or a raw text, and their token ids. Loads no tokenizer itself."""

from collections.abc import Sequence
from typing import Any

from fastreason.config import DataConfig
from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt


def render_messages(prompt: Prompt, config: DataConfig) -> list[dict[str, str]]:
    """The chat: `data.system_prompt` where it is set, then `data.user_template` with the problem in it."""
    messages = [{"role": "user", "content": config.user_template.replace("{problem}", prompt.text)}]
    if config.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    return messages


def render_token_ids(prompt: Prompt, config: DataConfig, tokenizer: Any, opening: str = "") -> list[int]:
    """The prompt's token ids: through the chat template up to where the answer begins, or the raw user message.

    opening: how the answer begins, put after the prompt unless the template has put it there.
    The template writes its special tokens itself; a raw text gets those the tokenizer adds (a BOS where it has one).
    Raises `ConfigError` where the tokenizer has no chat template, or its template refuses the messages.
    """
    messages = render_messages(prompt, config)
    if not config.chat_template:
        return list(tokenizer(messages[-1]["content"] + opening)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "data.chat_template=true, but the model's tokenizer has no chat template: a base model? Set "
            "data.chat_template=false and put what it should see into data.user_template."
        )
    try:
        # Through text, because what apply_chat_template returns with tokenize=True differs between versions.
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:
        roles = " and ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the model's chat template refuses the messages ({roles}): {type(error).__name__}: {error}. Some "
            "templates take no system message: set data.system_prompt=null and write it into data.user_template."
        ) from error
    if opening and not text.rstrip().endswith(opening.rstrip()):
        text += opening
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def drop_long_prompts(problems: Sequence[Prompt], config: DataConfig, tokenizer: Any) -> tuple[list[Prompt], int]:
    """The problems whose prompt has at most `data.max_prompt_tokens` tokens, and how many were longer.

    Raises `DataError` where none is left.
    """
    lengths = [len(render_token_ids(problem, config, tokenizer)) for problem in problems]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= config.max_prompt_tokens]
    if not kept:
        raise DataError(
            f"data.max_prompt_tokens={config.max_prompt_tokens}: every prompt is longer; the shortest has "
            f"{min(lengths)} tokens. Raise it."
        )
    return kept, len(problems) - len(kept)
