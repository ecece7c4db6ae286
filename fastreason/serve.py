"""`fastreason serve`: one engine server on this machine for runs elsewhere, kept alive until it is told to stop.

A part of the composition root. What it serves is told by a model or by the run's own config; weights arrive through the folder
that both sides share. Its key is the environment's, or one that is made and kept in a file only this user can read.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from fastreason.config import Config, apply_override, read_raw, validate
from fastreason.engines import make_server
from fastreason.errors import ConfigError
from fastreason.exchange import ExchangeFolder
from fastreason.gpus import check_gpus
from fastreason.launch import sweep_segments
from fastreason.models import cache_folder, edited_model, max_model_len, read_model_config, resolve_model
from fastreason.preflight import check_adapter, choose_device, settle_dtypes
from fastreason.resources import KEY_VARIABLE, SERVED, engine_shares
from fastreason.rollout.connection import Connection
from fastreason.rollout.lifeline import Lifeline
from fastreason.rollout.server import ANY_HOST, new_key
from fastreason.serving import Keeper

SECTIONS = ("run", "model", "data", "rollout", "train", "lora")  # of a run's config: they say something of its engine
LONGEST = 4096  # tokens, where nobody says more


def read_serve_config(options: argparse.Namespace) -> Config:
    """The config of one server; raises ConfigError where it cannot be served."""
    raw = {
        name: keys for name, keys in (read_raw(options.config) if options.config else {}).items() if name in SECTIONS
    }
    models = [word for word in options.words if "=" not in word]
    for override in (word for word in options.words if "=" in word):
        if override.partition(".")[0] not in SECTIONS:
            raise ConfigError(f"serve: {override}: one server has keys of {', '.join(SECTIONS)} alone. Leave it out.")
        apply_override(raw, override)
    if len(models) > 1 or not (models or raw.get("model", {}).get("path")):
        raise ConfigError(
            "serve: name one model, e.g. fastreason serve MODEL --exchange-dir DIR, or --config of the run."
        )
    if models:
        raw.setdefault("model", {})["path"] = models[0]
    if not 0 <= options.port <= 65535:
        raise ConfigError(
            f"serve: --port {options.port}: there is no such port. Use 1 to 65535, or 0 for any free one."
        )
    raw["train"] = {"device": (raw.get("train") or {}).get("device", "auto"), "steps": 1, "prompts_per_step": 1}
    raw.setdefault("rollout", {})["port"] = options.port
    raw["rollout"] |= {"transport": "file", "exchange_dir": options.exchange_dir or raw["rollout"].get("exchange_dir")}
    config = settle_dtypes(validate(Config, raw))
    if config.rollout.engine not in SERVED:
        raise ConfigError(f"serve: rollout.engine={config.rollout.engine} is no server. Use vllm.")
    folder = config.rollout.exchange_dir
    if folder is None or not Path(folder).is_dir():
        raise ConfigError(
            f"serve: --exchange-dir {folder}: no such folder. Give the one on shared storage that runs have as "
            "rollout.exchange_dir, at the same path."
        )
    device = choose_device(config.train.device)
    engine_shares(config, device)
    if device == "cuda":
        check_gpus(config, generates=True, trains=False)
    if config.lora.applied_by_engine:
        check_adapter(config, device)
    return config


def run_serve(config: Config, options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code. Raises EngineError where the server does not start."""
    key = os.environ.get(KEY_VARIABLE) or kept_key(Path(options.key_file or cache_folder() / "engine.key"))
    log = cache_folder() / "logs" / f"serve-{options.port}.log"
    temporary = Path(tempfile.gettempdir())
    sweep_segments(temporary)
    folder = ExchangeFolder(0, parents=(temporary,))
    try:
        model_dir = edited_model(resolve_model(config.model), config.model, folder.path / "model")
        described = read_model_config(model_dir)
        longest = options.max_model_len or (max_model_len(config, described) if options.config else None)
        longest = longest or min(LONGEST, described.get("max_position_embeddings") or LONGEST)
        server = make_server(
            config,
            model_dir,
            log,
            device=choose_device(config.train.device),
            exchange_dir=str(Path(config.rollout.exchange_dir or "").resolve()),
            temporary_dir=str(folder.path),
            key=key,
            longest=longest,
            host=options.host,
            # A server that is started again by hand must not be taken for the one before.
            label=f"{new_key()[:8]}-",
            port_key="serve: --port",
        )
        keeper = Keeper(server, config.run.max_restarts, folder.path, say)
        address = f"http://{socket.gethostname() if options.host == ANY_HOST else options.host}:{server.port}"
        try:
            keeper.start()
            return asyncio.run(
                keep(keeper, config, server.url, key, log, f"{address} ({longest} tokens, {config.model.dtype})")
            )
        finally:
            keeper.stop()
    finally:
        folder.remove()


async def keep(keeper: Keeper, config: Config, url: str, key: str, log: Path, words: str) -> int:
    """Watch the server and its heart until a signal comes; says once that it answers."""
    asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def ask(number: int) -> None:
        if not asked.done():
            asked.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ask, number)

    async def nothing(connection: Connection) -> None:
        """Whatever it is to hold, the runs that use it see to it."""

    def note(event: str, detail: str) -> None:
        say(f"{event.replace('_', ' ')}: {detail}")
        if event == "engine_back":
            keeper.note_life()  # deaths are counted from there on, and not over a life of months

    line = Lifeline(
        lambda: Connection(config.rollout.engine, url, key, config.rollout.request_timeout_s),
        nothing,
        startup_timeout_s=config.rollout.startup_timeout_s,
        # Not that of a run, which knows when weights are being loaded and waits for longer then.
        hang_timeout_s=max(config.run.timeout_s, config.run.hang_timeout_s),
        on_hung=keeper.report_hung,
        on_event=note,
        # However long a start takes: whether it may be started again is the keeper's to say.
        spare=True,
        log=f"see {log}",
    )
    watch: asyncio.Future[Any] = asyncio.ensure_future(keeper.watch())
    start: asyncio.Future[Any] = asyncio.ensure_future(line.start())
    try:
        await asyncio.wait({watch, start, asked}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            start.result()
            keeper.note_life()
            say(f"serving at {words}", sys.stdout)
        await asyncio.wait({watch, asked}, return_when=asyncio.FIRST_COMPLETED)
        if watch.done() and not asked.done():
            watch.result()
        return 128 + asked.result()
    finally:
        for task in (watch, start):
            task.cancel()
        await asyncio.gather(watch, start, return_exceptions=True)
        await line.close()


def kept_key(path: Path) -> str:
    """The key in a file that only this user can read; made where there is none.

    The file is there with its key or not at all, for servers on other machines with the same home. Raises ConfigError where
    others can read it, or it is empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        aside = path.with_name(f"{path.name}.{new_key()[:8]}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(new_key() + "\n")
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        finally:
            aside.unlink()
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"--key-file {path}: others can read it. Run: chmod 600 {path}, and take a new key.")
    key = path.read_text(encoding="utf-8").strip()
    if not key:
        raise ConfigError(f"--key-file {path}: it is empty. Remove it, and a key is made.")
    say(f"the key is in {path}; runs need it: export {KEY_VARIABLE}=$(cat {path})")
    return key


def say(text: str, stream: TextIO | None = None) -> None:
    print(text, file=stream or sys.stderr, flush=True)
