"""The command itself: checks, samples what is missing, chooses, writes; and how it ends when it is told to.

It owns the order of these steps and the folder that comes out. It refuses to go on in a folder whose responses were made in
another way.
"""

import asyncio
import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastreason.distill.output import (
    PAIRS_FILE,
    POSITIVES_FILE,
    REPORT_FILE,
    make_report,
    print_report,
    write_report,
    write_selection,
)
from fastreason.distill.questions import Questions, check_recorded, load_questions, student_file, wanted
from fastreason.distill.section import DistillRun, dump_distill_config
from fastreason.distill.selection import accuracy_figures, select
from fastreason.distill.teacher import check_length, load_tokenizer, make_grading, open_teacher, sampling_settings
from fastreason.errors import ConfigError, FastreasonError
from fastreason.rollout.line_file import replace_file
from fastreason.rollout.sample_store import SAMPLES_FILE, SETTINGS_FILE, Kept, Response, SampleStore, check_settings
from fastreason.rollout.sampling_job import Ask, Tally, cancel_on_signals, run_job

CONFIG_FILE = "config.yaml"


def check_machine(config: DistillRun) -> list[str]:
    """Every check that needs no model and no network; returns what stays unchecked without one."""
    from fastreason.cores import parse_cores, require_cores
    from fastreason.data import check_data
    from fastreason.models import check_model, model_folder
    from fastreason.rewards import resolve_rewards

    resolve_rewards(config.reward)
    unchecked = check_recorded(config) if config.source == "recorded" else check_data(config.data)
    if config.distill.student is not None:
        student_file(config.distill.student)
    if config.distill.url is not None:
        unchecked.append(f"distill.url={config.distill.url!r}: whether a server answers there")
    if config.model is None:
        return unchecked
    if config.rollout.cores:
        require_cores(config.rollout.cores, "rollout.cores")
    if config.rollout.gpus:
        parse_cores(config.rollout.gpus, "rollout.gpus")
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "rollout.engine=vllm: vllm is not installed. Run `make setup` (CPU), pip install 'fastreason[vllm]' (GPU), "
            "or use rollout.engine=hf."
        )
    unchecked += check_model(config.model)
    if Path(config.model.path).is_dir():
        check_length(config, model_folder(config.model.path))
    return unchecked


def run_distill(config: DistillRun, out: Path, resume: bool) -> int:
    """Sample what is missing, verify, choose, write; returns 0, or 128 + the signal that asked to stop.

    Raises ConfigError where `out` holds responses and `resume` is not given, or they were made in another way.
    """
    _check_folder(out, resume)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    model_dir, tokenizer = load_tokenizer(config)
    questions = load_questions(config, tokenizer)
    settings = sampling_settings(config, model_dir, tokenizer)
    store = SampleStore(out)
    try:
        check_settings(out, settings)
        store.check_problems(questions.prompts)
        replace_file(out / CONFIG_FILE, [dump_distill_config(config).encode()])
        asks, num_asks = wanted(config, questions, store)
        num_earlier, tally = len(store), Tally(num_asks, lambda line: print(line, flush=True))
        verb = "verify" if config.source == "recorded" else "sample"
        print(f"{len(questions.prompts)} questions, {num_earlier} responses there, {num_asks} to {verb}", flush=True)
        if num_asks and (number := _sample(config, out, model_dir, tokenizer, asks, store, tally)):
            print(f"stopped: {len(store)} responses are in {store.path}. {_how_to_go_on(out)}", file=sys.stderr)
            return 128 + number
        judged = _judged(config, questions, store)
        selection = select(judged, config.distill.keep, config.distill.select, config.distill.truncated)
        write_selection(out, store, selection)
        time = {**tally.figures(), "new_responses": tally.num_done, "earlier_responses": num_earlier}
        report = make_report(config, questions.passage, selection, accuracy_figures(judged), time)
        write_report(out, report)
    finally:
        store.close()
    print_report(report, out)
    return 0


def _check_folder(out: Path, resume: bool) -> None:
    samples = out / SAMPLES_FILE
    if not resume and samples.is_file() and samples.stat().st_size:
        raise ConfigError(
            f"--out {out}: it holds responses already. Go on with them by adding --resume, or choose another folder."
        )
    there = [name for name in (POSITIVES_FILE, PAIRS_FILE, REPORT_FILE, CONFIG_FILE) if (out / name).exists()]
    if not resume and there and not (out / SETTINGS_FILE).is_file():
        raise ConfigError(
            f"--out {out} holds {', '.join(there)} of another command, which would be replaced. Move them away, or "
            "choose another folder."
        )
    if resume and not samples.is_file():
        raise ConfigError(f"--resume: {out} holds no {SAMPLES_FILE}. Leave --resume out to start there.")


def _judged(config: DistillRun, questions: Questions, store: SampleStore) -> dict[str, list[Kept]]:
    """The responses to each question that is asked; where there are more than k, the first k."""
    limit = None if config.source == "recorded" else config.distill.samples_per_prompt
    held = {prompt.id: store.kept.get(prompt.id, {}) for prompt in questions.prompts}
    return {
        id: [kept[number] for number in sorted(kept) if limit is None or number < limit] for id, kept in held.items()
    }


def _sample(
    config: DistillRun,
    out: Path,
    model_dir: Path | None,
    tokenizer: Any,
    asks: Iterable[Ask],
    store: SampleStore,
    tally: Tally,
) -> int | None:
    """Run the job; returns the signal that ended it, or None where it is done."""
    stopped_by: list[int] = []

    async def main() -> None:
        cancel_on_signals(stopped_by)
        grader = make_grading(config)
        await grader.start()
        try:
            async with open_teacher(config, out, model_dir, tokenizer) as teacher:

                def on_response(response: Response) -> None:
                    teacher.note_life()
                    tally.add(response, f"{response.id}: {response.refusal}" if response.refused else None)

                tally.begin()
                limit = config.distill.concurrency
                await teacher.beside(
                    run_job(asks, teacher.sampler, grader, store, concurrency=limit, on_response=on_response)
                )
        finally:
            await grader.close()

    try:
        asyncio.run(main())
    except asyncio.CancelledError:
        return stopped_by[0]
    except FastreasonError as error:
        kept = f"\n{len(store)} responses are kept. {_how_to_go_on(out)}" if len(store) else ""
        error.args = (f"{str(error).replace('rollout.max_new_tokens', 'distill.max_new_tokens')}{kept}",)
        raise
    return None


def _how_to_go_on(out: Path) -> str:
    return f"Go on with: fastreason distill --resume --out {shlex.quote(str(out))}"
