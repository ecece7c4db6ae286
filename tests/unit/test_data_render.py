"""Messages and token ids of a prompt, with stand-ins for a tokenizer that count its special tokens."""

from typing import Any

import pytest

from fastreason.config import DataConfig
from fastreason.data import drop_long_prompts, render_messages, render_token_ids
from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt

SUM = Prompt(id="0", text="3 + {problem}?")
BOS = 1


class Characters:
    """One token per character; a BOS in front unless special tokens are off."""

    chat_template: str | None = "a template"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] == "system" and "refused" in messages[0]["content"]:
            raise ValueError("System role not supported")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt


def config(**keys: Any) -> DataConfig:
    return DataConfig(task="chain_sum", **keys)


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_messages() -> None:
    assert render_messages(SUM, config()) == [{"role": "user", "content": "3 + {problem}?"}]
    with_system = config(system_prompt="Be brief.", user_template="Q: {problem} {x}")
    assert render_messages(SUM, with_system) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: 3 + {problem}? {x}"},
    ]


def test_token_ids_through_the_chat_template() -> None:
    ids = render_token_ids(SUM, config(system_prompt="S"), Characters())
    assert text_of(ids) == "<system>S<user>3 + {problem}?<assistant>"


def test_a_raw_prompt_gets_the_tokenizers_own_special_tokens() -> None:
    ids = render_token_ids(SUM, config(chat_template=False, user_template="Q: {problem}\nA:"), Characters())
    assert ids[0] == BOS and text_of(ids[1:]) == "Q: 3 + {problem}?\nA:"


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = Characters()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"data\.chat_template=true.*data\.chat_template=false"):
        render_token_ids(SUM, config(), tokenizer)
    assert render_token_ids(SUM, config(chat_template=False), tokenizer)


def test_a_template_that_refuses_the_messages_says_why() -> None:
    with pytest.raises(ConfigError, match=r"System role not supported.*data\.system_prompt=null"):
        render_token_ids(SUM, config(system_prompt="refused"), Characters())


def test_long_prompts_are_dropped_and_counted() -> None:
    problems = [Prompt(id=str(n), text="x" * n) for n in (5, 30, 10)]
    length = len("<user>") + len("<assistant>")
    kept, num_dropped = drop_long_prompts(problems, config(max_prompt_tokens=length + 10), Characters())
    assert [p.id for p in kept] == ["5", "10"] and num_dropped == 1
    with pytest.raises(DataError, match=rf"data\.max_prompt_tokens=3.*the shortest has {length + 5}"):
        drop_long_prompts(problems, config(max_prompt_tokens=3), Characters())
