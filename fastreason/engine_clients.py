"""The producer's side of a run's engines and its teacher: clients of the servers, one or several, or the engine itself.

A part of the composition root: it chooses by name and by what the session says.
"""

import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastreason.config import Config
from fastreason.session import Session, request_restart


def make_engine(session: Session, config: Config, on_event: Callable[..., None]) -> Any:
    """The client of the engine's server (vllm, fake) or of several, or the engine itself (hf), by name.

    on_event: hears of (event, detail), and of several engines the address too.
    """
    if not session.engine_urls:
        from fastreason.rollout.hf import HfEngine

        return HfEngine(session.model_dir, config.model.dtype, session.device)
    from fastreason.engines import engine_label
    from fastreason.resources import KEY_VARIABLE
    from fastreason.rollout.fleet import Fleet
    from fastreason.rollout.vllm import VllmEngine
    from fastreason.rollout.vllm_adapter import ADAPTER_NAME

    # The producer before this one has had their answers.
    takes_over, number, remote = session.ready_file.exists(), len(session.engine_urls), bool(config.resources.urls)
    several = number > 1 or remote
    verify = verify_remote(session, config) if remote else None
    adapter = ADAPTER_NAME if config.lora.applied_by_engine else None
    clients = []
    for index, url in enumerate(session.engine_urls):
        label = engine_label(index, number)
        clients.append(
            VllmEngine(
                url,
                os.environ[KEY_VARIABLE],
                config.rollout,
                hang_timeout_s=config.run.hang_timeout_s,
                on_hung=None if remote else partial(request_restart, session.folder, label),
                on_event=partial(say_of_one, on_event, url) if several else on_event,
                takes_over=takes_over,
                spare=several,
                log="see its log there" if remote else f"see logs/{label}.log in the run's folder",
                resting=session.tenant_file.exists if session.sleeps else None,
                given_up=session.given_up_file(label).exists,
                key_hint=f": set {KEY_VARIABLE} to that of the server" if remote else "",
                name=config.rollout.engine,
                verify=verify,
                adapter=adapter,
            )
        )
    return Fleet(list(clients), config.rollout.startup_timeout_s, takes_over) if several else clients[0]


def verify_remote(session: Session, config: Config) -> Any:
    """The look at a server elsewhere before it is used."""
    from fastreason.models import max_model_len, read_model_config
    from fastreason.rollout.identity import PROBE_FILE, describe_model, make_verify
    from fastreason.rollout.vllm_adapter import padded_rank

    probe = Path(session.exchange_dir) / PROBE_FILE
    probe.write_text(secrets.token_hex(8), encoding="utf-8")
    mine = {
        **describe_model(session.model_dir, session.model_dir),
        "max_model_len": max_model_len(config, read_model_config(Path(session.model_dir))),
        "dtype": config.model.dtype,
        "adapter_rank": padded_rank(config.lora.rank or 0) if config.lora.applied_by_engine else None,
    }
    return make_verify(mine, probe)


def say_of_one(on_event: Callable[[str, str, str], None], url: str, event: str, detail: str) -> None:
    """Pass on what has happened to one of several engines, with its address."""
    on_event(event, detail if url in detail else f"{url}: {detail}", url)


def make_teacher(config: Config) -> Any:
    """The client of the teacher's server, or None where there is no such teacher."""
    from fastreason.rollout.teacher import TeacherClient

    if config.teacher.where != "server":
        return None
    assert config.teacher.url is not None
    return TeacherClient(config.teacher.url, config.rollout.request_timeout_s)
