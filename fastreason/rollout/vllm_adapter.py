"""An adapter beside a vLLM server's model: its name there, putting another in its place, and proving that it arrived.

Runs inside vLLM's worker but for the names. vLLM pads every adapter to one of a few ranks, stacks the factors of layers that
it fuses, and multiplies B by the scale; the model's own weights are never touched. Learnt on vLLM 0.28: a request that names an
adapter with `load_inplace` has it read from its file at every step, so the worker replaces it once, and requests only name it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastreason.rollout.vllm_api import adapted_layer, adapter_request
from fastreason.rollout.vllm_worker import WeightWorker

if TYPE_CHECKING:
    import torch

ADAPTER_NAME = "adapter"  # what requests call it; the bare model is "policy"
ADAPTER_FOLDER = "adapter"  # of the one that a server starts with, in its temporary folder
ADAPTER_VARIABLE = "FASTREASON_ADAPTER"  # that folder, for the worker
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has memory laid out for


def padded_rank(rank: int) -> int:
    """The least rank of vLLM's that holds `rank`; raises StopIteration above the greatest, see `RANKS`."""
    return next(each for each in RANKS if each >= rank)


class AdapterWorker(WeightWorker):
    """The worker of a server that started with an adapter: published files are adapters, and the model's weights stay."""

    add_lora: Any
    list_loras: Any

    def _fastreason_take(self, path: str, sent: "dict[str, torch.Tensor]") -> None:
        # Requests in flight go on with it.
        (number,) = self.list_loras()
        self.add_lora(adapter_request(ADAPTER_NAME, number, Path(path).parent))

    def _fastreason_take_first(self) -> None:
        self._fastreason_take(os.path.join(os.environ[ADAPTER_VARIABLE], "any file"), {})

    def _fastreason_compare(self, path: str, sent: "dict[str, torch.Tensor]") -> tuple[int, list[str]]:
        """Raises ValueError for factors that no layer applies: vLLM passes over those of layers that it does not know."""
        manager = self.model_runner.lora_manager._adapter_manager
        settings = json.loads((Path(path).parent / "adapter_config.json").read_text(encoding="utf-8"))
        layer_of = adapted_layer(manager.model)
        factors = {}
        for name, tensor in sent.items():
            layer, is_a = layer_of(name)
            factors[layer, is_a] = tensor if is_a else tensor * (settings["lora_alpha"] / settings["r"])
        (slot,) = (index for index, number in enumerate(manager.lora_index_to_id) if number is not None)
        num_bytes, different, passed_over = compare_factors(manager.modules, manager.packed_modules, slot, factors)
        if passed_over:
            raise ValueError(
                f"vLLM applies no adapter to {sorted(set(passed_over))[:5]}: leave these layers out of lora.targets, or use "
                "lora.publish=merged"
            )
        return num_bytes, different


def compare_factors(
    layers: Mapping[str, Any],
    packed: Mapping[str, list[str]],
    slot: int,
    factors: "dict[tuple[str, bool], torch.Tensor]",
) -> tuple[int, list[str], list[str]]:
    """(bytes found equal, factors that differ, layers not there) of {(layer, whether it is A): A [r, in] or scaled B [out, r]}.

    layers: vLLM's, by name, with `lora_a_stacked`, a tuple of [slots, 1, R, in], and `lora_b_stacked`, of [slots, 1, out, R].
    packed: of a fused layer the names of those that it stacks. What is divided among workers (`tp_size`) is not compared.
    """
    import torch

    num_bytes, left, different = 0, dict(factors), []
    for name, layer in layers.items():
        for index, part in enumerate(packed.get(name, [name])):
            for is_a, stacks in ((True, layer.lora_a_stacked), (False, layer.lora_b_stacked)):
                factor = left.pop((part, is_a), None)
                if factor is None:
                    continue
                held = stacks[index][slot, 0]
                held = held[: len(factor)] if is_a else held[:, : factor.shape[1]]
                if held.shape != factor.shape and layer.tp_size > 1:
                    continue
                if torch.equal(held, factor.to(held.device, held.dtype)):
                    num_bytes += factor.numel() * factor.element_size()
                else:
                    different.append(f"{part}.{'A' if is_a else 'B'}")
    return num_bytes, different, [part for part, _ in left]
