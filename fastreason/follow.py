"""The launcher on every machine of a run but the first: hears from the first what to run, starts ranks of it, ends with it.

It has a session folder of its own, for its ranks' signs of life and outcomes. The run's folder, data and model paths are the
first machine's, on storage that all share; weights are published by the first alone.
"""

import os
import signal
from pathlib import Path
from typing import Any

from fastreason.config import load_config
from fastreason.errors import ConfigError, FastreasonError, NodeError
from fastreason.gpus import check_gpus
from fastreason.launch import folders, trainer_part
from fastreason.nodes import Link, Node, Place, heed, open_store
from fastreason.placement import Placement
from fastreason.preflight import Decisions
from fastreason.resources import KEY_VARIABLE
from fastreason.session import SESSION_VARIABLE
from fastreason.supervise import StopRequest, Supervisor


def follow(node: Node) -> int:
    """Run this machine's ranks to the end; returns the exit code, which is the first machine's. Raises what went wrong here."""
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    link = Link(node, open_store(node))
    code, said = 1, "it was ended"
    try:
        hear = heed(link, request)
        print(f"node {node.index} of {node.num}: waiting for the run of the first, {node.address}", flush=True)
        run = link.await_run(hear, lambda: request.urgent)
        code, said = (request.exit_code if run is None else run_ranks(link, run, request)), ""
    except NodeError:
        said = ""  # the others know
        raise
    except FastreasonError as error:
        said = str(error)
        raise
    finally:
        link.close(code, said or None)
        for number, handler in former.items():
            signal.signal(number, handler)
    return code


def run_ranks(link: Link, run: dict[str, Any], request: StopRequest) -> int:
    """Start the ranks of the run that the first machine has announced, and watch them."""
    node, run_dir = link.node, Path(run["run_dir"])
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"run.dir: the run's folder {run_dir} is not to be seen on node {node.index} of {node.num}. It must be on storage "
            "that all machines share, under the same path."
        )
    config = load_config(run_dir / "config.yaml")
    if run["device"] == "cuda":
        try:
            check_gpus(config, generates=False, trains=True)
        except ConfigError as error:
            raise ConfigError(f"node {node.index} of {node.num}: {error}") from error
    placement = Placement("split", sleeps=run["sleeps"])
    decisions = Decisions(device=run["device"], attention=run["attention"], liger=run["liger"], placement=placement)
    groups_dir = Path(run["groups_dir"]) if run["groups_dir"] else None
    place = Place(node.index, node.num, node.address, run["port"])
    os.environ.pop(KEY_VARIABLE, None)  # ranks never talk to an engine
    with folders(config, run_dir, decisions, run["resume"], run["only"], groups_dir) as session:
        environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", SESSION_VARIABLE: str(session.write())}
        supervisor = Supervisor(config.run, session, request, heed(link, request))
        try:
            supervisor.start(trainer_part(config, session, environment, place))
            print(f"node {node.index} of {node.num}: {config.train.ranks} rank(s) of {run_dir}", flush=True)
            outcome = supervisor.watch()
        finally:
            supervisor.stop()
    if outcome.finished and request.number is None:
        return 0
    if request.urgent:
        # Maybe within the second before the others were asked; they miss these ranks, and nothing more is to be waited for.
        link.request_stop()
        return request.exit_code
    code = link.await_code(config.run.timeout_s, lambda: request.urgent)
    return request.exit_code if code is None else code
