"""The launcher: makes a session's folders, says which processes it has, and ends them all, come what may.

How they are watched, started again and their ends explained is in `supervise.py`.
"""

import contextlib
import fcntl
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import psutil

from fastreason.config import Config
from fastreason.cores import parse_cores
from fastreason.errors import FastreasonError
from fastreason.metrics import read_summary, write_summary
from fastreason.models import edited_model, resolve_model
from fastreason.nodes import Link, Place, heed
from fastreason.preflight import Decisions
from fastreason.processes import free_port, remove_segments, spawn
from fastreason.resources import KEY_VARIABLE, SERVED
from fastreason.session import SEGMENTS, SESSION_VARIABLE, Session
from fastreason.supervise import Part, StopRequest, Supervisor
from fastreason.transport import exchange_parents

# For glibc: the trainer keeps the memory that it has had. Given back after every tensor and taken again page by page, it
# cost an eighth of an update (bench/README.md).
KEPT_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
PRODUCER_LOST = ("the producer closed its connection", "the producer ended while")


class MemoryWatch(threading.Thread):
    """Samples the memory of this process and all below it; `peak_gib` counts shared pages once (PSS)."""

    def __init__(self, interval_s: float = 2.0) -> None:
        super().__init__(daemon=True)
        self.peak_gib = 0.0
        self._interval_s, self._ended = interval_s, threading.Event()

    def run(self) -> None:
        while not self._ended.wait(self._interval_s):
            total = 0
            with contextlib.suppress(psutil.Error):
                for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        total += getattr(process.memory_full_info(), "pss", process.memory_info().rss)
            self.peak_gib = max(self.peak_gib, total / 2**30)

    def stop(self) -> None:
        self._ended.set()


def launch(
    config: Config,
    run_dir: Path,
    decisions: Decisions,
    resume: bool,
    only: str | None = None,
    groups_dir: Path | None = None,
    link: Link | None = None,
) -> int:
    """Run to the end and return the exit code: 0, or 128 + signal when asked to stop; raises what went wrong.

    `only` runs one phase alone: "rollout" writes groups, "train" trains on those written in `groups_dir`. However it ends,
    no process, socket, exchange file or temporary folder of the run is left behind. link: to the other machines of the run,
    which are told what it is and start ranks of it (`follow.py`).
    """
    from fastreason.checkpoint import CheckpointStore

    started = time.perf_counter()
    CheckpointStore(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best).sweep()
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    memory = MemoryWatch()
    memory.start()
    try:
        with _display(config, run_dir), folders(config, run_dir, decisions, resume, only, groups_dir) as session:
            place = announce(link, session) if link is not None else None
            supervisor = Supervisor(config.run, session, request, heed(link, request))
            try:
                for part in _parts(config, session, place):
                    supervisor.start(part)
                outcome = supervisor.watch()
            finally:
                supervisor.stop()
    except FastreasonError as error:
        error.args = (f"{error}{_resume_hint(config, run_dir, only)}",)
        raise
    finally:
        memory.stop()
        for number, handler in former.items():
            signal.signal(number, handler)
    figures = {
        "wall_s": time.perf_counter() - started,
        "peak_memory_gib": memory.peak_gib,
        "resumed": resume,
        "restarts": supervisor.num_restarts,
    }
    _finish(config, run_dir, figures)
    if outcome.finished and request.number is None:
        return 0
    if outcome.finished:
        print("all steps were done when it was asked to stop; a last evaluation may be missing", file=sys.stderr)
        return request.exit_code
    said = [f"stopped after step {outcome.step} of {config.train.steps}"]
    if request.urgent:
        said = ["stopped at once"]
    elif not outcome.step:
        said.append("nothing had been trained yet")
    print("; ".join([*said, *filter(None, [_resume_hint(config, run_dir, only).strip()])]), file=sys.stderr)
    return request.exit_code


@contextlib.contextmanager
def _display(config: Config, run_dir: Path) -> Iterator[None]:
    from fastreason.display import Display

    display = Display(run_dir, config)
    display.start()
    try:
        yield
    finally:
        display.stop()


@contextlib.contextmanager
def folders(
    config: Config, run_dir: Path, decisions: Decisions, resume: bool, only: str | None, groups_dir: Path | None
) -> Iterator[Session]:
    """The session and the exchange folder of a run, removed with all that is in them; also those of killed runs.

    Every model of the run is found here, before anything starts: its processes have no network.
    """
    from fastreason.exchange import ExchangeFolder

    model_dir = resolve_model(config.model)
    if config.lora.rank is not None and not Path(config.model.path).is_dir():  # else it has been checked
        from fastreason.lora import check_lora

        check_lora(config.lora, config.model, model_dir)
    offline, beside = config.offline.objective is not None, {}
    if not offline:
        from fastreason.companions import resolve_companions

        beside = resolve_companions(config, model_dir, only)._asdict()
    num_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    temporary = Path(tempfile.gettempdir())
    sweep_segments(temporary)
    folder = ExchangeFolder(0, parents=(temporary,))
    published = 0 if offline else 2 * num_bytes
    exchange = ExchangeFolder(published, exchange_parents(config.rollout))
    try:
        model_dir = edited_model(model_dir, config.model, folder.path / "model")
        yield Session(
            folder=str(folder.path),
            run_dir=str(run_dir),
            model_dir=str(model_dir),
            exchange_dir=str(exchange.path),
            device=decisions.device,
            attention=decisions.attention,
            liger=decisions.liger,
            resume=resume,
            only=only,
            groups_dir=str(groups_dir) if groups_dir is not None else None,
            colocated=only is None and decisions.placement.mode == "colocated",
            sleeps=only is None and decisions.placement.sleeps,
            **beside,
        )
    finally:
        folder.remove()
        exchange.remove()


def announce(link: Link, session: Session) -> Place:
    """Tell the other machines which run it is, and where its ranks meet; returns this one's place among them."""
    place = Place(0, link.node.num, link.node.address, free_port())
    # `sleeps`: whoever leaves the GPUs to the engine waits for all ranks. Not `colocated`: no engine starts there.
    told = ("run_dir", "device", "attention", "liger", "resume", "only", "groups_dir", "sleeps")
    link.announce({"port": place.port, **{name: getattr(session, name) for name in told}})
    return place


def _parts(config: Config, session: Session, place: Place | None = None) -> list[Part]:
    """The processes of the run in the order of their start, the main one last; writes the session that they read.

    place: of this machine among several.
    """
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    producer_environment = dict(environment)
    parts: list[Part] = []
    generates = session.only != "train" and config.offline.objective is None
    if generates and config.rollout.engine in SERVED:
        from fastreason.engines import run_engines

        engines = run_engines(config, session)
        session = msgspec.structs.replace(session, engine_urls=engines.urls)
        producer_environment |= engines.environment
        parts += engines.parts
    # Ranks inherit no key, not the user's of engines elsewhere either: they never talk to an engine.
    os.environ.pop(KEY_VARIABLE, None)
    environment[SESSION_VARIABLE] = producer_environment[SESSION_VARIABLE] = str(session.write())
    both = config.rollout.cores and config.train.cores
    if generates:
        start = partial(
            spawn,
            "producer",
            _python("-m", "fastreason.cli", "_process", "producer"),
            _log(session, "producer"),
            producer_environment,
            parse_cores(config.rollout.cores, "rollout.cores") if config.rollout.cores and both else None,
        )
        parts.append(Part("producer", start, "producer", members=("producer",), lost_signs=PRODUCER_LOST))
    if session.only == "rollout":
        command = _python("-m", "fastreason.cli", "_process", "collector")
        parts.append(_main_part(config, session, "collector", ("collector",), command, environment))
    else:
        parts.append(trainer_part(config, session, environment, place))
    return parts


def trainer_part(config: Config, session: Session, environment: dict[str, str], place: Place | None = None) -> Part:
    """This machine's ranks."""
    name = "trainer" if place is None or place.index == 0 else f"trainer-node{place.index}"
    first = place.index * config.train.ranks if place is not None else 0
    members = tuple(f"trainer-{first + rank}" for rank in range(config.train.ranks))
    environment = dict(environment)
    if session.device == "cpu":
        environment |= {name: value for name, value in KEPT_MEMORY.items() if name not in os.environ}
    if session.device == "cuda" and config.train.gpus:
        gpus = parse_cores(config.train.gpus, "train.gpus")
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    command = trainer_command(config, Path(session.folder), place)
    return _main_part(config, session, name, members, command, environment)


def _main_part(
    config: Config,
    session: Session,
    name: str,
    members: tuple[str, ...],
    command: list[str],
    environment: dict[str, str],
) -> Part:
    cores = parse_cores(config.train.cores, "train.cores") if config.train.cores else None
    if cores and config.train.spare_cores:
        cores = sorted({*cores, *parse_cores(config.train.spare_cores, "train.spare_cores")})
        # A thread that waits for one whose core is taken must not keep that one's new core busy.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    return Part(name, partial(spawn, name, command, _log(session, name), environment, cores), members=members)


def trainer_command(config: Config, folder: Path, place: Place | None = None) -> list[str]:
    """The ranks under torch's elastic launcher, on a port of its own choice; a rank that dies ends the run.

    It would leave a temporary folder behind; `folder` takes that. place: of this machine among several, whose ranks meet at the
    first; the ranks of that one come first.
    """
    if place is None:
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        meeting = [f"--nnodes={place.num}", f"--node-rank={place.index}"]
        meeting += [f"--master-addr={place.address}", f"--master-port={place.port}"]
    return _python(
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={config.train.ranks}",
        "--max-restarts=0",
        f"--log-dir={folder}",
        *meeting,
        "-m",
        "fastreason.cli",
        "_process",
        "trainer",
    )


def sweep_segments(parent: Path) -> None:
    """Remove the shared memory of runs whose launcher was killed, as their session folders under `parent` list it."""
    from fastreason.exchange import ExchangeFolder

    for lock in parent.glob(f"{ExchangeFolder.PREFIX}*/{ExchangeFolder.LOCK}"):
        with contextlib.suppress(OSError), open(lock, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            listed = lock.with_name(SEGMENTS)
            if listed.stat().st_uid == os.getuid():
                remove_segments(map(Path, listed.read_text().splitlines()))


def _resume_hint(config: Config, run_dir: Path, only: str | None) -> str:
    """How to go on, as a line of its own; nothing where a run cannot."""
    from fastreason.checkpoint import CheckpointStore

    found = CheckpointStore(run_dir, keep_last=1, keep_best=False).complete()
    if found:
        return f"\ncontinue from {found[-1].name} with: fastreason train --resume {run_dir}"
    if only == "rollout":
        return ""
    # An offline run has its traces, and the scores of pairs that have been computed.
    prepared = ", with what is prepared" if config.offline.objective else ""
    return f"\nno checkpoint; begin again{prepared}: fastreason train --resume {run_dir}"


def _finish(config: Config, run_dir: Path, figures: dict[str, Any]) -> None:
    """Complete the summary with the launcher's figures, merge the trace, draw the curve, print the table."""
    from fastreason.display import final_table
    from fastreason.types import EvalResult

    files: dict[str, str | Path] = {"run folder": run_dir}
    if config.log.trace:
        from fastreason.trace import merge_trace

        if (trace := merge_trace(run_dir)) is not None:
            files["timeline"] = trace
    summary = read_summary(run_dir)
    if not summary:
        return
    summary |= figures
    write_summary(run_dir / "summary.json", summary)
    if summary["steps"] and config.offline.objective is None:
        from fastreason.report.reward_curve import draw_reward_curve

        files["reward curve"] = draw_reward_curve(run_dir)
    if (run_dir / "model").is_dir():
        files["trained model"] = run_dir / "model"
    if (run_dir / "adapter").is_dir():
        files["its adapter"] = run_dir / "adapter"
    evals = {name: msgspec.convert(value, EvalResult) for name, value in summary["evals"].items()}
    final_table(evals.get("before"), evals.get("after"), files)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _log(session: Session, name: str) -> Path:
    return Path(session.run_dir) / "logs" / f"{name}.log"
