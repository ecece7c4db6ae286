"""Seconds of a step's parts: generation, training, publication; and of the step, with and without asynchrony. Pure.

It owns the arithmetic of rooflines: what takes longer, the operations or the bytes. It refuses to choose (`split.py`).
"""

import math
from dataclasses import dataclass

from fastreason.plan.hardware import GB, Device, Rates
from fastreason.plan.memory import Beside, TrainerSetup, critic_parameters
from fastreason.plan.shapes import Shape

MESSAGE_S = 1e-5  # latency of one collective


@dataclass(frozen=True)
class Workload:
    """What a step generates and trains. prompt, response: mean tokens; longest: most tokens of a response.

    computed: tokens that the trainer really forwards, where that is known (a run's metrics), else None.
    """

    prompts: int
    samples: int
    prompt: float
    response: float
    longest: int
    updates: int = 1
    micro_batch_tokens: int = 8192
    shared_prompts: bool = False
    computed: float | None = None

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def response_tokens(self) -> float:
        return self.sequences * self.response

    @property
    def trained_tokens(self) -> float:
        """Tokens forwarded: each prompt once where prompts are shared, else once a sequence."""
        if self.computed is not None:
            return self.computed
        return (self.prompts if self.shared_prompts else self.sequences) * self.prompt + self.response_tokens

    @property
    def line(self) -> float:
        """Tokens of a trainer's line: a prompt with all of its responses where prompts are shared, else the longest row."""
        return self.prompt + (self.samples * self.response if self.shared_prompts else self.longest)

    def micro_batch(self, ranks: int) -> float:
        """Tokens of a rank's largest micro-batch: the budget, or one line, or all that the rank has of an update."""
        return max(self.line, min(self.micro_batch_tokens, self.trained_tokens / self.updates / ranks))

    @property
    def response_share(self) -> float:
        """Of the trained tokens, those with a row of logits."""
        return min(1.0, self.response_tokens / max(1.0, self.trained_tokens))

    @property
    def seen(self) -> float:
        """Mean tokens that a trained token attends to: (p + r) / 2 in a row, p + r / 2 for responses that share a prompt."""
        if not self.shared_prompts:
            return (self.prompt + self.response) / 2
        in_prompts = self.prompts * self.prompt
        sees = in_prompts * self.prompt / 2 + self.response_tokens * (self.prompt + self.response / 2)
        return sees / max(1.0, in_prompts + self.response_tokens)


@dataclass(frozen=True)
class Generation:
    """batch_s: from the first prompt to the last answer, alone. steady_s: a batch's share where the next one fills the gaps.

    concurrency: responses that an engine decodes at once. token_step_s: of one step of them all.
    """

    batch_s: float
    steady_s: float
    concurrency: float
    token_step_s: float


def token_step(
    shape: Shape, device: Device, rates: Rates, running: float, context: float, tensor_parallel: int = 1
) -> float:
    """Seconds of one decoding step of `running` responses with `context` tokens each: the larger of bytes and operations."""
    b = device.itemsize
    read = (b * shape.num_parameters + running * context * shape.kv_bytes(b)) / tensor_parallel
    flops = shape.forward_flops(running, context, running) / tensor_parallel
    peak = device.decode_flops or device.flops
    work = max(read / (device.bandwidth * rates.decode_bandwidth), flops / (peak * rates.decode_mfu))
    return work + rates.decode_step_s + _tensor_parallel_s(shape, device, rates, running, tensor_parallel, b)


def _tensor_parallel_s(
    shape: Shape, device: Device, rates: Rates, tokens: float, tensor_parallel: int, itemsize: int
) -> float:
    """Two reductions a layer of [tokens, D]."""
    if tensor_parallel == 1:
        return 0.0
    bytes_each = 2 * itemsize * tokens * shape.hidden * (tensor_parallel - 1) / tensor_parallel
    return 2 * shape.num_layers * (bytes_each / (device.link * rates.link_share) + MESSAGE_S)


def generation(
    shape: Shape, device: Device, rates: Rates, work: Workload, engines: int, tensor_parallel: int, kv_bytes: float
) -> Generation:
    """Of `engines` engines that share a step's responses evenly; kv_bytes: the KV cache of one whole engine.

    A batch alone drains at its end: from the mean length on, `longest - response` steps run with half of the places on
    average. In a steady state the next batch takes those places. Prompts are computed once for all of their samples.
    """
    share = work.sequences / engines
    context = work.prompt + work.response / 2
    room = kv_bytes / (shape.kv_bytes(device.itemsize) * max(1.0, work.prompt + work.response))
    running = max(1.0, min(share, room))
    full_s = token_step(shape, device, rates, running, context, tensor_parallel)
    half_s = token_step(shape, device, rates, max(1.0, running / 2), context, tensor_parallel)
    peak = (device.decode_flops if device.is_cpu and device.decode_flops else device.flops) * tensor_parallel
    prompt_flops = shape.forward_flops(work.prompts / engines * work.prompt, work.prompt / 2, work.prompts / engines)
    prefill_s = prompt_flops / (peak * rates.prefill_mfu)
    steps = share * work.response / running
    drained = min(max(0.0, work.longest - work.response), 2 * steps)
    steady_s = prefill_s + steps * full_s
    batch_s = prefill_s + (steps - drained / 2) * full_s + drained * half_s
    return Generation(max(batch_s, steady_s), steady_s, running, full_s)


def training_flops(shape: Shape, setup: TrainerSetup, work: Workload) -> float:
    """Of a step: forward, twice that backward, the body's forward once more with checkpointing; and of the models beside it.

    A frozen weight beside an adapter has no gradient: 4 operations a parameter and token in the place of 6. The adapter's own
    are 6 a parameter and token. Frozen models score each token once; a critic values it once, and is trained.
    """
    return (
        _update_flops(shape, setup, work, bool(setup.adapter))
        + 6.0 * work.trained_tokens * (setup.trained(shape) if setup.adapter else 0)
        + sum(_beside_flops(each, shape, setup, work) for each in setup.beside if each.scores)
    )


def _update_flops(shape: Shape, setup: TrainerSetup, work: Workload, frozen: bool, head: bool = True) -> float:
    body = shape.forward_flops(work.trained_tokens, work.seen, 0)
    products = shape.forward_flops(work.trained_tokens, 0, 0) + shape.forward_flops(0, 0, work.response_tokens) * head
    attention = body - shape.forward_flops(work.trained_tokens, 0, 0)
    return (2 if frozen else 3) * products + 3 * attention + body * setup.checkpointing


def _beside_flops(each: Beside, policy: Shape, setup: TrainerSetup, work: Workload) -> float:
    shape = each.shape or policy
    forward = shape.forward_flops(work.trained_tokens, work.seen, 0 if each.trained else work.response_tokens)
    return forward + (_update_flops(shape, setup, work, frozen=False, head=False) if each.trained else 0.0)


def training(shape: Shape, device: Device, rates: Rates, work: Workload, setup: TrainerSetup) -> float:
    """Seconds of a step's updates on `setup.ranks` devices: operations or collectives, whichever is longer, and Adam.

    Per rank and micro-batch stage 3 gathers weights twice and reduces gradients once, stage 2 reduces; per update, stages
    1 and 2 gather weights, and stages 0 and 1 reduce. Gradients and optimizer are those of the parameters that are trained; a
    critic has its own, and a frozen model that stage 3 divides is gathered once. Offloaded, a rank's gradients and new weights
    cross to the host and back and Adam works in its memory; offloaded weights come from there for each forward and backward.
    Micro-batches are taken as full and ranks as equally busy.
    """
    ranks, b = setup.ranks, setup.itemsize
    compute_s = training_flops(shape, setup, work) / (ranks * device.flops * rates.train_mfu)
    micro_batches = max(work.updates, math.ceil(work.trained_tokens / ranks / work.micro_batch_tokens))
    models = _trained_models(shape, setup)
    moved = sum(b * _moved_parameters(*model, setup.stage, micro_batches, work.updates) for model in models)
    trained = sum(own for _, own in models)
    if setup.stage == 3:
        frozen = [each for each in setup.beside if each.copied and each.divided and not each.trained]
        moved += sum(micro_batches * (each.itemsize or b) * (each.shape or shape).num_parameters for each in frozen)
    link = device.link if ranks <= device.per_node else device.node_link
    comm_s = moved * (ranks - 1) / ranks / (link * rates.link_share)
    # Masters and both moments read and written, the gradient read, the weight written.
    adam_bytes = (24 + 4 + b) * trained / (ranks if setup.stage else 1)
    adam_s, stream_s = work.updates * adam_bytes / device.bandwidth, 0.0
    if setup.offload:
        swap_s = (4 + b) * trained / ranks / (rates.swap_gb_s * GB)
        adam_s = work.updates * (swap_s + adam_bytes * min(ranks, device.per_node) / (rates.host_gb_s * GB))
    if setup.offload_weights:
        streamed = 2 * micro_batches * b * sum(whole for whole, _ in models) / ranks
        stream_s = streamed / (rates.stream_gb_s * GB)
    return max(compute_s, comm_s) + stream_s + adam_s


def _trained_models(shape: Shape, setup: TrainerSetup) -> list[tuple[int, int]]:
    """(all parameters, those that are trained) of the policy and of a critic."""
    critics = [critic_parameters(each.shape or shape) for each in setup.beside if each.trained]
    return [(setup.whole(shape), setup.trained(shape)), *((number, number) for number in critics)]


def _moved_parameters(whole: int, trained: int, stage: int, micro_batches: int, updates: int) -> int:
    if stage == 3:
        return micro_batches * (2 * whole + trained)
    return trained * (micro_batches + updates if stage == 2 else 2 * updates)


def publication(num_bytes: float, device: Device, rates: Rates, transport: str, gpus: int) -> float:
    """Seconds in which `num_bytes` of weights reach the engines: through shared memory or a file, or over links (nccl, ipc).

    transport auto: shared memory within a node, over links between nodes.
    """
    within = gpus <= device.per_node
    if transport in ("nccl", "ipc") or (transport == "auto" and not within):
        return num_bytes / ((device.link if within or transport == "ipc" else device.node_link) * rates.link_share)
    return num_bytes / (rates.publish_gb_s * GB)


@dataclass(frozen=True)
class StepTimes:
    """Of a step, seconds: generation of a batch alone and in a steady state, training, publication."""

    generate_s: float
    steady_s: float
    train_s: float
    publish_s: float

    @property
    def sync_s(self) -> float:
        """g + t + s: one after the other."""
        return self.generate_s + self.train_s + self.publish_s

    @property
    def async_s(self) -> float:
        """max(g, t) + s: beside each other, generation in its steady state."""
        return max(self.steady_s, self.train_s) + self.publish_s
