r"""How an evaluation asks: the templates by name. One table; a new way to ask is a row.

`qwen-math` and `r1` are written out, so that a base model can be asked in the way of another model; `chat` and `think` are the
model's own chat template. `r1` and `think` begin the answer with `<think>`: the response has to think.
"""

import difflib
from collections.abc import Set
from dataclasses import dataclass

from fastreason.config import DataConfig
from fastreason.errors import ConfigError

STEP_BY_STEP = r"Please reason step by step, and put your final answer within \boxed{}."
THINK = "<think>\n"
ASKING = ("user_template", "system_prompt", "chat_template")


@dataclass(frozen=True)
class Template:
    """Section data's keys of the same names, and how the answer begins."""

    user_template: str = "{problem}"
    system_prompt: str | None = None
    chat_template: bool = True
    opening: str = ""

    def applied(self, config: DataConfig, said: Set[str]) -> DataConfig:
        """`config` asking this way, but for those of its keys that the user has `said`."""
        return config.model_copy(update={key: getattr(self, key) for key in ASKING if key not in said})


TEMPLATES: dict[str, Template] = {
    "chat": Template(),
    "chat-boxed": Template(system_prompt=STEP_BY_STEP),
    "think": Template(opening=THINK),
    "raw": Template(chat_template=False),
    "qwen-math": Template(
        chat_template=False,
        user_template=f"<|im_start|>system\n{STEP_BY_STEP}<|im_end|>\n<|im_start|>user\n{{problem}}<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    # arXiv 2501.12948, table 1.
    "r1": Template(
        chat_template=False,
        user_template="A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. The "
        "reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., "
        "<think> reasoning process here </think> <answer> answer here </answer>. User: {problem}. Assistant: ",
        opening=THINK,
    ),
}


def find_template(name: str) -> Template:
    """A row of the table; raises ConfigError with the nearest name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    near = difflib.get_close_matches(name, TEMPLATES, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"eval.template={name!r}: there is no such template.{guess} There are: {', '.join(TEMPLATES)}.")
