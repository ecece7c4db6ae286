"""The commands `fastreason data openr1 | math | prompts`: opens the input, runs a preparation, writes and prints its report."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastreason.data.contamination import NGRAM_WORDS, Contamination
from fastreason.data.lengths import CharacterCounter, LengthCounter, Lengths, TokenCounter
from fastreason.data.openr1 import PAIRS, POSITIVES, Grader, Preparation, Settings, check_columns
from fastreason.data.preparation import PICTURE, REPORT, PreparedFolder, print_contamination, print_counts
from fastreason.data.prompt_sources import PROMPTS, PromptPreparation, find_shape
from fastreason.data.raw_rows import RawRows, open_rows
from fastreason.errors import DataError

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 800, 19_000  # arXiv 2505.24850


def prepare_openr1(options: argparse.Namespace, grader: Grader | None) -> None:
    """Write positives and pairs; `grader` where `--verifiers regrade` asks for one."""
    folder = PreparedFolder(Path(options.out), (POSITIVES, PAIRS), options.overwrite)
    share = _drop_share(options)
    rows = _open(options)
    columns = check_columns(rows.column_names(), _mapping(options.columns), options.verifiers)
    contamination = Contamination(options.against)
    counter, limits = _counter(options)
    settings = Settings(
        verifiers=options.verifiers,
        seed=options.seed,
        limit=options.limit,
        max_prompt=limits["prompt"],
        max_response=limits["response"],
        drop_share=share,
    )
    with folder:
        work = Preparation(settings, columns, folder, counter, contamination, grader)
        work.run(rows)
        report = {
            "command": "data openr1",
            "arguments": _arguments(options),
            "columns": dict(columns.of),
            "rows": work.num_rows,
            "dropped": work.dropped,
            "responses_timed_out": work.num_timed_out,
            "positives": work.num_positives,
            "pairs_dropped": work.pairs_dropped,
            "pairs": work.num_pairs,
        }
        drawn = {"prompt": limits["prompt"], "chosen": limits["response"], "rejected": limits["response"]}
        _finish(folder, report, work.lengths, drawn, contamination, work.seconds)
    print_counts(
        [
            ("rows", work.num_rows),
            *((f"  {name}", -count) for name, count in work.dropped.items()),
            (POSITIVES, work.num_positives),
            *((f"  {name}", -count) for name, count in work.pairs_dropped.items()),
            (PAIRS, work.num_pairs),
        ]
    )
    if work.num_timed_out:
        print(f"{work.num_timed_out} responses were not judged in time, and neither chosen nor rejected")
    _print_rest(report, options)


def prepare_prompts(options: argparse.Namespace) -> None:
    """Write prompts."""
    folder = PreparedFolder(Path(options.out), (PROMPTS,), options.overwrite)
    share = _drop_share(options)
    rows = _open(options)
    shape, columns = find_shape(rows.column_names(), options.shape)
    contamination = Contamination(options.against)
    counter, limits = _counter(options)
    with folder:
        work = PromptPreparation(shape, columns, folder, counter, contamination, limits["prompt"], share)
        work.run(rows, options.limit)
        report = {
            "command": f"data {options.kind}",
            "arguments": _arguments(options),
            "shape": shape,
            "columns": dict(columns.of),
            "rows": work.num_rows,
            "dropped": work.dropped,
            "prompts": work.num_prompts,
        }
        _finish(folder, report, work.lengths, limits, contamination, work.seconds)
    print(f"read as: {shape}")
    print_counts(
        [
            ("rows", work.num_rows),
            *((f"  {name}", -count) for name, count in work.dropped.items()),
            (PROMPTS, work.num_prompts),
        ]
    )
    _print_rest(report, options)


def _open(options: argparse.Namespace) -> RawRows:
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit {options.limit}: give at least 1, or leave it out.")
    return open_rows(options.input, options.allow_download, options.hub_config, options.split)


def _counter(options: argparse.Namespace) -> tuple[LengthCounter, dict[str, int | None]]:
    """What lengths are counted with, and the limits in tokens of `prompt` and `response`: none without a tokenizer."""
    asked = {
        "prompt": ("--max-prompt-tokens", options.max_prompt_tokens, MAX_PROMPT_TOKENS),
        "response": ("--max-response-tokens", getattr(options, "max_response_tokens", None), MAX_RESPONSE_TOKENS),
    }
    for name, value, _ in asked.values():
        if value is not None and options.tokenizer is None:
            raise DataError(f"{name} {value}: tokens need a tokenizer. Add --tokenizer MODEL.")
        if value is not None and value < 1:
            raise DataError(f"{name} {value}: give at least 1, or leave it out.")
    if options.tokenizer is None:
        return CharacterCounter(), dict.fromkeys(asked)
    counter = TokenCounter(options.tokenizer, options.allow_download)
    return counter, {key: value or default for key, (_, value, default) in asked.items()}


def _mapping(columns: list[str]) -> dict[str, str]:
    bad = next((item for item in columns if "=" not in item), None)
    if bad is not None:
        raise DataError(f"--columns {bad}: write role=column, e.g. --columns llama=correctness_llama.")
    return dict(item.split("=", 1) for item in columns)


def _drop_share(options: argparse.Namespace) -> float | None:
    share = options.drop_contaminated
    if share is None:
        return None
    if not options.against:
        raise DataError("--drop-contaminated: against what? Add --against FILE for each evaluation set.")
    if not 0 <= share <= 1:
        raise DataError(f"--drop-contaminated {share:g}: a share lies in 0 (any 8 words in a row) to 1 (all of them).")
    return float(share)


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name not in ("command", "kind")}


def _finish(
    folder: PreparedFolder,
    report: dict[str, Any],
    lengths: Lengths,
    limits: Mapping[str, int | None],
    contamination: Contamination,
    seconds: float,
) -> None:
    report["limits"] = dict(limits)
    report["lengths"] = {"unit": lengths.unit, **lengths.summary()}
    report["contamination"] = {"words": NGRAM_WORDS, "sets": contamination.report()}
    report["seconds"] = round(seconds, 2)
    report["rows_per_s"] = round(report["rows"] / seconds, 1)
    lengths.draw(limits, folder.file(PICTURE))
    folder.file(REPORT).write(json.dumps(report, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _print_rest(report: Mapping[str, Any], options: argparse.Namespace) -> None:
    print_contamination(report["contamination"]["sets"])
    if options.tokenizer is None:
        print("no --tokenizer: no limit of length was applied, and lengths.png counts characters")
    print(f"{report['rows_per_s']:,.0f} rows/s; written to {options.out}, with {REPORT} and {PICTURE}")
