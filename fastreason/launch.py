"""The launcher: checks a run, makes its folder, starts its processes, watches them, and ends them all, come what may."""

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from fastreason.config import Config, dump_config
from fastreason.cores import parse_cores
from fastreason.errors import ConfigError, EngineError, FastreasonError, StuckError
from fastreason.metrics import read_summary, write_summary
from fastreason.models import max_model_len, read_model_config, resolve_model
from fastreason.preflight import Decisions
from fastreason.processes import Child, spawn, tail
from fastreason.session import SESSION_VARIABLE, Outcome, Session, read_outcome

if TYPE_CHECKING:
    from fastreason.rollout.vllm import VllmServer

ENGINE = "vLLM server"
LOOK_S = 2.0  # between two looks at the shared memory that the processes use


def make_run_dir(config: Config) -> Path:
    """A new folder for the run, never one that exists: with `run.on_exists: number`, name-2, name-3, ..."""
    parent = Path(config.run.dir)
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 10_000):
        path = parent / (config.run.name if number == 1 else f"{config.run.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            if config.run.on_exists == "number":
                continue
            raise ConfigError(
                f"run.name={config.run.name!r}: {path} exists already, and a run never shares a folder. Choose another "
                f"run.name, set run.on_exists=number, or go on with it: fastreason train --resume {path}"
            ) from None
        return path.resolve()
    raise ConfigError(f"run.name={config.run.name!r}: ten thousand runs of that name exist under {parent}.")


class StopRequest:
    """Remembers the first SIGINT or SIGTERM; a second one means now."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.urgent = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            self.urgent = True
        self.number = self.number or number

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or 0)


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


def launch(config: Config, run_dir: Path, decisions: Decisions, resume: bool) -> int:
    """Run to the end and return the exit code: 0, or 128 + signal when asked to stop; raises what went wrong.

    However it ends, no process, socket, exchange file or temporary folder of the run is left behind.
    """
    started = time.perf_counter()
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    memory = MemoryWatch()
    memory.start()
    try:
        with _display(config, run_dir):
            outcome = _supervise(config, run_dir, decisions, resume, request)
    finally:
        memory.stop()
        for number, handler in former.items():
            signal.signal(number, handler)
    _finish(config, run_dir, time.perf_counter() - started, memory.peak_gib, resume)
    if outcome.finished and request.number is None:
        return 0
    if outcome.finished:
        print("all steps were done when it was asked to stop; a last evaluation may be missing", file=sys.stderr)
        return request.exit_code
    saved = f"continue with: fastreason train --resume {run_dir}" if outcome.saved else "nothing had been trained yet"
    print(f"stopped after step {outcome.step} of {config.train.steps}; {saved}", file=sys.stderr)
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


def _supervise(config: Config, run_dir: Path, decisions: Decisions, resume: bool, request: StopRequest) -> Outcome:
    """Start the processes, wait for the trainer, end everything."""
    from fastreason.exchange import ExchangeFolder

    model_dir = resolve_model(config.model)
    length = max_model_len(config, read_model_config(model_dir))
    num_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    folder = Path(tempfile.mkdtemp(prefix="fastreason-run-"))
    exchange_folder = ExchangeFolder(2 * num_bytes)
    exchange = exchange_folder.path
    children: list[Child] = []
    try:
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        engine_url = None
        if config.rollout.engine == "vllm":
            # Kept to the end, because it holds the port.
            server = _start_engine(config, run_dir, decisions, model_dir, length, exchange, children, environment)
            engine_url = server.url
        session = Session(
            folder=str(folder),
            run_dir=str(run_dir),
            model_dir=str(model_dir),
            engine_url=engine_url,
            exchange_dir=str(exchange),
            device=decisions.device,
            attention=decisions.attention,
            liger=decisions.liger,
            resume=resume,
        )
        environment[SESSION_VARIABLE] = str(session.write())
        children.append(
            spawn(
                "producer",
                _python("-m", "fastreason.cli", "_process", "producer"),
                _log(run_dir, "producer"),
                environment,
            )
        )
        # Ranks inherit no key: they never talk to an engine.
        trainer_environment = {k: v for k, v in environment.items() if not k.endswith("_KEY")}
        if decisions.device == "cuda" and config.train.gpus:
            trainer_environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                map(str, parse_cores(config.train.gpus, "train.gpus"))
            )
        trainer = spawn("trainer", trainer_command(config, folder), _log(run_dir, "trainer"), trainer_environment)
        children.append(trainer)
        return _watch(config, session, trainer, children, request)
    finally:
        for child in reversed(children):
            child.stop(grace_s=5.0)
        shutil.rmtree(folder, ignore_errors=True)
        exchange_folder.remove()


def _start_engine(
    config: Config,
    run_dir: Path,
    decisions: Decisions,
    model_dir: Path,
    length: int,
    exchange: Path,
    children: list[Child],
    environment: dict[str, str],
) -> "VllmServer":
    from fastreason.rollout.vllm import VllmServer, new_key
    from fastreason.rollout.vllm_middleware import KEY_VARIABLE

    environment[KEY_VARIABLE] = key = new_key()
    server = VllmServer(
        config.rollout,
        str(model_dir),
        _log(run_dir, "engine"),
        dtype=config.model.dtype,
        max_model_len=length,
        seed=config.run.seed,
        device=decisions.device,
        exchange_dir=str(exchange),
        key=key,
    )
    children.append(server.start())
    return server


def trainer_command(config: Config, folder: Path) -> list[str]:
    """The ranks under torch's elastic launcher, on a port of its own choice; a rank that dies ends the run.

    It would leave a temporary folder behind; `folder` takes that.
    """
    return _python(
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={config.train.ranks}",
        "--max-restarts=0",
        f"--log-dir={folder}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "--local-addr=127.0.0.1",
        "-m",
        "fastreason.cli",
        "_process",
        "trainer",
    )


def _watch(config: Config, session: Session, trainer: Child, children: list[Child], request: StopRequest) -> Outcome:
    """Wait for the trainer; raises when a process dies before it, or when it does not stop in time."""
    asked_at, looked_at = None, 0.0
    while trainer.exit_code is None:
        time.sleep(0.1)
        if time.monotonic() - looked_at > LOOK_S:
            looked_at = time.monotonic()
            for child in children:
                child.note_shared_memory()
        if request.number is not None and asked_at is None:
            asked_at = time.monotonic()
            session.stop_file.touch()
            print("stopping: saving a checkpoint first; once more to stop now", file=sys.stderr)
        if request.urgent:
            return Outcome(finished=False)
        if asked_at is not None and time.monotonic() - asked_at > config.run.timeout_s:
            raise StuckError(
                f"the trainer did not stop within run.timeout_s={config.run.timeout_s:g} s of being asked; it was ended."
            )
        for child in children:
            if child is not trainer and child.exit_code is not None and asked_at is None:
                _explain_death(session, child, trainer)
    outcomes = [read_outcome(session.folder, f"trainer-{rank}") for rank in range(config.train.ranks)]
    if asked_at is not None and outcomes[0] is not None and not outcomes[0].error:
        return outcomes[0]  # ranks that lost their peer at its end are no failure then
    errors = [outcome for outcome in outcomes if outcome is not None and outcome.error]
    if errors:
        _explain_peer(session, errors, children, trainer)
        first = next((e for e in errors if not e.expected), errors[0])
        _raise_outcome(first, trainer)
    if outcomes[0] is None:
        raise FastreasonError(
            f"the trainer ended with exit code {trainer.exit_code} and said nothing"
            f"{_memory_hint(trainer.exit_code)}; the end of its log:\n{tail(trainer.log_path)}\nfull log: {trainer.log_path}"
        )
    return outcomes[0]


def _explain_death(session: Session, child: Child, trainer: Child) -> None:
    """Raise for a process that ended before the trainer, unless the trainer is at its end too."""
    with contextlib.suppress(Exception):
        trainer.process.wait(timeout=3.0)
        return
    _raise_end(session, child)


def _raise_end(session: Session, child: Child) -> None:
    """Raise for a process that ended too early: its own last words, or the end of its log."""
    outcome = read_outcome(session.folder, child.name)
    if outcome is not None and outcome.error:
        _raise_outcome(outcome, child)
    if child.name == ENGINE:
        _raise_engine(child)
    raise FastreasonError(
        f"the {child.name} ended with exit code {child.exit_code}{_memory_hint(child.exit_code)}; the end of its log:\n"
        f"{tail(child.log_path)}\nfull log: {child.log_path}"
    )


def _explain_peer(session: Session, errors: list[Outcome], children: list[Child], trainer: Child) -> None:
    """Raise the end of the engine or the producer where the trainer's error was only that it lost them."""
    said = " ".join(str(outcome.error) for outcome in errors)
    signs = {ENGINE: (ENGINE,), "producer": ("the producer closed its connection", "the producer ended while")}
    for child in children:
        if child is not trainer and any(sign in said for sign in signs[child.name]):
            with contextlib.suppress(subprocess.TimeoutExpired):
                if child.process.wait(timeout=5.0):
                    _raise_end(session, child)


def _raise_engine(child: Child) -> None:
    from fastreason.rollout.vllm import explain_log

    raise EngineError(
        f"the {ENGINE} ended with exit code {child.exit_code}{_memory_hint(child.exit_code)}; {explain_log(child.log_path)}"
    )


def _raise_outcome(outcome: Outcome, child: Child) -> Any:
    if outcome.expected:
        raise FastreasonError(str(outcome.error))
    raise FastreasonError(
        f"the {child.name} failed: {outcome.error}; the end of its log:\n{tail(child.log_path)}\nfull log: {child.log_path}"
    )


def _memory_hint(code: int | None) -> str:
    return " (killed: most likely the machine ran out of memory)" if code in (-9, 137) else ""


def _finish(config: Config, run_dir: Path, wall_s: float, peak_gib: float, resumed: bool) -> None:
    """Complete the summary, draw the curve, print the table."""
    import msgspec

    from fastreason.display import final_table
    from fastreason.types import EvalResult

    summary = read_summary(run_dir)
    if not summary:
        return
    summary["wall_s"] = wall_s
    summary["peak_memory_gib"] = peak_gib
    summary["resumed"] = resumed
    write_summary(run_dir / "summary.json", summary)
    files: dict[str, str | Path] = {"run folder": run_dir}
    if summary["steps"]:
        from fastreason.report.reward_curve import draw_reward_curve

        files["reward curve"] = draw_reward_curve(run_dir)
    if (run_dir / "model").is_dir():
        files["trained model"] = run_dir / "model"
    evals = {name: msgspec.convert(value, EvalResult) for name, value in summary["evals"].items()}
    final_table(evals.get("before"), evals.get("after"), files)


def write_config(config: Config, run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _log(run_dir: Path, name: str) -> Path:
    return run_dir / "logs" / f"{name}.log"
