"""Who gets which GPUs: every split of a number of them between engines and trainer, all of them for both in turn, the best.

It owns the search and the judgement of asynchrony. What is compared: `split` with both sides beside each other (async), the
same one after the other (sync), and `colocated`, where all GPUs generate and then all train.
"""

from dataclasses import dataclass, replace

from fastreason.plan.hardware import GB, Device, Rates
from fastreason.plan.memory import Parts, TrainerSetup, engine_memory, fits, trainer_memory
from fastreason.plan.shapes import Shape
from fastreason.plan.times import StepTimes, Workload, generation, publication, training

# A side that takes less than this share of the other's time has little to hide; a gain below that is none to plan for.
SMALL_SHARE, SMALL_GAIN, SLOW_PUBLICATION = 0.25, 1.05, 0.2
KV_SHARE = 0.3  # of an engine's memory that its KV cache should have at least


@dataclass(frozen=True)
class Layout:
    """`engines` engines of `tensor_parallel` GPUs, and a trainer, on GPUs of their own or (colocated) on the same."""

    engines: int
    tensor_parallel: int
    setup: TrainerSetup
    colocated: bool
    times: StepTimes
    trainer: Parts
    engine: Parts
    running: float
    swap_s: float = 0.0

    @property
    def engine_gpus(self) -> int:
        return self.engines * self.tensor_parallel

    @property
    def step_s(self) -> float:
        """Colocated: one after the other, with the change of tenants. Else beside each other."""
        return self.times.sync_s + self.swap_s if self.colocated else self.times.async_s


@dataclass(frozen=True)
class Plan:
    """The best split and the colocated layout of `gpus` GPUs; None where none fits. alone: nothing was searched for."""

    shape: Shape
    gpus: int
    split: Layout | None
    colocated: Layout | None
    alone: bool = False

    @property
    def best(self) -> Layout | None:
        found = [layout for layout in (self.split, self.colocated) if layout is not None]
        return min(found, key=lambda layout: layout.step_s) if found else None


def needed_tensor_parallel(shape: Shape, device: Device, rates: Rates, wanted: int) -> int | None:
    """The smallest power of two, at least `wanted`, at which an engine has room for its KV cache; None: more than a node."""
    degree = wanted
    while degree <= device.per_node:
        parts = engine_memory(shape, device, rates, degree, device.itemsize)
        if parts["kv cache"] >= KV_SHARE * (parts["kv cache"] + parts["weights"]):
            return degree
        degree *= 2
    return None


def fitting_setup(
    shape: Shape, device: Device, rates: Rates, work: Workload, wanted: TrainerSetup
) -> TrainerSetup | None:
    """The setup as wanted, else with stage 3, with checkpointing too, with the optimizer on the host: the first that fits."""
    tries = [wanted, replace(wanted, zero_stage=3), replace(wanted, zero_stage=3, checkpointing=True)]
    tries.append(replace(tries[-1], offload=True))
    for setup in tries:
        if fits(rank_memory(shape, work, setup), device, rates):
            return setup
    return None


def rank_memory(shape: Shape, work: Workload, setup: TrainerSetup) -> Parts:
    """`trainer_memory` at the largest micro-batch of a workload."""
    tokens = work.micro_batch(setup.ranks)
    return trainer_memory(shape, setup, tokens, tokens * work.response_share)


def layout_of(
    shape: Shape,
    device: Device,
    rates: Rates,
    work: Workload,
    setup: TrainerSetup,
    engine: Parts,
    engines: int,
    tensor_parallel: int = 1,
    transport: str = "auto",
    colocated: bool = False,
) -> Layout:
    """One layout with its times. engine: bytes of one of an engine's GPUs."""
    trainer = rank_memory(shape, work, setup)
    made = generation(shape, device, rates, work, engines, tensor_parallel, engine["kv cache"] * tensor_parallel)
    gpus = setup.ranks + (0 if colocated else engines * tensor_parallel)
    # On the same GPUs weights go over links, and the tenants change twice a step: out and in again.
    times = StepTimes(
        generate_s=made.batch_s,
        steady_s=made.steady_s,
        train_s=training(shape, device, rates, work, setup),
        publish_s=publication(shape, device, rates, "ipc" if colocated else transport, gpus),
    )
    state = sum(trainer[part] for part in ("weights", "gradients", "optimizer")) + engine["weights"]
    swap_s = 2 * state / (rates.swap_gb_s * GB) if colocated else 0.0
    return Layout(engines, tensor_parallel, setup, colocated, times, trainer, engine, made.concurrency, swap_s)


def plan_gpus(
    shape: Shape,
    device: Device,
    rates: Rates,
    work: Workload,
    wanted: TrainerSetup,
    gpus: int,
    tensor_parallel: int = 1,
    transport: str = "auto",
) -> Plan:
    """The best split of `gpus` GPUs, and all of them for both in turn."""
    degree = needed_tensor_parallel(shape, device, rates, tensor_parallel)
    if degree is None or degree > gpus:
        return Plan(shape, gpus, None, None)
    engine = engine_memory(shape, device, rates, degree, device.itemsize)

    def layout(engines: int, ranks: int, colocated: bool) -> Layout | None:
        # Engines and ranks beyond a step's rows would stay idle.
        setup = replace(wanted, ranks=min(ranks, work.sequences))
        found = fitting_setup(shape, device, rates, work, setup)
        engines = min(engines, work.sequences)
        if found is None:
            return None
        return layout_of(shape, device, rates, work, found, engine, engines, degree, transport, colocated)

    splits = [layout(engines, gpus - engines * degree, False) for engines in range(1, (gpus - 1) // degree + 1)]
    fitting = [each for each in splits if each is not None]
    best = min(fitting, key=lambda each: each.step_s) if fitting else None
    return Plan(shape, gpus, best, layout(gpus // degree, gpus, True))


def judge(plan: Plan) -> str:
    """What asynchrony gains over the alternatives, or why it does not help."""
    split, colocated = plan.split, plan.colocated
    if split is None:
        if plan.gpus < 2:
            return "asynchrony needs devices for each side: with one, generation and training take turns."
        return "no split fits: " + (
            "colocated does." if colocated else "neither does colocated. Use more or larger GPUs."
        )
    times = split.times
    late = times.publish_s > SLOW_PUBLICATION * times.async_s
    share = (
        f" Publication takes {times.publish_s / times.async_s:.0%} of the step: see rollout.transport." if late else ""
    )
    return _gain(split, colocated, plan.alone) + share


def _gain(split: Layout, colocated: Layout | None, alone: bool) -> str:
    times = split.times
    short, long = sorted((times.steady_s, times.train_s))
    over_sync = times.sync_s / times.async_s
    said = f"asynchrony on the split is {over_sync:.2f} x as fast as one side after the other"
    if short < SMALL_SHARE * long:
        side = "training" if times.train_s == long else "generation"
        said += f" ({side} takes {long / max(short, 1e-9):.1f} x the other side: little can be hidden)"
    if alone:
        return said + "."
    if colocated is None:
        return said + "; all GPUs for both in turn do not fit."
    gain = colocated.step_s / times.async_s
    if gain < 1:
        return said + (
            f"; but all GPUs for both in turn are {1 / gain:.2f} x as fast as that: asynchrony does not help here."
        )
    if gain < SMALL_GAIN:
        return said + f"; only {gain:.2f} x as fast as all GPUs for both in turn: asynchrony does not help here."
    return said + f", {gain:.2f} x as fast as all GPUs for both in turn."
