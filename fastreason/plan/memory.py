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
class Beside:
    """What a rank has beside the policy. shape: null is the policy's own; itemsize: bytes of a weight, 0 is the policy's.

    trained: a critic, with gradients and an optimizer of its own. scores: its forward is part of a step. copied: it has weights
    of its own there (an adapter's reference has none); divided: and ZeRO-3 divides them among the ranks. assumed: its own
    config.json is not here, and it counts as large as the policy.
    """

    name: str
    shape: Shape | None = None
    itemsize: int = 0
    trained: bool = False
    scores: bool = True
    copied: bool = True
    divided: bool = True
    assumed: bool = False


@dataclass(frozen=True)
class TrainerSetup:
    """How a trainer keeps its model. itemsize: bytes of a weight, 2 (bf16 with fp32 masters) or 4.

    offload, offload_weights: what is on the host, optimizer and gradients' sums, or the weights too. fused: RMSNorm and SwiGLU
    of liger-kernel. scores: tokens of a line whose attention scores are kept (eager), or 0. adapter: rank of the adapter that
    alone is trained, or 0; adapter_head: the head has one too; adapter_published: engines get it alone.
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
    adapter: int = 0
    adapter_head: bool = False
    adapter_published: bool = False
    beside: tuple[Beside, ...] = ()

    def trained(self, shape: Shape) -> int:
        """Parameters with a gradient: all, or those of the adapter."""
        return shape.adapter_parameters(self.adapter, self.adapter_head) if self.adapter else shape.num_parameters

    def whole(self, shape: Shape) -> int:
        """Parameters of model and adapter."""
        return shape.num_parameters + (self.trained(shape) if self.adapter else 0)

    def published_bytes(self, shape: Shape) -> float:
        """Of a publication: all weights, merged ones of an adapter too, or the adapter alone."""
        return float(self.itemsize * (self.trained(shape) if self.adapter_published else shape.num_parameters))

    @property
    def stage(self) -> int:
        """The stage that runs: bf16 at stage 0 runs as stage 1."""
        return max(1, self.zero_stage) if self.itemsize == 2 else self.zero_stage


def trainer_memory(shape: Shape, setup: TrainerSetup, tokens: float, head_tokens: float) -> Parts:
    """Bytes of one rank at the peak of a micro-batch of `tokens` tokens, `head_tokens` of which are responses'.

        weights       b P                      / n at stage 3; 0 on the device where they are offloaded
        gradients     4 T fp32 sums            / n from stage 2 on; 0 where the optimizer is offloaded; and 2 T of backward's
                                               own in bf16 below stage 2
        optimizer     4 T masters + 8 T Adam   / n from stage 1 on; 0 on the device where it is offloaded
        buckets       2 b bucket from stage 1 on
        gathered      at stage 3 at most 1e9 parameters, where the others are on other ranks or on the host
        activations   see layer_bytes
        loss          see loss_bytes
        (each beside) see beside_bytes

    b: setup.itemsize, n: setup.ranks, P: all parameters, T: those that are trained. fp32 at stage 0 has no masters. DeepSpeed
    allocates its buckets whole, by P also where only an adapter is trained.
    """
    kept = model_bytes(setup.whole(shape), setup.trained(shape), setup)
    gathers = setup.stage == 3 and (setup.ranks > 1 or setup.offload_weights)
    return {
        **kept,
        "gathered": min(setup.whole(shape), MAX_GATHERED) * setup.itemsize if gathers else 0,
        "activations": activation_bytes(shape, setup, tokens),
        "loss": loss_bytes(shape, setup, head_tokens),
        **{each.name: beside_bytes(each, shape, setup) for each in setup.beside if each.copied},
    }


def model_bytes(num: int, trained: int, setup: TrainerSetup) -> Parts:
    """What a rank keeps of a model of `num` parameters between two steps."""
    ranks, stage, b = setup.ranks, setup.stage, setup.itemsize
    sharded = {
        part: ranks if stage >= first else 1 for part, first in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    masters = 4 if b == 2 or stage else 0
    own_gradients = 2 if b == 2 and stage < 2 else 0
    bucket = max(1_000_000, min(MAX_BUCKET, num // 8))
    return {
        "weights": 0.0 if setup.offload_weights else b * num / sharded["weights"],
        "gradients": (0.0 if setup.offload else 4 * trained / sharded["gradients"]) + own_gradients * trained,
        "optimizer": 0.0 if setup.offload else (masters + 8) * trained / sharded["optimizer"],
        "buckets": 2 * b * bucket if stage else 0,
    }


def beside_bytes(each: Beside, policy: Shape, setup: TrainerSetup) -> float:
    """Of a frozen model its weights, / n at stage 3; of a critic, which has no head, all that `model_bytes` counts."""
    shape = each.shape or policy
    if each.trained:
        num = critic_parameters(shape)
        return sum(model_bytes(num, num, setup).values())
    b = each.itemsize or setup.itemsize
    return b * shape.num_parameters / (setup.ranks if each.divided and setup.stage == 3 else 1)


def critic_parameters(shape: Shape) -> int:
    """A body with a head of one column in the place of V."""
    return shape.num_parameters - (0 if shape.tied else shape.head_matrix) + shape.hidden + 1


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

    The gradients are made in forward: that of the weight, where it is trained, is fp32 on a GPU and of the weights' dtype on a
    CPU.
    """
    tile = min(4.0 * head_tokens * shape.vocab, LOGITS_BYTES_GPU if setup.on_gpu else LOGITS_BYTES_CPU)
    weight = 0 if setup.adapter else (4 if setup.on_gpu else setup.itemsize) * shape.head_matrix
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
