"""One engine server of a run: a process on loopback that can be started again at the same address.

It holds the port, the key and the number of starts; what the server is told is the engine's own file's matter, and when it
is started again the launcher's.
"""

import errno
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

from fastreason.config import RolloutConfig
from fastreason.cores import parse_cores
from fastreason.errors import EngineError
from fastreason.processes import Child, spawn
from fastreason.rollout.vllm_middleware import INSTANCE_VARIABLE, KEY_VARIABLE

LOOPBACK, ANY_HOST = "127.0.0.1", "0.0.0.0"


def new_key() -> str:
    """A random key for one run's engines."""
    return secrets.token_urlsafe(32)


def hold_port(port: int, host: str = LOOPBACK, key: str = "rollout.port") -> socket.socket:
    """A socket bound to a port (0: any free one), never listening: nobody else is given the port meanwhile.

    Bound with SO_REUSEADDR like the servers' own, which may then share it; with SO_REUSEPORT they could not. Raises EngineError
    where it cannot be had, which names `key`: what the port comes from.
    """
    hold = socket.socket()
    hold.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        hold.bind((host, port))
    except OSError as error:
        hold.close()
        if error.errno == errno.EADDRINUSE:
            said = f": the port is in use on {host}. Choose another, or 0 for any free one."
        else:
            said = f", host {host}: {error.strerror}. The host must be an address of this machine, the port an allowed one."
        raise EngineError(f"{key}={port}{said}") from error
    return hold


class EngineServer:
    """A server process that holds its port for as long as this object lives.

    `command` makes the command line for a port (it holds no secret), `explain` says from the log of one start why it ended.
    `instance` counts the starts: the process gets it, after `label`, by environment and puts it on every answer. Raises
    EngineError when `rollout.port` (`port_key`, where it comes from another key) cannot be had at `host`.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], list[str]],
        environment: dict[str, str],
        log_path: Path,
        config: RolloutConfig,
        *,
        key: str,
        explain: Callable[[str], str],
        host: str = LOOPBACK,
        label: str = "",
        port_key: str = "rollout.port",
    ) -> None:
        self.name, self._label = name, label
        self._hold = hold_port(config.port, host, port_key)
        self.port: int = self._hold.getsockname()[1]
        self.url = f"http://{LOOPBACK if host == ANY_HOST else host}:{self.port}"
        self.child: Child | None = None
        self.instance = 0
        self._command, self._environment = command(self.port), {**environment, KEY_VARIABLE: key}
        self._cores = parse_cores(config.cores, "rollout.cores") if config.cores else None
        self._log_path, self._explain = log_path, explain

    def start(self) -> Child:
        """Start the process, or another one after the former was stopped: same port, same key, next instance."""
        self.instance += 1
        environment = {**self._environment, INSTANCE_VARIABLE: f"{self._label}{self.instance}"}
        self.child = spawn(self.name, self._command, self._log_path, environment, cores=self._cores)
        return self.child

    def explain_end(self) -> str:
        """Why the last start ended, from its part of the log."""
        if self.child is None or not self._log_path.is_file():
            return "it wrote no log"
        with open(self._log_path, "rb") as log:
            log.seek(self.child.log_start)
            text = log.read().decode(errors="replace")
        return f"{self._explain(text)}\nfull log: {self._log_path}"
