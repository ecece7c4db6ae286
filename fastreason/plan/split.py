"""Who gets which GPUs: every split of a number of them between engines and trainer, all of them for both in turn, the best.

It owns the search and the judgement of asynchrony. What is compared: `split` with both sides beside each other (async), the
same one after the other (sync), and `colocated`, where all GPUs generate and then all train: the engines sleep meanwhile, and
the ranks' weights, gradients and optimizer stay where they are.
"""

from dataclasses import dataclass, replace

from fastreason.plan.hardware import Device, Rates
from fastreason.plan.memory import GIB, Parts, TrainerSetup, engine_memory, fits, resident_bytes, trainer_memory
from fastreason.plan.shapes import Shape
from fastreason.plan.times import StepTimes, Workload, generation, publication, training

# A side that takes less than this share of the other's time has little to hide; a gain below that is none to plan for.
SMALL_SHARE, SMALL_GAIN, SLOW_PUBLICATION = 0.25, 1.05, 0.2
KV_SHARE = 0.3  # of an engine's memory that its KV cache should have at least
SLACK = 1.02  # of fewer GPUs that are so nearly as fast the others stay idle


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
    def num_gpus(self) -> int:
        return self.setup.ranks if self.colocated else self.engine_gpus + self.setup.ranks

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
        if has_room(engine_memory(shape, device, rates, degree, device.itemsize)):
            return degree
        degree *= 2
    return None


def has_room(engine: Parts) -> bool:
    return engine["kv cache"] >= KV_SHARE * (engine["kv cache"] + engine["weights"])


def fitting_setup(
    shape: Shape, device: Device, rates: Rates, work: Workload, wanted: TrainerSetup
) -> TrainerSetup | None:
    """The first of `setups` that fits."""
    for setup in setups(wanted):
        if fits(rank_memory(shape, work, setup), device, rates):
            return setup
    return None


def setups(wanted: TrainerSetup) -> list[TrainerSetup]:
    """As wanted, with stage 3, with checkpointing too, with the optimizer on the host: each smaller than the last."""
    tries = [wanted, replace(wanted, zero_stage=3), replace(wanted, zero_stage=3, checkpointing=True)]
    return [*tries, replace(tries[-1], offload=True)]


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
    times = StepTimes(
        generate_s=made.batch_s,
        steady_s=made.steady_s,
        train_s=training(shape, device, rates, work, setup),
        publish_s=publication(setup.published_bytes(shape), device, rates, transport, gpus),
    )
    swap_s = 2 * rates.sleep_s if colocated else 0.0
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
    colocated = in_turn(shape, device, rates, work, wanted, gpus, tensor_parallel, transport)
    least = needed_tensor_parallel(shape, device, rates, tensor_parallel)
    found: list[Layout] = []
    for degree in degrees(least, min(gpus - 1, device.per_node)) if least is not None else []:
        engine = engine_memory(shape, device, rates, degree, device.itemsize)
        for total in totals(gpus, device.per_node):
            for engines in range(1, min((total - 1) // degree, work.sequences) + 1):
                # Ranks beyond a step's rows would stay idle.
                setup = replace(wanted, ranks=min(total - engines * degree, work.sequences))
                fitting = fitting_setup(shape, device, rates, work, setup)
                if fitting is not None:
                    found.append(layout_of(shape, device, rates, work, fitting, engine, engines, degree, transport))
    return Plan(shape, gpus, fewest(found), colocated)


def degrees(least: int, most: int) -> list[int]:
    """Tensor parallelism to look at: doubled from `least` on, at most `most`."""
    return [least << number for number in range(8) if least << number <= most]


def totals(gpus: int, per_node: int) -> list[int]:
    """Numbers of GPUs to look at: whole nodes, and all."""
    return sorted({*range(per_node, gpus, per_node), gpus})


def fewest(layouts: list[Layout]) -> Layout | None:
    """Of the layouts within SLACK of the fastest the one with the fewest GPUs, and of these the fastest."""
    if not layouts:
        return None
    limit = SLACK * min(each.step_s for each in layouts)
    near = [each for each in layouts if each.step_s <= limit]
    return min(near, key=lambda each: (each.num_gpus, each.step_s))


def in_turn(
    shape: Shape,
    device: Device,
    rates: Rates,
    work: Workload,
    wanted: TrainerSetup,
    gpus: int,
    tensor_parallel: int,
    transport: str,
) -> Layout | None:
    """The fastest colocated layout of all GPUs; None where none fits.

    While an engine generates the ranks' resident parts are beside it; at their peak, what an engine that sleeps still holds.
    """
    found = []
    for setup in setups(replace(wanted, ranks=min(gpus, work.sequences))):
        trainer = rank_memory(shape, work, setup)
        for degree in degrees(tensor_parallel, min(gpus, device.per_node)):
            engine = engine_memory(shape, device, rates, degree, device.itemsize, resident_bytes(trainer))
            asleep = {**trainer, "engine, asleep": rates.asleep_gib * GIB}
            if has_room(engine) and fits(asleep, device, rates):
                engines = min(gpus // degree, work.sequences)
                found.append(
                    layout_of(shape, device, rates, work, setup, engine, engines, degree, transport, colocated=True)
                )
    return min(found, key=lambda each: each.step_s) if found else None


def judge(plan: Plan) -> str:
    """What asynchrony gains over the alternatives, or why it does not help."""
    split, colocated = plan.split, plan.colocated
    if split is None:
        if plan.gpus < 2 and colocated:
            return "asynchrony needs devices for each side: with one, generation and training take turns."
        return "no split fits: " + (
            "colocated does." if colocated else "neither does colocated. Use more or larger GPUs."
        )
    times = split.times
    late = times.publish_s > SLOW_PUBLICATION * times.async_s
    share = (
        f" Publication takes {times.publish_s / times.async_s:.0%} of the step: see rollout.transport." if late else ""
    )
    idle = plan.gpus - split.num_gpus
    rest = (
        f" {idle} GPUs stay idle: with them a step is less than {SLACK - 1:.0%} faster. Raise train.prompts_per_step."
        if idle > 0 and not plan.alone
        else ""
    )
    return _gain(split, colocated, plan.alone) + share + rest


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
