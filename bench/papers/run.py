"""Do the papers' findings show in small? Trains the arms of each finding with several seeds, and answers from their curves.

    python bench/papers/run.py [--findings a,b,c,d,e] [--seeds 0,1,2] [--budget-min M] [--out DIR] [--json FILE]
                               [--plan] [key=value ...] [ARM:key=value ...]

All arms start from the model of base.py, which is trained first. Each (arm, seed) is `fastreason train` on job.yaml in a
process of its own, mostly of one core: `taskset -c 0` and `taskset -c 1` make two findings' runs beside each other, in
folders of their own. A finished run is kept as it ends, and the same command skips it; an interrupted one goes on from its
checkpoint where it has one, and else starts again. With a budget no run starts that is not expected to fit into what is left
(of an interrupted one: what is left of its steps), and one that does not fit after all is told to stop when the budget ends:
it saves itself, and the next command goes on with it; one that had only its end to write is kept. Ctrl-C stops in the same
way. Overrides are for all arms but the teacher, with `ARM:` for one. Answers, table and curves are in DIR, and again by
report.py DIR.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arms import ARMS, TEACHER_RUN, Run, arm_overrides, expected_s, runs_wanted
from base import TRAINER, make_base
from findings import FINDINGS
from report import write_report
from store import Store

from fastreason.config import load_config
from fastreason.processes import spawn, tail

JOB = Path(__file__).resolve().parent / "job.yaml"
GRACE_S = 120.0  # for a run that is told to stop to save its state
LOOK_S = 0.2

Outcome = Literal["done", "stopped", "failed"]


@dataclass
class Runner:
    """Makes runs one after another until none is left or none fits. trainer: the command that takes `train ...`."""

    store: Store
    given: Sequence[str] = ()
    budget_s: float = math.inf
    trainer: Sequence[str] = TRAINER
    grace_s: float = GRACE_S

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.budget_s

    def make(self, runs: Sequence[Run], findings: Sequence[str], json_path: Path | None) -> bool:
        """Make what is not there yet, with the report after each; False where a run failed."""
        failed: set[Run] = set()
        for run in runs:
            if run in self.store.finished():
                continue
            if ARMS[run.arm].taught and TEACHER_RUN not in self.store.finished():
                print(f"{run.name}: left out, its teacher is not there", flush=True)
                continue
            if not self.fits(run):
                continue  # a shorter one may still
            outcome = self.one(run)
            if outcome == "done":
                write_report(self.store, findings, json_path)
            elif outcome == "failed":
                failed.add(run)
        if failed:
            print(f"failed: {', '.join(run.name for run in failed)}; see {self.store.folder}/failed.jsonl", flush=True)
        return not failed

    def expected(self, run: Run) -> tuple[float, bool]:
        """(seconds that what is left of a run is expected to take, whether its arm was measured)."""
        seconds, measured = expected_s(run.arm, self.store.seconds())
        return seconds * self.store.share_left(run), measured

    def fits(self, run: Run) -> bool:
        """Whether a run is expected to end before the budget does; says so."""
        seconds, measured = self.expected(run)
        left = self._deadline - time.monotonic()
        how = "as measured" if measured else "a guess, this arm has not been measured here"
        if seconds > left:
            print(f"{run.name}: not started, {seconds / 60:.1f} min ({how}), {left / 60:.1f} min are left", flush=True)
            return False
        print(f"{run.name}: {seconds / 60:.1f} min ({how})", flush=True)
        return True

    def one(self, run: Run) -> Outcome:
        """Make one run, or the rest of it."""
        overrides = arm_overrides(run.arm, self.given)
        self.store.settle(run.arm, overrides, JOB.read_text(encoding="utf-8"))
        folder, resume = self.store.path(run), self.store.resumable(run)
        if resume:
            print(f"{run.name}: goes on from its checkpoint", flush=True)
            command = [*self.trainer, "train", "--resume", str(folder)]
        else:
            self.store.clear(run)
            command = [*self.trainer, "train", str(JOB), *overrides, *self.own(run)]
        log = self.store.folder / "logs" / f"{run.name}.log"
        started = time.monotonic()
        child = spawn(run.name, command, log, {"HF_HUB_OFFLINE": "1"})
        code = None  # as long as it has not ended by itself
        try:
            try:
                while child.exit_code is None and time.monotonic() < self._deadline:
                    time.sleep(LOOK_S)
            finally:
                code = child.exit_code
                if code is None:
                    child.stop(self.grace_s)
        except KeyboardInterrupt:
            self.note(run, code, time.monotonic() - started, resume)
            raise
        return self.note(run, code, time.monotonic() - started, resume)

    def note(self, run: Run, code: int | None, seconds: float, resumed: bool) -> Outcome:
        """Keep what a run has become, and say so. code: None where it was told to stop, which may have come after its end."""
        if not code and self.store.complete(run):
            self.store.add_finished(run, seconds, resumed)
            print(f"{run.name}: done, {seconds / 60:.1f} min", flush=True)
            return "done"
        if code is None:
            goes_on, anew = "goes on from its checkpoint", "starts it again, as it has no checkpoint with steps to come"
            print(f"{run.name}: stopped; the same command {goes_on if self.store.resumable(run) else anew}", flush=True)
            return "stopped"
        log = self.store.folder / "logs" / f"{run.name}.log"
        self.store.add_failed(run, code)
        print(f"{run.name}: ended with {code}:\n{tail(log)}", flush=True)
        return "failed"

    def own(self, run: Run) -> list[str]:
        """Overrides that a run has for itself: its place, its seed, the model and problems of base.py, its teacher."""
        found = [f"run.name={run.name}", f"run.dir={self.store.runs}", f"run.seed={run.seed}"]
        base = self.store.folder / "base"
        found += [f"model.path={base / 'run' / 'model'}", f"data.path={base / 'problems.jsonl'}"]
        if ARMS[run.arm].taught:
            found.append(f"teacher.path={self.store.path(TEACHER_RUN) / 'model'}")
        return found


def print_plan(runner: Runner, runs: Sequence[Run]) -> None:
    """What would be made, and how long it is expected to take in all."""
    finished, total = runner.store.finished(), 0.0
    for run in runs:
        seconds, measured = runner.expected(run)
        state = "done" if run in finished else f"{seconds / 60:5.1f} min, {'measured' if measured else 'guessed'}"
        total += 0.0 if run in finished else seconds
        print(f"{run.name:24}{state:22}{' '.join(arm_overrides(run.arm, runner.given))}")
    print(f"{total / 60:.0f} min in all")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--findings", default=",".join(FINDINGS), help="letters, comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="numbers, comma-separated")
    parser.add_argument("--budget-min", type=float, default=math.inf, help="minutes; default: as long as it takes")
    parser.add_argument("--out", type=Path, default=Path("runs/papers"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="file for the answers, besides DIR/findings.json")
    parser.add_argument("--plan", action="store_true", help="print what would be made, and stop")
    parser.add_argument("overrides", nargs="*", metavar="[ARM:]key=value")
    options = parser.parse_intermixed_args(arguments)
    options.findings = options.findings.split(",")
    if unknown := set(options.findings) - set(FINDINGS):
        parser.error(f"--findings: no such finding: {', '.join(sorted(unknown))}; there are {', '.join(FINDINGS)}")
    try:
        options.seeds = list(dict.fromkeys(map(int, options.seeds.split(","))))
    except ValueError:
        parser.error(f"--seeds {options.seeds}: whole numbers with commas between, e.g. 0,1,2")
    return options


def main(arguments: Sequence[str] | None = None, trainer: Sequence[str] = TRAINER) -> int:
    options = parse_options(arguments)
    arms = [arm for letter in options.findings for arm in FINDINGS[letter].arms]
    runs = runs_wanted(arms, options.seeds)
    for arm in dict.fromkeys(run.arm for run in runs):
        load_config(JOB, arm_overrides(arm, options.overrides))  # a typing error is found before hours of runs
    runner = Runner(Store(options.out), options.overrides, options.budget_min * 60, trainer)
    if options.plan:
        print_plan(runner, runs)
        return 0

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: what a shell starts in the background ignores it, and so would this.
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with runner.store.alone():
            make_base(runner.store.folder, trainer)
            complete = runner.make(runs, options.findings, options.json)
            print(write_report(runner.store, options.findings, options.json), flush=True)
        return 0 if complete else 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
