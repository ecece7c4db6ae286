"""transformers' own `generate` behind the Engine protocol: slow, in the producer's process, needs nothing but torch."""

import asyncio
import time
from typing import Any

import torch

from fastreason.errors import EngineError
from fastreason.exchange import Digest, compare_held, read_weights
from fastreason.rollout.engine import sample_seed
from fastreason.types import Completion, LoadReport, SamplingParams, WeightUpdate


class HfEngine:
    """One model in this process; requests run one after another, a weight update waits for the request before it."""

    name = "hf"

    def __init__(self, model_dir: str, dtype: str, device: str) -> None:
        self._model_dir, self._dtype, self._device = model_dir, getattr(torch, dtype), device
        self._model: Any = None
        self._turn = asyncio.Lock()
        self.version = 0

    async def start(self) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        model = await asyncio.to_thread(AutoModelForCausalLM.from_pretrained, self._model_dir, dtype=self._dtype)
        # A model's own sampling defaults (repetition penalty, min_p, ...) would change the distribution behind our back.
        own = model.generation_config
        model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        self._model = model.to(self._device).eval()

    async def generate(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        async with self._turn:
            return await asyncio.to_thread(self._generate, prompt_token_ids, params)

    @torch.no_grad()
    def _generate(self, prompt_token_ids: list[int], params: SamplingParams) -> list[Completion]:
        if params.seed is not None:
            torch.manual_seed(sample_seed(params.seed, 0) or 0)
        config = self._model.generation_config
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stops = {token for token in [*eos, *params.stop_token_ids] if token is not None}
        ids = torch.tensor([prompt_token_ids], device=self._device)
        sampling: dict[str, Any] = {"do_sample": False}
        if params.temperature:  # transformers refuses one of 0
            sampling = {
                "do_sample": True,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            num_return_sequences=params.n,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=sorted(stops) or None,
            pad_token_id=config.pad_token_id if config.pad_token_id is not None else 0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores_BTV = torch.stack(output.scores, dim=1).float().log_softmax(-1)
        new_BT = output.sequences[:, len(prompt_token_ids) :]
        logp_BT = scores_BTV.gather(-1, new_BT.unsqueeze(-1)).squeeze(-1)
        completions = []
        for token_row, logp_row in zip(new_BT.tolist(), logp_BT.tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(token_row) if token in stops), None)
            num = end or len(token_row)
            completions.append(
                Completion(
                    token_ids=token_row[:num],
                    logp=logp_row[:num],
                    finish_reason="stop" if end else "length",
                    token_versions=[self.version] * num,
                )
            )
        return completions

    async def score(self, token_ids: list[int]) -> list[float]:
        async with self._turn:
            return await asyncio.to_thread(self._score, token_ids)

    @torch.no_grad()
    def _score(self, token_ids: list[int]) -> list[float]:
        ids = torch.tensor([token_ids], device=self._device)
        logp_TV = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return logp_TV.gather(-1, ids[0, 1:].unsqueeze(-1)).squeeze(-1).tolist()

    async def load_weights(self, update: WeightUpdate) -> LoadReport:
        started = time.perf_counter()
        async with self._turn:
            waited = time.perf_counter()
            report = await asyncio.to_thread(self._load, update)
            self.version = update.version
        ended = time.perf_counter()
        return LoadReport(**report, pause_s=ended - waited, load_s=ended - waited, total_s=ended - started)

    async def sleep(self) -> float:
        raise EngineError("rollout.engine=hf cannot sleep: resources.sleep=on is for vllm")

    async def wake(self) -> float:
        return 0.0

    async def adopt(self, update: WeightUpdate | None) -> None:
        if update is not None:
            await self.load_weights(update)

    @torch.no_grad()
    def _load(self, update: WeightUpdate) -> dict[str, Any]:
        digest = Digest()
        sent = dict(read_weights(update.path, digest))
        if digest.hexdigest() != update.checksum:
            raise EngineError(f"checksum of {update.path} is {digest.hexdigest()}, sent was {update.checksum}")
        parameters = dict(self._model.named_parameters())
        unknown = sorted(set(sent) - set(parameters))
        if unknown:
            raise EngineError(f"the engine's model has no parameters named {unknown[:5]}: another model was published")
        for name, tensor in sent.items():
            parameters[name].copy_(tensor)
        held_bytes, different = compare_held(parameters.items(), sent, {})
        if different:
            raise EngineError(f"after loading, the engine holds other values than were sent in: {different[:5]}")
        return {
            "version": update.version,
            "checksum": digest.hexdigest(),
            "num_tensors": digest.num_tensors,
            "held_bytes": held_bytes,
        }

    def figures(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        self._model = None
