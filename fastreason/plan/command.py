"""`fastreason plan`: from a config, shapes, devices and lengths to the printed plan; and a plan beside a finished run.

It owns reading: configs, config.json, calibrations, a run's metrics. The arithmetic is in the other modules.
"""

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastreason.config import Config, load_config, updates_prompts
from fastreason.cores import parse_cores
from fastreason.errors import ConfigError, DataError, ModelError
from fastreason.metrics import read_metrics
from fastreason.models import read_model_config, resolve_model
from fastreason.placement import place
from fastreason.plan.hardware import DEVICES, Device, Rates, changed_rates, named_device
from fastreason.plan.memory import GIB, Beside, TrainerSetup, engine_memory
from fastreason.plan.report import against_lines, assumption_lines, plan_lines, summary_lines
from fastreason.plan.shapes import Shape, named_shape, shape_of
from fastreason.plan.split import Layout, Plan, layout_of, plan_gpus
from fastreason.plan.times import Workload
from fastreason.preflight import anchor_paths, choose_dtype
from fastreason.resources import num_engines

SHORT_LINE = 384  # tokens, as in policy.py: lines up to which auto takes eager attention on a CPU
SKIPPED = 1  # of a run's first steps: they hold what is made once
DECODE_ROWS = 64


@dataclass(frozen=True)
class Machine:
    """What is planned for: a device with its rates."""

    device: Device
    rates: Rates


def run_plan(options: argparse.Namespace) -> int:
    """Print what `fastreason plan` was asked for; raises ConfigError, ModelError or DataError naming the key."""
    if options.against:
        print("\n".join(against(Path(options.against), options)))
        return 0
    if not options.config:
        raise ConfigError(
            "plan: give a config file, e.g. fastreason plan configs/math_grpo_gpu.yaml --gpu h100 --gpus 8"
        )
    config = online(anchor_paths(load_config(options.config, options.overrides)))
    shapes = [named_shape(name) for name in options.model_shape or []] or [own_shape(config)]
    machine = chosen_machine(options, config, shapes[0])
    given = lengths_given(options)
    work = workload_of(config, options.prompt_tokens, options.response_tokens, machine.device.is_cpu)
    setup = setup_of(config, machine.device, config.train.ranks, work)
    print("\n".join([*assumption_lines(machine.device, machine.rates, work, given, setup), ""]))
    plans = [plan_of(config, shape, machine, work, gpus) for shape in shapes for gpus in options.gpus]
    print(
        "\n".join(
            plan_lines(plans[0], work, machine.rates, machine.device) if len(plans) == 1 else summary_lines(plans)
        )
    )
    return 0


def online(config: Config) -> Config:
    if config.offline.objective is not None:
        raise ConfigError(f"offline.objective={config.offline.objective}: only runs that generate are planned for.")
    return config


def own_shape(config: Config) -> Shape:
    """The shape of the config's model, where it is on this machine."""
    try:
        folder = resolve_model(config.model.model_copy(update={"allow_download": False}), weights=False)
    except ModelError as error:
        raise ModelError(f"{error} Or give its shape: --model-shape 1.5b, 7b, 32b, 70b, ...") from error
    return shape_of(read_model_config(folder), config.model.path)


def lengths_given(options: argparse.Namespace) -> list[str]:
    names = {"--prompt-tokens": options.prompt_tokens, "--response-tokens": options.response_tokens}
    return [f"{name} given" for name, value in names.items() if value is not None]


def workload_of(config: Config, prompt: float | None, response: float | None, on_cpu: bool) -> Workload:
    """A step's work; mean lengths that are not given are half of the longest allowed."""
    rollout, train = config.rollout, config.train
    return Workload(
        prompts=train.prompts_per_step,
        samples=rollout.samples_per_prompt,
        prompt=config.data.max_prompt_tokens / 2 if prompt is None else prompt,
        response=rollout.max_new_tokens / 2 if response is None else response,
        longest=rollout.max_new_tokens,
        updates=train.prompts_per_step // updates_prompts(config),
        micro_batch_tokens=train.micro_batch_tokens,
        shared_prompts=train.share_prompts == "on" or (train.share_prompts == "auto" and on_cpu),
    )


def setup_of(config: Config, device: Device, ranks: int, work: Workload) -> TrainerSetup:
    """How the config's trainer keeps its models; on a CPU with eager attention's scores where its lines are short."""
    return TrainerSetup(
        ranks=ranks,
        zero_stage=config.train.zero_stage,
        itemsize=device.itemsize,
        checkpointing=config.model.gradient_checkpointing,
        offload=config.train.offload != "none",
        offload_weights=config.train.offload == "cpu_weights",
        fused=not device.is_cpu and config.model.liger != "off",
        scores=round(work.line) if device.is_cpu and work.line <= SHORT_LINE else 0,
        on_gpu=not device.is_cpu,
        adapter=config.lora.rank or 0,
        adapter_head=config.lora.head,
        adapter_published=config.lora.applied_by_engine,
        beside=models_beside(config, device),
    )


def models_beside(config: Config, device: Device) -> tuple[Beside, ...]:
    """What each rank of an online run has beside the policy, as `companions.py` loads it."""
    from fastreason.algorithms import resolve_algorithm

    algorithm, found = resolve_algorithm(config), []
    if algorithm.compares_with_teacher and config.teacher.where == "trainer":
        wanted = choose_dtype(config.teacher.dtype, "cpu" if device.is_cpu else "cuda")
        found.append(companion("teacher", config.teacher.path, config, itemsize=4 if wanted == "float32" else 2))
    if algorithm.compares_with_reference:
        found.append(Beside("reference", copied=config.lora.rank is None))
    if algorithm.critic:
        found.append(companion("critic", config.critic.path, config, trained=True))
    if config.rollout.transport in ("ipc", "nccl"):
        found.append(Beside("published copy", scores=False, divided=False))
    return tuple(found)


def companion(name: str, path: str | None, config: Config, itemsize: int = 0, trained: bool = False) -> Beside:
    """A model of another folder; as large as the policy where that is the policy's, or is not on this machine."""
    shape = None
    if path is not None and path != config.model.path and Path(path).is_dir():
        shape = shape_of(read_model_config(path), path)
    assumed = shape is None and path not in (None, config.model.path)
    return Beside(name, shape, itemsize, trained, assumed=assumed)


def chosen_machine(options: argparse.Namespace, config: Config, shape: Shape) -> Machine:
    """--calibrate measures; --gpu names a row or a calibration's file."""
    if options.calibrate is not None:
        machine = measured_machine(options, config, shape)
    elif (options.gpu or "").endswith(".json"):
        from fastreason.plan.calibration import read_calibration

        found = read_calibration(Path(options.gpu))
        machine = Machine(found.device, found.rates)
    elif options.gpu is None:
        raise ConfigError(
            f"plan: for what? --gpu with one of {', '.join(DEVICES)}, or --calibrate for this machine's CPU."
        )
    else:
        device = named_device(options.gpu)
        itemsize = 4 if config.model.dtype == "float32" else 2
        machine = Machine(replace(device, itemsize=itemsize), Rates())
    return Machine(machine.device, changed_rates(machine.rates, options.rate or []))


def measured_machine(options: argparse.Namespace, config: Config, shape: Shape) -> Machine:
    from fastreason.plan.calibration import calibrate, write_calibration

    train, rollout = config.train, config.rollout
    threads = [
        len(parse_cores(text, key)) if text else 1
        for text, key in ((train.cores, "train.cores"), (rollout.cores, "rollout.cores"))
    ]
    each = max(1, threads[1] // num_engines(config))  # as engine_shares divides them
    found = calibrate(shape, choose_dtype(config.model.dtype, "cpu"), train.threads or threads[0], each, DECODE_ROWS)
    if options.calibrate:
        write_calibration(found, Path(options.calibrate))
    return Machine(found.device, found.rates)


def plan_of(config: Config, shape: Shape, machine: Machine, work: Workload, gpus: int) -> Plan:
    """On GPUs the search; on a CPU the config's own engines and ranks."""
    device, rates = machine.device, machine.rates
    if device.is_cpu:
        own = own_layout(config, shape, machine, work)
        split, colocated = (None, own) if own.colocated else (own, None)
        return Plan(shape, own.num_gpus, split, colocated, alone=True)
    wanted = setup_of(config, device, config.train.ranks, work)
    return plan_gpus(shape, device, rates, work, wanted, gpus, config.rollout.tensor_parallel, config.rollout.transport)


def own_layout(config: Config, shape: Shape, machine: Machine, work: Workload) -> Layout:
    """The config's own: its engines beside its ranks, or in turn with them where they sleep."""
    device, rates, rollout = machine.device, machine.rates, config.rollout
    asleep = place(config, "cpu" if device.is_cpu else "cuda").sleeps
    engine = engine_memory(shape, device, rates, rollout.tensor_parallel, device.itemsize)
    if device.is_cpu:
        engine["kv cache"] = rollout.kv_cache_gib * GIB
    setup = setup_of(config, device, config.train.ranks, work)
    return layout_of(
        shape,
        device,
        rates,
        work,
        setup,
        engine,
        num_engines(config),
        rollout.tensor_parallel,
        rollout.transport,
        colocated=asleep,
    )


def against(run_dir: Path, options: argparse.Namespace) -> list[str]:
    """The estimate for a run that has been, from its own lengths, beside what it measured."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--against {run_dir}: no run there (no config.yaml). Give the folder of a run.")
    config = online(load_config(run_dir / "config.yaml"))
    rows = [row for row in read_metrics(run_dir) if row.get("time/train_s") is not None][SKIPPED:]
    if not rows:
        raise DataError(f"--against {run_dir}: its metrics.jsonl has no steps after the first. Let it run longer.")
    shape = named_shape(options.model_shape[0]) if options.model_shape else own_shape(config)
    machine = chosen_machine(options, config, shape)
    work = measured_work(config, rows, machine.device.is_cpu)
    estimated = estimates(config, shape, machine, work)
    names = {"train_s": "time/train_s", "generate_s": "time/generate_s", "publish_s": "time/publish_s"}
    names |= {"step_s": "time/step_s", "peak_gib": "memory/peak_gib"}
    measured = {name: _median(rows, key) for name, key in names.items()}
    setup = setup_of(config, machine.device, config.train.ranks, work)
    lines = assumption_lines(machine.device, machine.rates, work, [f"lengths of {run_dir.name}"], setup)
    return [*lines, "", f"{shape.name}, {len(rows)} steps of {run_dir}", *against_lines(estimated, measured)]


def measured_work(config: Config, rows: list[dict[str, Any]], on_cpu: bool) -> Workload:
    """A step's work from its medians: tokens of responses, tokens that were computed, and so those of prompts."""
    response = _median(rows, "rollout/response_tokens_mean")
    work = workload_of(config, None, response, on_cpu)
    tokens = _median(rows, "train/tokens")
    prompt = max(0.0, tokens / work.sequences - response)
    return replace(work, prompt=prompt, computed=_median(rows, "train/tokens_computed"))


def estimates(config: Config, shape: Shape, machine: Machine, work: Workload) -> dict[str, float]:
    """Of the config's own layout, by the names that `against` measures."""
    layout = own_layout(config, shape, machine, work)
    times = layout.times
    return {
        "train_s": times.train_s,
        "generate_s": times.steady_s if config.rollout.max_staleness else times.generate_s,
        "publish_s": times.publish_s + layout.swap_s / 2,  # the engines wake in it, and fall asleep before the updates
        "step_s": times.async_s if config.rollout.max_staleness else times.sync_s + layout.swap_s,
        "peak_gib": sum(layout.trainer.values()) / GIB + machine.rates.reserve_gib,
    }


def _median(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    if not values:
        raise DataError(f"--against: the run's metrics have no {key}.")
    return statistics.median(values)
