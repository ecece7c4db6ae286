"""Who runs where: the share of cores or GPUs of each engine server, what cannot be shared so, and a table of all of it.

Arithmetic over the config: nothing is started here and nothing is asked. No heavy import.
"""

import os
from typing import NamedTuple
from urllib.parse import urlsplit

from fastreason.config import Config
from fastreason.cores import available_cores, cores_text, parse_cores
from fastreason.errors import ConfigError

SERVED = ("vllm", "fake")  # engines with a server process of their own
SECRET_MARKS = ("@", "?", "#")  # of a user and password, and of a query
ON_HOST = {"none": "", "cpu": ", optimizer on the cpu", "cpu_weights": ", optimizer and weights on the cpu"}
KEY_VARIABLE = "FASTREASON_ENGINE_KEY"  # the key of a run's engines, in the environment and nowhere else


class EngineShare(NamedTuple):
    """What one engine server here has of `rollout.cores`, `rollout.gpus` (null: the first that are visible), ports (0: any)."""

    cores: str | None
    gpus: str | None
    port: int


def num_engines(config: Config) -> int:
    """Engine servers of a run, here or elsewhere."""
    return len(config.resources.urls) or config.resources.engines or 1


def engine_gpus(config: Config) -> list[int]:
    """The devices that the engines take: the first of those they are given."""
    rollout = config.rollout
    number = num_engines(config) * rollout.tensor_parallel
    given = parse_cores(rollout.gpus, "rollout.gpus") if rollout.gpus else list(range(number))
    return given[:number]


def trainer_gpus(config: Config) -> list[int]:
    """The devices that the ranks take, one each: the first of those they are given."""
    train = config.train
    given = parse_cores(train.gpus, "train.gpus") if train.gpus else list(range(train.ranks))
    return given[: train.ranks]


def engine_shares(config: Config, device: str) -> list[EngineShare]:
    """One for each engine server on this machine; raises ConfigError where there is no even share."""
    rollout, number = config.rollout, num_engines(config)
    cores: list[str | None] = [rollout.cores] * number
    gpus: list[str | None] = [rollout.gpus] * number
    if device == "cpu":
        each = _share("rollout.cores", rollout.cores, number, rollout.tensor_parallel)
        cores = [cores_text(part) for part in each] if number > 1 else cores
    elif rollout.gpus is not None:
        gpus = [cores_text(part) for part in _gpu_shares(rollout.gpus, number, rollout.tensor_parallel)]
    elif number > 1:
        raise ConfigError(
            f"resources.engines={number}: say which GPUs they have, e.g. rollout.gpus=0-{number * rollout.tensor_parallel - 1} "
            "(resources.engines x rollout.tensor_parallel of them)."
        )
    ports = [rollout.port and rollout.port + index for index in range(number)]
    if ports[-1] > 65535:
        raise ConfigError(
            f"rollout.port={rollout.port} with resources.engines={number}: there is no port {ports[-1]}. "
            "Choose a lower one, or 0 for any free ones."
        )
    return [EngineShare(*share) for share in zip(cores, gpus, ports, strict=True)]


def _share(key: str, text: str | None, number: int, tensor_parallel: int) -> list[list[int]]:
    """CPU cores of each engine; where the config names none, as many of the available ones as go into even shares."""
    cores = parse_cores(text, key) if text else available_cores()
    wanted = f"resources.engines={number}" + (
        f" x rollout.tensor_parallel={tensor_parallel}" if tensor_parallel > 1 else ""
    )
    if len(cores) < number * tensor_parallel:
        named = f"{key}={text!r} names" if text else "this process may use"
        raise ConfigError(
            f"{wanted}: {named} {len(cores)} core(s), fewer than one for each. Lower resources.engines, or give more cores."
        )
    if text and len(cores) % (number * tensor_parallel):
        raise ConfigError(
            f"{key}={text!r}: {len(cores)} cores are no even share for {wanted}. Give a multiple of "
            f"{number * tensor_parallel}."
        )
    size = len(cores) // (number * tensor_parallel) * tensor_parallel
    return [cores[index * size : (index + 1) * size] for index in range(number)]


def _gpu_shares(text: str, number: int, tensor_parallel: int) -> list[list[int]]:
    gpus = parse_cores(text, "rollout.gpus")
    wanted = number * tensor_parallel
    if len(gpus) != wanted:
        raise ConfigError(
            f"rollout.gpus={text!r}: {len(gpus)} GPU(s), and resources.engines={number} x rollout.tensor_parallel="
            f"{tensor_parallel} have {wanted}. Name exactly so many, or change one of the two."
        )
    return [gpus[index * tensor_parallel : (index + 1) * tensor_parallel] for index in range(number)]


def check_resources(config: Config, device: str) -> None:
    """Raise ConfigError where the engines that the config asks for cannot be, or cannot be where it says."""
    resources, rollout = config.resources, config.rollout
    if num_engines(config) > 1 or resources.urls:
        _check_served(config)
    if resources.urls:
        _check_remote(config)
        return
    engine_shares(config, device)
    if num_engines(config) > 1 and rollout.transport == "ipc":
        raise ConfigError(
            f"rollout.transport=ipc: it reaches one engine, on the trainer's GPU, and resources.engines={resources.engines}. "
            "Use nccl, auto, shm or file."
        )


def _check_served(config: Config) -> None:
    if config.rollout.engine not in SERVED:
        key = "resources.urls" if config.resources.urls else f"resources.engines={config.resources.engines}"
        raise ConfigError(
            f"{key}: rollout.engine={config.rollout.engine} is no server; it runs in the producer's process, once. Use "
            "rollout.engine=vllm, or leave the key out."
        )


def _check_remote(config: Config) -> None:
    """What engines that run elsewhere need of the config and of the environment."""
    resources, rollout = config.resources, config.rollout
    for index, url in enumerate(resources.urls):
        check_address(index, url)
    if len({url.rstrip("/") for url in resources.urls}) < len(resources.urls):
        raise ConfigError(f"resources.urls={resources.urls}: one is there twice. Name each server once.")
    if resources.engines not in (None, len(resources.urls)):
        raise ConfigError(
            f"resources.engines={resources.engines} beside {len(resources.urls)} resources.urls: every address is one "
            "engine. Leave resources.engines out."
        )
    for key, value in (("rollout.gpus", rollout.gpus), ("rollout.port", rollout.port)):
        if value:
            raise ConfigError(
                f"{key}={value}: no engine is started here where resources.urls has any. Leave one of the two out."
            )
    if rollout.transport != "file" or rollout.exchange_dir is None:
        raise ConfigError(
            f"resources.urls with rollout.transport={rollout.transport}, rollout.exchange_dir={rollout.exchange_dir}: weights "
            "reach engines elsewhere by a file. Set rollout.transport=file and rollout.exchange_dir to a folder on storage "
            "that is mounted at the same path here and there."
        )
    if not os.environ.get(KEY_VARIABLE):
        raise ConfigError(
            f"resources.urls: the key of these servers is missing. Set {KEY_VARIABLE} in the environment to what "
            "`fastreason serve` asks for there; it is never in a config."
        )


def check_address(index: int, url: str) -> None:
    """Raise ConfigError where a place of `resources.urls` holds no address of a server."""
    if not _is_address(url):
        # What may be a secret is not said again.
        shown = "" if any(mark in url for mark in SECRET_MARKS) else f" {url!r}"
        raise ConfigError(
            f"resources.urls[{index}]:{shown} is no address of a server. Write e.g. http://node1:8000, or https://... "
            f"behind a proxy of yours; its key is not part of it but in {KEY_VARIABLE}."
        )


def _is_address(url: str) -> bool:
    """Whether it names a server, by http or https and with a port that can be, and nothing of who asks or what for."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # a host in brackets that is no IPv6 address, a port that is no number
        return False
    named = parts.scheme in ("http", "https") and parts.hostname and port != 0
    return bool(named) and not any(mark in url for mark in SECRET_MARKS)


def resource_table(config: Config, device: str, only: str | None = None) -> list[str]:
    """A run's processes, a line each under a line of titles: who, how many, where, how. `only` is that of the command."""
    rows = [("", "processes", "where", "how")]
    offline = config.offline.objective is not None
    if not offline and only != "train":
        rows += _engine_rows(config, device)
        rows.append(("graders", str(config.reward.workers), "this machine, with the producer", ""))
    if only != "rollout":
        train = config.train
        gpus = cores_text(trainer_gpus(config)) if train.gpus else None
        where = _where(train.cores, gpus, device)
        if device == "cpu" and train.spare_cores:
            where += f", at idle priority also {train.spare_cores}"
        how = f"ZeRO-{train.zero_stage}{ON_HOST[train.offload]}"
        rows.append(("trainer", str(train.ranks), where, how))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]


def _engine_rows(config: Config, device: str) -> list[tuple[str, str, str, str]]:
    rollout, urls = config.rollout, config.resources.urls
    if rollout.engine not in SERVED:
        return [(f"engine ({rollout.engine})", "1", _where(rollout.cores, None, device), "in the producer's process")]
    parallel = rollout.tensor_parallel
    how = "by URL" if urls else f"tensor parallel {parallel}"
    places = urls or [_where(share.cores, share.gpus, device) for share in engine_shares(config, device)]
    names = [f"engine {index}" if len(places) > 1 else "engine" for index in range(len(places))]
    count = "elsewhere" if urls else "1 server"
    return [(f"{name} ({rollout.engine})", count, place, how) for name, place in zip(names, places, strict=True)]


def _where(cores: str | None, gpus: str | None, device: str) -> str:
    if device != "cpu":
        return f"GPU {gpus}" if gpus else "the first that are visible"
    return f"core {cores}" if cores else "all cores"
