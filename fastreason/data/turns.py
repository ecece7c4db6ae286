"""How a model would have to write a response: the token ids of prompts, responses and conversations, and which are trained.

A response is tokenized by itself, behind its prompt, as generation would make it, and ends with the token that ends a turn
in the chat template (else the tokenizer's EOS). A tag that the prompt has opened (<think>) is not opened again by the
response. Loads no tokenizer and reads no file.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastreason.config import DataConfig
from fastreason.data.render import render_messages, render_token_ids
from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt

OPENED = re.compile(r"(<\w+>)(\s*)\Z")
PROBE = "Probe0of1a2response"
Message = dict[str, Any]


class Tokens(NamedTuple):
    """A prompt, what follows it, and which of that is trained (None: all); `as_rendered`: the chat template writes the same."""

    prompt: list[int]
    response: list[int]
    trained: list[bool] | None = None
    as_rendered: bool = True


class TurnWriter:
    """Turns texts into token ids as section `data` says; raises ConfigError where tokenizer or template cannot do it."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._tokenizer, self._config = tokenizer, config
        self.tail, self._tail_rest = "", list[int]()
        end: list[int] = []
        asked = config.user_template
        if config.chat_template:
            probe = Prompt(id="", text="?")
            render_token_ids(probe, config, tokenizer)  # with its clear errors
            asked = self._render(render_messages(probe, config), add_generation_prompt=True)
            whole = self._render([*render_messages(probe, config), _assistant(PROBE)])
            self.tail = whole.rpartition(PROBE)[2]
            tail = self._ids(self.tail)
            special = set(tokenizer.all_special_ids) | {
                number for number, token in tokenizer.added_tokens_decoder.items() if token.special
            }
            first = next((place for place, token in enumerate(tail) if token in special), None)
            self._tail_rest = tail if first is None else tail[first + 1 :]
            end = [] if first is None else tail[: first + 1]
        opened = OPENED.search(asked)
        self._opened, self._opened_space = opened.groups() if opened else ("", "")
        # Where the template ends a turn without a special token, only EOS can end generation.
        self._ends_by_template = bool(end)
        if not end and tokenizer.eos_token_id is None:
            raise ConfigError("model.path: its tokenizer has no EOS token: a trained response could not end.")
        self.end: list[int] = end or [tokenizer.eos_token_id]

    def prompt(self, problem: str) -> list[int]:
        """The prompt's ids, as in a run that generates."""
        return render_token_ids(Prompt(id="", text=problem), self._config, self._tokenizer)

    def response(self, text: str) -> list[int]:
        """A response's ids with the end of the turn, once, and without the tag that the prompt ends with."""
        ids = self._ids(self._continued(text))
        return ids if ids[-len(self.end) :] == self.end else ids + self.end

    def as_rendered(self, problem: str, response: str) -> bool:
        """Whether the chat template writes the whole conversation as prompt, response and the turn's tail."""
        if not self._config.chat_template:
            return True
        messages = render_messages(Prompt(id="", text=problem), self._config)
        prompt = self._render(messages, add_generation_prompt=True)
        whole = self._render([*messages, _assistant(response)])
        if whole != prompt + self._continued(response) + self.tail:
            return False
        rest = self._tail_rest if self._ends_by_template else self._tail_rest[:0]
        ids = self.prompt(problem) + self.response(response) + rest
        return not self._ends_by_template or self._ids(whole) == ids

    def conversation(self, messages: Sequence[Message]) -> Tokens:
        """A conversation: the prompt is all before the first assistant turn; assistant turns are trained, with their ends.

        Raises DataError where there is none, or the chat template does not write a conversation turn by turn.
        """
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise DataError("a conversation needs an assistant turn that answers something; this has none")
        messages = messages[: turns[-1] + 1]
        whole, at = self._render(messages), 0
        prompt, ids, trained = list[int](), list[int](), list[bool]()
        for number in turns:
            before = self._render(messages[:number], add_generation_prompt=True)
            through = self._render(messages[: number + 1])
            if not through.startswith(before):
                asked = before.removeprefix(self._render(messages[:number]))
                raise DataError(
                    f"what the chat template writes to ask for a turn ends in {asked[-40:]!r}, and a turn that it writes "
                    "itself does not begin so: with this model train on single responses (offline.response_column and "
                    "data.problem_column in place of offline.messages_column)"
                )
            if not (whole.startswith(through) and through.endswith(self.tail)):
                raise DataError(
                    "the chat template writes a turn differently once others follow it, so that turns cannot be told apart; "
                    "split the conversation into rows of one response each"
                )
            context = self._ids(whole[at : len(before)])
            last = number == turns[-1]
            ends = last or self._ends_by_template
            content = through[len(before) : len(through) - len(self.tail)]
            answer = self.response(content) if ends else self._ids(content)
            rest = [] if last else self._tail_rest
            if number == turns[0]:
                prompt, context = context, []
            ids += context + answer + rest
            trained += [False] * len(context) + [True] * len(answer) + [False] * len(rest)
            at = len(through)
        return Tokens(prompt, ids, trained)

    def _continued(self, response: str) -> str:
        """A response as it goes on from the prompt: without the tag, and the space behind it, that the prompt ends with."""
        begins = response.lstrip()
        if not self._opened or not begins.startswith(self._opened):
            return response
        return begins.removeprefix(self._opened).removeprefix(self._opened_space)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
                )
            )
        except Exception as error:
            raise DataError(f"the chat template refuses the messages: {type(error).__name__}: {error}") from error


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
