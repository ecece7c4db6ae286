"""Bytes on each device by part: of a trainer's rank, and of an engine's GPU. Pure arithmetic.

It owns what is kept per parameter, per token and per logit. What it leaves out, the allocator's fragmentation and the
libraries' own memory, is `Rates.reserve_gib`.
"""

from dataclasses import dataclass

from fastreason.plan.hardware import Device, Rates
from fastreason.plan.shapes import Shape

GIB = 2**30
Parts = dict[str, float]

# The trainer's own: DeepSpeed's buckets (update/deepspeed.py), its default of ZeRO-3's gathered parameters, and the loss
# library's tile of logits (fastreason_kernels/gemm.py).
MAX_BUCKET = 200_000_000
MAX_GATHERED = 1_000_000_000
LOGITS_BYTES_GPU, LOGITS_BYTES_CPU = 2_500_000_000, 256 << 20


@dataclass(frozen=True)
class TrainerSetup:
    """How a trainer keeps its model. itemsize: bytes of a weight, 2 (bf16 with fp32 masters) or 4.

    offload, offload_weights: what is on the host, optimizer and gradients' sums, or the weights too. fused: RMSNorm and SwiGLU
    of liger-kernel. scores: tokens of a line whose attention scores are kept (eager), or 0.
    """

    ranks: int = 1
    zero_stage: int = 2
    itemsize: int = 2
    checkpointing: bool = False
    offload: bool = False
    offload_weights: bool = False
    fused: bool = True
    scores: int = 0
    on_gpu: bool = True

    @property
    def stage(self) -> int:
        """The stage that runs: bf16 at stage 0 runs as stage 1."""
        return max(1, self.zero_stage) if self.itemsize == 2 else self.zero_stage


def trainer_memory(shape: Shape, setup: TrainerSetup, tokens: float, head_tokens: float) -> Parts:
    """Bytes of one rank at the peak of a micro-batch of `tokens` tokens, `head_tokens` of which are responses'.

        weights       b P                      / n at stage 3; 0 on the device where they are offloaded
        gradients     4 P fp32 sums            / n from stage 2 on; 0 where the optimizer is offloaded; and 2 P of backward's
                                               own in bf16 below stage 2
        optimizer     4 P masters + 8 P Adam   / n from stage 1 on; 0 on the device where it is offloaded
        buckets       2 b bucket from stage 1 on
        gathered      at stage 3 at most 1e9 parameters, where the others are on other ranks or on the host
        activations   see layer_bytes
        loss          see loss_bytes

    b: setup.itemsize, n: setup.ranks. fp32 at stage 0 has no masters.
    """
    num, ranks, stage, b = shape.num_parameters, setup.ranks, setup.stage, setup.itemsize
    sharded = {
        part: ranks if stage >= first else 1 for part, first in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    masters = 4 if b == 2 or stage else 0
    own_gradients = 2 if b == 2 and stage < 2 else 0
    bucket = max(1_000_000, min(MAX_BUCKET, num // 8))
    gathered = min(num, MAX_GATHERED) * b if stage == 3 and (ranks > 1 or setup.offload_weights) else 0
    return {
        "weights": 0.0 if setup.offload_weights else b * num / sharded["weights"],
        "gradients": (0.0 if setup.offload else 4 * num / sharded["gradients"]) + own_gradients * num,
        "optimizer": 0.0 if setup.offload else (masters + 8) * num / sharded["optimizer"],
        "buckets": 2 * b * bucket if stage else 0,
        "gathered": gathered,
        "activations": activation_bytes(shape, setup, tokens),
        "loss": loss_bytes(shape, setup, head_tokens),
    }


def layer_bytes(shape: Shape, setup: TrainerSetup) -> float:
    """What one layer keeps of a token for its backward.

    b times: the layer's input, its norm, q, k, v, attention's output, the sum after it, its norm, gate, up and their
    product: 4 D + 2 Q + 2 K + 3 F (without a gate 2 F, up and its activation). Unfused, silu(gate) too, and each of the two
    norms once more in fp32. With eager attention the scores, before and after softmax, of each head.
    """
    b = setup.itemsize
    kept = b * (4.0 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + shape.mlp_matrices * shape.mlp)
    if not setup.fused:
        kept += b * shape.mlp * shape.gated + 2 * 4 * shape.hidden
    return kept + 2 * b * shape.num_heads * setup.scores


def activation_bytes(shape: Shape, setup: TrainerSetup, tokens: float) -> float:
    """Of all layers; with checkpointing their inputs, and all of the one that is recomputed."""
    one = layer_bytes(shape, setup)
    if not setup.checkpointing:
        return tokens * shape.num_layers * one
    return tokens * (shape.num_layers * setup.itemsize * shape.hidden + one)


def loss_bytes(shape: Shape, setup: TrainerSetup, head_tokens: float) -> float:
    """Of the fused loss: one tile of fp32 logits, the gradient of the states, and that of the head's weight.

    The gradients are made in forward: that of the weight is fp32 on a GPU and of the weights' dtype on a CPU.
    """
    tile = min(4.0 * head_tokens * shape.vocab, LOGITS_BYTES_GPU if setup.on_gpu else LOGITS_BYTES_CPU)
    weight = (4 if setup.on_gpu else setup.itemsize) * shape.head_matrix
    return tile + 2 * setup.itemsize * head_tokens * shape.hidden + weight


def whole_logits_bytes(shape: Shape, head_tokens: float) -> float:
    """What the loss would take with whole logits: fp32 logits, their log-softmax and its gradient."""
    return 3 * 4.0 * head_tokens * shape.vocab


TRANSIENT = ("gathered", "activations", "loss")  # a rank's parts that it has only while it computes


def resident_parts(parts: Parts) -> Parts:
    """What of `trainer_memory` stays between two steps."""
    return {part: size for part, size in parts.items() if part not in TRANSIENT}


def resident_bytes(parts: Parts) -> float:
    return sum(resident_parts(parts).values())


def engine_memory(
    shape: Shape, device: Device, rates: Rates, tensor_parallel: int, itemsize: int = 2, beside: float = 0.0
) -> Parts:
    """Bytes of one of an engine's GPUs: its share of the weights, and the rest of what it may fill for the KV cache.

    beside: what a trainer on the same GPU holds while the engine generates.
    """
    weights = itemsize * shape.num_parameters / tensor_parallel
    usable = device.memory * rates.memory_share - rates.reserve_gib * GIB - beside
    return {"weights": weights, "kv cache": max(0.0, usable - weights)}


def fits(parts: Parts, device: Device, rates: Rates) -> bool:
    return sum(parts.values()) + rates.reserve_gib * GIB <= device.memory
