"""Which engine servers a run has: those that the launcher starts on this machine, or the addresses of others.

A part of the composition root: it chooses the engine that `rollout.engine` names. Their key comes from here and goes to the
producer alone, through its environment.
"""

import os
from pathlib import Path
from typing import NamedTuple

from fastreason.config import Config
from fastreason.models import max_model_len, read_model_config
from fastreason.resources import KEY_VARIABLE, engine_shares
from fastreason.rollout.server import EngineServer, new_key
from fastreason.session import Session
from fastreason.supervise import Part


class Engines(NamedTuple):
    """The parts to be started, the addresses that the producer talks to, and what it needs in its environment for that."""

    parts: list[Part]
    urls: tuple[str, ...]
    environment: dict[str, str]


def run_engines(config: Config, session: Session) -> Engines:
    """The servers of a run, none of them started yet; each on this machine with its share, its name and its log."""
    if config.resources.urls:
        urls = tuple(url.rstrip("/") for url in config.resources.urls)
        return Engines([], urls, {KEY_VARIABLE: os.environ[KEY_VARIABLE]})
    key, shares = new_key(), engine_shares(config, session.device)
    parts: list[Part] = []
    addresses: list[str] = []
    for index, share in enumerate(shares):
        label = engine_label(index, len(shares))
        rollout = config.rollout.model_copy(update=share._asdict())
        # Of their own seed each, for requests that bring none.
        run = config.run.model_copy(update={"seed": (config.run.seed + index) % 2**31})
        server = make_server(
            config.model_copy(update={"rollout": rollout, "run": run}),
            Path(session.model_dir),
            Path(session.run_dir) / "logs" / f"{label}.log",
            device=session.device,
            exchange_dir=session.exchange_dir,
            temporary_dir=session.folder,
            key=key,
            tenant_file=session.tenant_file if session.sleeps else None,
        )
        name = server.name if len(shares) == 1 else f"{server.name} {index}"
        lost = f"{server.name} at {server.url}"
        part = Part(name, server.start, label, explain_end=server.explain_end, lost_signs=(lost,), kind="engine")
        if session.sleeps:
            part.resting = session.tenant_file.exists
        parts.append(part)
        addresses.append(server.url)
    return Engines(parts, tuple(addresses), {KEY_VARIABLE: key})


def engine_label(index: int, number: int) -> str:
    """The key of an engine's part, and the name of its log: engine, or engine-0, engine-1, ... of several."""
    return "engine" if number == 1 else f"engine-{index}"


def write_first_adapter(config: Config, model_dir: Path, folder: Path) -> None:
    """An adapter whose product is 0, for servers to start with; several have the same one."""
    import torch

    from fastreason.lora import write_first_adapter

    if not folder.is_dir():
        write_first_adapter(config.lora, config.model, model_dir, getattr(torch, config.model.dtype), folder)


def make_server(
    config: Config,
    model_dir: Path,
    log_path: Path,
    *,
    device: str,
    exchange_dir: str,
    temporary_dir: str,
    key: str,
    longest: int | None = None,
    tenant_file: Path | None = None,
    **where: str,
) -> EngineServer:
    """A server of the configured engine, not yet started; `longest` sequence in tokens: by default what the run needs."""
    if config.rollout.engine == "vllm":
        from fastreason.rollout.vllm_adapter import ADAPTER_FOLDER
        from fastreason.rollout.vllm_server import make_server

        if config.lora.applied_by_engine:
            write_first_adapter(config, model_dir, Path(temporary_dir) / ADAPTER_FOLDER)
    else:
        from fastreason.rollout.fake_server import make_server
    return make_server(
        config,
        str(model_dir),
        log_path,
        max_model_len=longest or max_model_len(config, read_model_config(model_dir)),
        device=device,
        exchange_dir=exchange_dir,
        temporary_dir=temporary_dir,
        key=key,
        tenant_file=tenant_file,
        **where,
    )
