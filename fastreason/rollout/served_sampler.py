"""Asks a server that somebody else runs for responses: OpenAI's chat or completions interface, as vLLM and others have it.

The server renders the chat itself, so its template is its own; what is sent is the messages that section `data` says. It
refuses to count tokens that the server does not count.
"""

import asyncio
from typing import Any

from fastreason.config import DataConfig
from fastreason.data import render_messages
from fastreason.errors import EngineError
from fastreason.rollout.sampling import group_seed
from fastreason.rollout.sampling_job import Ask, Reply
from fastreason.rollout.served_model import RequestRefusedError, ServedModel
from fastreason.types import Prompt, SamplingParams

KEY_VARIABLE = "FASTREASON_TEACHER_KEY"
PATIENCE_S = 60.0
# Whoever refuses this refuses everything.
EASY = Prompt(id="", text="1 + 1 = ?")
ADVICE = {
    404: "Is it an OpenAI-compatible server, and is distill.url right?",
    400: "Does its longest sequence hold the prompt and distill.max_new_tokens? distill.top_k other than 0 is vLLM's own.",
}


class ServedSampler:
    """Responses of the server at `url`; the environment variable FASTREASON_TEACHER_KEY, where set, is the bearer key.

    With `data.chat_template` it is asked at /v1/chat/completions, else for the continuation of the raw text at
    /v1/completions. Where the server divides a response in reasoning and content, they are put together again as
    `<think>\\n...\\n</think>\\n\\n...`; where a response ends a thought that it has not begun, since the server's template
    began it, `<think>\\n` is put before it. `timeout_s` limits one response, `concurrency` how many are
    asked for at once. A busy server is waited for `PATIENCE_S` a response.
    """

    def __init__(
        self, url: str, data: DataConfig, params: SamplingParams, seed: int, timeout_s: float, concurrency: int
    ) -> None:
        limits: dict[str, Any] = {"max_concurrent": concurrency, "patience_s": PATIENCE_S}
        self._server = ServedModel("teacher", "distill.url", url, KEY_VARIABLE, ADVICE, timeout_s, **limits)
        self._data, self._params, self._seed = data, params, seed
        self._accepts, self._trying = False, asyncio.Lock()
        self.model = ""

    async def start(self) -> None:
        """Check that the server answers, and learn its model's name; raises EngineError."""
        self.model = (await self._server.start())[0]

    async def reply(self, ask: Ask) -> Reply:
        """Raises EngineError where the server does not answer, refuses everything, or has another form than OpenAI's.

        Where it refuses this question alone (it is too long, or not allowed), the reply is its refusal.
        """
        seed = group_seed(self._seed, ask.sample, ask.prompt.id)
        try:
            path, reply = await self._ask(ask.prompt, seed)
        except RequestRefusedError as error:
            await self._check_accepts(seed, error)
            return Reply(text="", refusal=str(error))
        self._accepts = True
        try:
            choice = reply["choices"][0]
            text = _chat_text(choice["message"]) if self._data.chat_template else choice["text"]
            usage = reply.get("usage") or {}
            # As an engine of ours has it: "length" where it was cut off, "stop" for every other end.
            finish_reason = "length" if choice.get("finish_reason") == "length" else "stop"
            return Reply(text=str(text), num_tokens=usage.get("completion_tokens"), finish_reason=finish_reason)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise EngineError(
                f"teacher at {self._server.url}: {path} answered {str(reply)[:300]!r}, which is not OpenAI's form."
            ) from error

    async def _ask(self, prompt: Prompt, seed: int) -> tuple[str, Any]:
        params = self._params
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "max_tokens": params.max_new_tokens,
            "seed": seed,
        }
        if params.top_k:
            body["top_k"] = params.top_k
        messages = render_messages(prompt, self._data)
        if self._data.chat_template:
            path, body["messages"] = "/v1/chat/completions", messages
        else:
            path, body["prompt"] = "/v1/completions", messages[-1]["content"]
        return path, await self._server.ask("POST", path, body)

    async def _check_accepts(self, seed: int, refused: RequestRefusedError) -> None:
        """Raise `refused` where nothing was ever accepted, and an easy question is refused too: it is not the question."""
        async with self._trying:
            if not self._accepts:
                try:
                    await self._ask(EASY, seed)
                except RequestRefusedError:
                    raise refused from None
                self._accepts = True

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        await self._server.close()


def _chat_text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        return f"<think>\n{reasoning.strip()}\n</think>\n\n{content}"
    return f"<think>\n{content}" if "</think>" in content and "<think>" not in content else content
