"""The only file that imports vLLM: what of its own functions and types is needed, imported where it is called.

Everything else is asked of its server over HTTP, or of its worker's methods (`vllm_worker`, `vllm_adapter`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastreason.rollout.server import LOOPBACK


def open_group(port: int, world_size: int) -> Any:
    """The trainer's side of the rendezvous of vLLM's NCCL weight transfer; has not run on a GPU yet."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init({"master_address": LOOPBACK, "master_port": port, "world_size": world_size})


def adapter_request(name: str, number: int, folder: Path) -> Any:
    """Has a worker read the adapter in `folder` in the place of its adapter `number`."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(folder), load_inplace=True)


def adapted_layer(model: Any) -> Callable[[str], tuple[str, bool]]:
    """From a factor's name in an adapter's file to (name of vLLM's layer, whether it is A)."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_unstacked_mapper() if mapper is not None else None
    return lambda name: parse_fine_tuned_lora_name(name, mapper)
