"""`fastreason serve` with the fake engine, as a process that a test starts and stops."""

import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path


class Serve:
    """`fastreason serve` on a fixed port, as a user starts it on another machine. `prefix` is put before its command."""

    def __init__(self, folder: Path, model: Path, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.folder, self.model, self.host, self.prefix = folder, model, host, prefix
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url, self.key_file = f"http://{host}:{self.port}", folder / "key"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = Path(sysconfig.get_path("scripts")) / "fastreason"
        options = ["--host", self.host, "--port", str(self.port)]
        options += ["--exchange-dir", str(self.exchange), "--key-file", str(self.key_file)]
        keys = ["rollout.engine=fake", "rollout.fake_token_s=0.02", "model.dtype=float32"]
        environment = {**os.environ, "FASTREASON_CACHE": str(self.folder / "cache")}
        with open(self.folder / "serve.log", "ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, str(script), "serve", str(self.model), *keys, *options],
                stdout=log,
                stderr=log,
                env=environment,
            )
        deadline, before = time.monotonic() + 60, self.said()
        while self.said() == before:
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "serve.log").read_text()
            time.sleep(0.05)

    def said(self) -> int:
        log = self.folder / "serve.log"
        return log.read_text().count("serving at") if log.exists() else 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            assert self.process.wait(timeout=20) == 143
            self.process = None
