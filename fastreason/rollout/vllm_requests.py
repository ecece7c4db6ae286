"""What a vLLM server is asked for with token ids, and what its answers hold. Pure: no connection."""

from typing import Any

from fastreason.errors import EngineError
from fastreason.rollout.connection import ServerLostError
from fastreason.types import SamplingParams

GENERATE = "/inference/v1/generate"


def sampling_of(params: SamplingParams, seed: int | None) -> dict[str, Any]:
    """One sample, answered when it has ended."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "max_tokens": params.max_new_tokens,
        "seed": seed,
        "logprobs": 0,
        "stop_token_ids": list(params.stop_token_ids),
        # One output a request, and no text: else the API server makes both for every token.
        "output_kind": 2,
        "detokenize": False,
    }


# One more token must be sampled for the prompt's own log-probabilities to be had.
SCORING: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "logprobs": 0}


def body_of(token_ids: list[int], sampling: dict[str, Any], version: int, adapter: str | None) -> dict[str, Any]:
    """A request's body; `adapter` names the one that it is for, None where the model's own weights are.

    Salted, so that no request issued after an update begins with keys and values of before; those in flight keep their own.
    What the engine calls a reset of its prefix cache would compute theirs again, or fail beside them.
    """
    body = {"token_ids": token_ids, "sampling_params": sampling, "cache_salt": f"version {version}"}
    return body if adapter is None else {**body, "model": adapter}


def read_sample(answer: Any, server: str, request_id: str) -> tuple[list[int], list[float], str]:
    """(token ids, their log-probabilities, why it ended); raises ServerLostError where the engine gave the request up."""
    choice = answer["choices"][0]
    token_ids, finish_reason = choice["token_ids"], choice["finish_reason"] or "stop"
    if finish_reason in ("abort", "error"):
        raise ServerLostError(f"the {server} gave up {request_id}: {finish_reason}")
    logp = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    if len(logp) != len(token_ids):
        raise EngineError(f"the {server} returned {len(token_ids)} tokens with {len(logp)} log-probabilities")
    return token_ids, logp, finish_reason


def read_scores(answer: Any, token_ids: list[int]) -> list[float]:
    """Log-probabilities of `token_ids[1:]`."""
    entries = answer["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for token, entry in zip(token_ids[1:], entries, strict=True)]
