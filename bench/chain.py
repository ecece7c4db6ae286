"""The chain of configs/mini with several seeds: held-out accuracy of the base model and after SFT, REDI and RL.

    python bench/chain.py [--seeds 3] [--out runs/chain] [--json FILE] [STAGE:key=value ...]

For each seed, in processes of their own and with the recipes as they are:

    distill    fastreason distill configs/mini/distill.yaml --out DIR/data
    sft        fastreason train configs/mini/sft.yaml, on the positives
    redi       fastreason train configs/mini/redi.yaml, on the pairs, from the sft run
    rl         fastreason train configs/mini/rl_from_distilled.yaml, from the redi run
    base_eval, sft_eval    the same recipe as rl for one step of one prompt, from the base model and from the sft run

An offline run measures no accuracy: base, SFT and REDI are what base_eval, sft_eval and rl measure before their first step, RL
is what rl measures after its last one, all on the recipe's held-out problems. distill leaves these out; that both choose the
same is checked. A seed is that of sampling, of the rows' and prompts' order and of evaluation; the problems are the same.

What is finished is skipped by the same command, a stopped stage goes on where it can. Ctrl-C ends all processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chain_table import LEVELS, levels_of, print_table, table
from children import run_child

from fastreason.checkpoint import CheckpointStore
from fastreason.config import load_config
from fastreason.distill.section import load_distill_config
from fastreason.metrics import read_summary, write_atomically

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "mini"
COMMAND = (sys.executable, "-P", "-m", "fastreason.cli")
GRACE_S = 120.0  # for a stage that is told to stop to save its state
MEASURE = ("train.steps=1", "train.prompts_per_step=1", "checkpoint.save_model=false")


@dataclass(frozen=True)
class Stage:
    """One command: its recipe, the stage whose model or data it takes, and what is different from the recipe."""

    recipe: str
    model: str | None = None
    data: str | None = None
    overrides: tuple[str, ...] = ()


STAGES = {
    "distill": Stage("distill"),
    "sft": Stage("sft", data="positives.jsonl"),
    "redi": Stage("redi", model="sft", data="pairs.jsonl"),
    "base_eval": Stage("rl_from_distilled", model="base", overrides=MEASURE),
    "sft_eval": Stage("rl_from_distilled", model="sft", overrides=MEASURE),
    "rl": Stage("rl_from_distilled", model="redi"),
}


@dataclass
class Seed:
    """One seed's folder: `data` of the distillation and a run's folder for each other stage."""

    number: int
    folder: Path
    given: Mapping[str, Sequence[str]]

    def path(self, stage: str) -> Path:
        return self.folder / ("data" if stage == "distill" else stage)

    def arguments(self, stage: str) -> list[str]:
        """The command of a stage behind `fastreason`, from the beginning."""
        spec, own = STAGES[stage], list(STAGES[stage].overrides)
        recipe, given = str(RECIPES / f"{spec.recipe}.yaml"), list(self.given.get(stage, ()))
        if stage == "distill":
            return ["distill", recipe, "--out", str(self.path(stage)), f"distill.seed={self.number}", *given]
        own += [f"run.dir={self.folder}", f"run.name={stage}", f"run.seed={self.number}"]
        if spec.model is not None:
            base = load_config(RECIPES / "sft.yaml").model.path
            own.append(f"model.path={base if spec.model == 'base' else self.path(spec.model)}")
        if spec.data is not None:
            own.append(f"offline.path={self.path('distill') / spec.data}")
        else:
            own.append(f"eval.seed={self.number}")
        return ["train", recipe, *own, *given]

    def resumed(self, stage: str) -> list[str] | None:
        """The command that goes on with a stage that was stopped; None where it has to begin again."""
        folder = self.path(stage)
        if stage == "distill":
            found = (folder / "samples.jsonl").is_file()
            return ["distill", "--out", str(folder), "--resume"] if found else None
        found = CheckpointStore(folder, keep_last=1, keep_best=False).complete()
        # Stopped in its last evaluation it has done its steps, and cannot go on.
        going = bool(found) and not read_summary(folder).get("finished")
        return ["train", "--resume", str(folder)] if going else None

    def finished(self, stage: str) -> bool:
        if stage == "distill":
            return (self.path(stage) / "report.json").is_file()
        summary = read_summary(self.path(stage))
        measured = all(summary.get(key) is not None for name, key in LEVELS.values() if name == stage)
        saved = "checkpoint.save_model=false" in STAGES[stage].overrides or (self.path(stage) / "model").is_dir()
        return bool(summary.get("finished")) and measured and saved

    def make(self, stage: str, command: Sequence[str] = COMMAND) -> float:
        """Run a stage to its end; returns its seconds."""
        arguments = self.resumed(stage)
        if arguments is None:
            shutil.rmtree(self.path(stage), ignore_errors=True)
            arguments = self.arguments(stage)
        log = self.folder / "logs" / f"{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        run_child([*command, *arguments], log, grace_s=GRACE_S)
        if not self.finished(stage):
            raise SystemExit(f"seed {self.number}, {stage}: ended without its results; see {log}")
        return time.perf_counter() - started

    def levels(self) -> dict[str, float | None]:
        """{level: held-out accuracy}, None where it is not there yet."""
        return levels_of({stage: read_summary(self.path(stage)) for stage in STAGES if self.finished(stage)})


def check_held_out(given: Mapping[str, Sequence[str]]) -> None:
    """Raise SystemExit where the problems of the evaluation are not those that the distillation leaves out."""
    distill = load_distill_config(RECIPES / "distill.yaml", list(given.get("distill", ())))
    for stage in ("base_eval", "sft_eval", "rl"):
        config = load_config(RECIPES / "rl_from_distilled.yaml", list(given.get(stage, ())))
        if distill.data != config.data or distill.distill.held_out != config.eval.num_prompts:
            raise SystemExit(
                f"{stage} evaluates {config.eval.num_prompts} problems of its section data, and distill leaves out "
                f"{distill.distill.held_out} of its own: they would not be the same. Give both the same data and number."
            )


def settle(folder: Path, given: Mapping[str, Sequence[str]]) -> None:
    """Note what the runs of a folder are made with; raises SystemExit where those there were made otherwise."""
    recipes = {stage.recipe: (RECIPES / f"{stage.recipe}.yaml").read_text() for stage in STAGES.values()}
    wanted = json.loads(json.dumps({"overrides": given, "recipes": recipes}))
    path = folder / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != wanted:
        raise SystemExit(f"--out {folder}: its runs were made with other overrides or recipes. Use another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(wanted, indent=1) + "\n")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--out", type=Path, default=Path("runs/chain"), help="folder of all runs")
    parser.add_argument("--json", type=Path, help="file to write, after each stage")
    parser.add_argument("overrides", nargs="*", metavar="STAGE:key=value", help=f"STAGE: {', '.join(STAGES)}")
    options = parser.parse_args(arguments)
    options.given = {}
    for item in options.overrides:
        stage, colon, override = item.partition(":")
        if stage not in STAGES or not colon or "=" not in override:
            parser.error(f"{item}: write STAGE:key=value, STAGE being one of {', '.join(STAGES)}")
        options.given.setdefault(stage, []).append(override)
    return options


def main(arguments: list[str] | None = None, command: Sequence[str] = COMMAND) -> None:
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = options.out.resolve()
    check_held_out(options.given)
    settle(out, options.given)
    seeds = [Seed(number, out / f"seed{number}", options.given) for number in range(options.seeds)]
    for seed in seeds:
        for stage in STAGES:
            if not seed.finished(stage):
                seconds = seed.make(stage, command)
                print(f"seed {seed.number}, {stage}: {seconds / 60:.1f} min", flush=True)
            rows = table({each.number: each.levels() for each in seeds})
            if options.json is not None:
                write_atomically(options.json, json.dumps(rows, indent=1) + "\n")
        print_table(rows)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
