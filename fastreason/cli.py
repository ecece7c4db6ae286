"""The `fastreason` command. Imports nothing heavy until a subcommand needs it."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastreason.arguments import build_parser
from fastreason.errors import ConfigError, DataError, FastreasonError, ModelError

if TYPE_CHECKING:
    from fastreason.config import Config
    from fastreason.nodes import Link
    from fastreason.preflight import Decisions


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 bad input, 128 + n stopped by signal n)."""
    parser = build_parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes no more overrides after an option: train c.yaml --dry-run train.lr=1e-5.
    taking = next((name for name in ("overrides", "models", "words") if hasattr(options, name)), None)
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
            "serve": serve_command,
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
    """On one machine, or on this one of several that an outer launcher has started the command on."""
    from fastreason.nodes import forget_launcher, lead, node_of

    node = node_of(os.environ)
    if node is None or options.dry_run:
        return train_here(options, nodes=node.num if node is not None else 1)
    forget_launcher(os.environ)
    if options.only == "rollout":
        raise ConfigError("--only rollout: it has no ranks to divide among machines. Start it on one.")
    if node.is_first:
        return lead(node, lambda link: train_here(options, link, node.num))
    from fastreason.follow import follow

    return follow(node)


def train_here(options: argparse.Namespace, link: "Link | None" = None, nodes: int = 1) -> int:
    """The run's launcher, or a look at what it would do; nodes: machines that have ranks of it."""
    from fastreason.config import load_config
    from fastreason.launch import launch
    from fastreason.preflight import anchor_paths, check_prompts_offline, preflight, settle_dtypes, start_lines
    from fastreason.resources import resource_table
    from fastreason.run_folder import held, make_run_dir, write_config

    if options.resume:
        return resume_command(options, link, nodes)
    if not options.config:
        raise ConfigError("train: give a config file, e.g. fastreason train configs/quickstart.yaml (or --resume RUN).")
    config = settle_dtypes(anchor_paths(load_config(options.config, options.overrides)))
    decisions, unchecked = preflight(config, only=options.only, nodes=nodes)
    groups = written_groups(options, config)
    if options.dry_run:
        return print_dry_run(config, decisions, unchecked, options.only)
    if config.offline.objective is not None:
        return train_offline(options, config, decisions, link)
    if groups is None and (not unchecked or config.data.source != "hub"):
        check_prompts_offline(config)
    run_dir = make_run_dir(config)
    with held(run_dir):
        write_config(config, run_dir)
        print(
            "\n".join([*start_lines(config), *resource_table(config, decisions.device, options.only), *decisions.notes])
        )
        return launch(config, run_dir, decisions, resume=False, only=options.only, groups_dir=groups, link=link)


def train_offline(
    options: argparse.Namespace, config: "Config", decisions: "Decisions", link: "Link | None" = None
) -> int:
    """A new run on written responses."""
    from fastreason.config import batch_derivation
    from fastreason.launch import launch
    from fastreason.offline_data import prepare_offline
    from fastreason.resources import resource_table
    from fastreason.run_folder import held, make_run_dir, write_config

    run_dir = make_run_dir(config)
    with held(run_dir):
        config, decisions = prepare_offline(config, run_dir, decisions)
        write_config(config, run_dir)
        print("\n".join([*batch_derivation(config), *resource_table(config, decisions.device)]))
        return launch(config, run_dir, decisions, resume=False, link=link)


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


def print_dry_run(config: "Config", decisions: "Decisions", unchecked: list[str], only: str | None) -> int:
    from fastreason.config import dump_config
    from fastreason.preflight import start_lines
    from fastreason.resources import resource_table

    print(dump_config(config), end="")
    notes = [
        *start_lines(config),
        *resource_table(config, decisions.device, only),
        *decisions.notes,
        f"device: {decisions.device}, attention: {decisions.attention}, {config.model.dtype}",
    ]
    notes += [f"unchecked, because it may need the network: {item}" for item in unchecked]
    print("\n".join(f"# {line}" for line in notes))
    return 0


def resume_command(options: argparse.Namespace, link: "Link | None" = None, nodes: int = 1) -> int:
    from fastreason.run_folder import held

    if options.only == "rollout":
        raise ConfigError(f"--resume {options.resume}: --only rollout cannot be resumed. Start a new run.")
    run_dir = Path(options.resume).resolve()
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--resume {options.resume}: no run there (no config.yaml). Give the folder of a run.")
    if options.dry_run:
        return resume_run(options, run_dir, nodes=nodes)
    with held(run_dir):
        return resume_run(options, run_dir, link, nodes)


def resume_run(options: argparse.Namespace, run_dir: Path, link: "Link | None" = None, nodes: int = 1) -> int:
    from fastreason.config import load_config
    from fastreason.launch import launch
    from fastreason.offline_data import resume_offline
    from fastreason.preflight import anchor_paths, preflight, settle_dtypes
    from fastreason.resources import resource_table
    from fastreason.resume import starting_point
    from fastreason.run_folder import write_config

    overrides = [*([options.config] if options.config else []), *options.overrides]
    config = settle_dtypes(anchor_paths(load_config(run_dir / "config.yaml", overrides)))
    decisions, unchecked = preflight(config, prepared=True, only=options.only, nodes=nodes)
    path, state = starting_point(config, run_dir, options.only)
    groups = written_groups(options, config, done=state.version)
    if options.dry_run:
        return print_dry_run(config, decisions, unchecked, options.only)
    if config.offline.objective is not None:
        decisions = resume_offline(config, run_dir, decisions)
    write_config(config, run_dir)
    print(f"resuming from {path.name if path else 'the beginning'}: {state.step} of {config.train.steps} steps done")
    print("\n".join([*resource_table(config, decisions.device, options.only), *decisions.notes]))
    return launch(config, run_dir, decisions, resume=True, only=options.only, groups_dir=groups, link=link)


def plan_command(options: argparse.Namespace) -> int:
    from fastreason.plan.command import run_plan

    if options.against and options.config:
        raise ConfigError("plan --against RUN: the run's own config.yaml is read. Leave the config file out.")
    return run_plan(options)


def serve_command(options: argparse.Namespace) -> int:
    from fastreason.serve import read_serve_config, run_serve

    return run_serve(read_serve_config(options), options)


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
