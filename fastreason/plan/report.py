"""The words of a plan: what is assumed, memory by part, the split and its times, and the same beside a run. Pure.

It owns tables of text. It refuses to compute anything but differences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from fastreason.plan.hardware import GB, TERA, Device, Rates
from fastreason.plan.memory import GIB, Parts, TrainerSetup, resident_bytes, whole_logits_bytes
from fastreason.plan.shapes import Shape
from fastreason.plan.split import Layout, Plan, judge
from fastreason.plan.times import Workload


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        for row in (head, *rows)
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def assumption_lines(
    device: Device, rates: Rates, work: Workload, given: Sequence[str], setup: TrainerSetup
) -> list[str]:
    """Everything that the figures rest on. given: which of the workload's lengths a person or a run has told."""
    links = (
        f", links {device.link / GB:.3g} GB/s in a node of {device.per_node}, {device.node_link / GB:.3g} between nodes"
    )
    return [
        f"device   {device.name}: {device.memory / GB:.0f} GB, {device.flops / TERA:.3g} TFLOP/s, "
        f"{device.bandwidth / GB:.3g} GB/s{'' if device.is_cpu else links} ({device.source})",
        f"step     {work.prompts} prompts x {work.samples} samples, {work.updates} update(s), micro-batches of "
        f"{work.micro_batch_tokens} tokens",
        f"lengths  prompt {work.prompt:.0f}, response {work.response:.0f}, longest {work.longest} "
        f"({', '.join(given) if given else 'mean lengths assumed: half of the longest allowed'})",
        "assumed  " + ", ".join(f"{field.name}={getattr(rates, field.name):.3g}" for field in fields(Rates)),
        "         (--rate key=number changes one); micro-batches are full, ranks equally busy, every sequence has a gradient, "
        "nothing is padded or evaluated",
        *model_lines(setup),
    ]


def model_lines(setup: TrainerSetup) -> list[str]:
    """What is assumed of an adapter, and of the models beside the policy."""
    lines = []
    if setup.adapter:
        head = "the head too" if setup.adapter_head else "not on the head"
        sent = "it alone is published" if setup.adapter_published else "merged weights are published"
        lines.append(
            f"adapter  rank {setup.adapter} on all linear layers (fewer with lora.targets), {head}; a frozen weight has no "
            f"gradient: 4 operations a parameter and token in the place of 6; {sent}"
        )
    said = []
    for each in setup.beside:
        what = "trained on each token" if each.trained else "scores each token" if each.scores else "on one rank"
        own = "" if each.copied else ", the model itself without its adapter"
        size = ", assumed as large as the policy: its config.json is not on this machine" if each.assumed else ""
        said.append(f"{each.name} ({what}{own}{size})")
    return [*lines, f"beside   {'; '.join(said)}"] if said else lines


def memory_lines(layout: Layout, shape: Shape, work: Workload, rates: Rates, device: Device) -> list[str]:
    """GiB of a trainer's device and of an engine's, by part, and what whole logits would add."""
    setup = layout.setup
    of_responses = work.micro_batch(setup.ranks) * work.response_share
    kept = f", adapter of rank {setup.adapter}" if setup.adapter else ""
    kept += ", checkpointing" if setup.checkpointing else ""
    host = ["optimizer"] * setup.offload + ["weights"] * setup.offload_weights
    kept += f", {' and '.join(host)} on the host" if host else ""
    trainer, engine = layout.trainer, layout.engine
    if layout.colocated:
        trainer = {**trainer, "engine, asleep": rates.asleep_gib * GIB}
        engine = {**engine, "trainer, at rest": resident_bytes(layout.trainer)}
    sides: list[tuple[str, Parts]] = [
        (f"trainer, {setup.ranks} rank(s), ZeRO-{setup.stage}{kept}", trainer),
        (f"engine, tensor parallel {layout.tensor_parallel}", engine),
    ]
    lines = []
    for name, parts in sides:
        parts = {**parts, "reserve": rates.reserve_gib * GIB}
        rows = [[part, f"{size / GIB:.1f}"] for part, size in parts.items()]
        lines += [*table([f"{name}, GiB each", ""], [*rows, ["together", f"{sum(parts.values()) / GIB:.1f}"]]), ""]
    whole = whole_logits_bytes(shape, of_responses)
    lines.append(
        f"whole logits would take {whole / GIB:.1f} GiB in place of the loss's {layout.trainer['loss'] / GIB:.1f}."
    )
    if layout.colocated:
        share = sum(layout.engine.values()) / device.memory
        lines.append(
            f"The engine fits beside the trainer at rest with rollout.gpu_memory_utilization={share:.2f} or less."
        )
    return lines


def layout_cells(layout: Layout | None) -> list[str]:
    if layout is None:
        return ["does not fit", *[""] * 7]
    times = layout.times
    who = f"{layout.engine_gpus} + {layout.setup.ranks}" if not layout.colocated else f"{layout.setup.ranks} in turn"
    seconds = (
        times.generate_s,
        times.steady_s,
        times.train_s,
        times.publish_s + layout.swap_s,
        times.sync_s + layout.swap_s,
        layout.step_s,
    )
    return [who, f"{layout.tensor_parallel}", *(f"{value:.1f}" for value in seconds)]


LAYOUT_HEAD = ["engines + ranks", "tp", "g alone", "g steady", "t", "s", "g + t + s", "step"]


def plan_lines(plan: Plan, work: Workload, rates: Rates, device: Device) -> list[str]:
    """The whole of one plan: memory of the best layout, both layouts' seconds, the judgement."""
    shape = plan.shape
    lines = [f"{shape.name}: {shape.num_parameters / 1e9:.2f} B parameters on {plan.gpus} device(s)", ""]
    if plan.best is not None:
        lines += [*memory_lines(plan.best, shape, work, rates, device), ""]
    rows = [["split", *layout_cells(plan.split)], ["colocated", *layout_cells(plan.colocated)]]
    lines += table(["seconds", *LAYOUT_HEAD], rows)
    return [
        *lines,
        "step: split max(g steady, t) + s; colocated g + t + s, with the engines' falling asleep and waking in s.",
        "",
        judge(plan),
    ]


def summary_lines(plans: Sequence[Plan]) -> list[str]:
    """One line a model and number of devices, and under the table what asynchrony gains in each."""
    rows = []
    for plan in plans:
        step = f"{plan.colocated.step_s:.1f}" if plan.colocated else "-"
        stage = f"{plan.split.setup.stage}{'c' if plan.split.setup.checkpointing else ''}" if plan.split else "-"
        rows.append([plan.shape.name, str(plan.gpus), *layout_cells(plan.split), stage, step])
    head = ["model", "gpus", *LAYOUT_HEAD, "zero", "colocated"]
    verdicts = [f"{plan.shape.name} on {plan.gpus}: {judge(plan)}" for plan in plans]
    return [*table(head, rows), "", *verdicts]


def against_lines(estimated: Mapping[str, float], measured: Mapping[str, float]) -> list[str]:
    """Estimate, measurement and the error of the first in percent of the second."""
    rows = []
    for name, value in measured.items():
        error = f"{100 * (estimated[name] / value - 1):+.0f} %" if value else "-"
        rows.append([name, f"{estimated[name]:.3g}", f"{value:.3g}", error])
    return table(["median of a step", "estimated", "measured", "error"], rows)
