"""Short Python programs that `doctor` runs in processes of their own: an import that crashes or hangs is an answer too.

Keeps heavy packages, and what they do when they are imported, out of the caller's process.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastreason.processes import Child, spawn

# A probe prints this and one JSON object; whatever else the packages print is only looked at when it fails.
MARK = "probe-result "

# What packages print must not look for the network, nor report home.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True)
class Finding:
    """What became of a probe: its `values` where `ok`, else the reason in one line."""

    ok: bool
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    timed_out: bool = False


class Probes:
    """Runs all programs at once and collects what they say; ends what is left when the block is left."""

    def __init__(self, programs: dict[str, list[str]], timeout_s: float) -> None:
        """`programs` maps a name to a Python program and its arguments."""
        self._programs = programs
        self._timeout_s = timeout_s
        self._children: dict[str, Child] = {}

    def __enter__(self) -> "Probes":
        self._folder = tempfile.TemporaryDirectory(prefix="fastreason-doctor-")
        self._deadline = time.monotonic() + self._timeout_s
        for name, (program, *arguments) in self._programs.items():
            command = [sys.executable, "-P", "-c", program, *arguments]
            self._children[name] = spawn(name, command, Path(self._folder.name) / f"{name}.log", ENVIRONMENT)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            if child.exit_code is None:
                child.stop(grace_s=1.0)
        self._folder.cleanup()

    def finding(self, name: str) -> Finding:
        """Wait for one program, at most until the deadline that all share."""
        child = self._children[name]
        while child.exit_code is None:
            if time.monotonic() > self._deadline:
                child.stop(grace_s=1.0)
                return Finding(ok=False, reason=f"no answer within {self._timeout_s:g} s", timed_out=True)
            time.sleep(0.05)
        return read_finding(child.log_path.read_text(errors="replace"), child.exit_code)


def read_finding(output: str, exit_code: int) -> Finding:
    """What a program that has ended said, or the last line of its output and how it ended."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if exit_code == 0:
        for line in reversed(lines):
            if line.startswith(MARK):
                return Finding(ok=True, values=json.loads(line.removeprefix(MARK)))
    # An error's own line says more than the exit hook of some library after it.
    errors = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    said = (errors or lines or ["no output"])[-1][:300]
    ended = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return Finding(ok=False, reason=said if exit_code == 1 and errors else f"{ended}: {said}")


_SAY = f"import json; say = lambda **values: print('\\n{MARK}' + json.dumps(values), flush=True)\n"

TORCH = _SAY + (
    "import torch; cuda = torch.cuda.is_available()\n"
    "say(version=torch.__version__, gpus=[[p.name, p.total_memory / 2**30] for p in "
    "map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))] if cuda else [])"
)
# The server's module, since `import vllm` alone is lazy and succeeds in many a broken environment.
VLLM = _SAY + "import vllm, vllm.entrypoints.openai.api_server; say(version=vllm.__version__)"
DEEPSPEED = _SAY + "import deepspeed; say(version=deepspeed.__version__)"
# LlamaForCausalLM pulls in torchvision where that is installed, and dies with it.
TRANSFORMERS = _SAY + "from transformers import LlamaForCausalLM; say()"
TORCHVISION = _SAY + "import torchvision; say(version=torchvision.__version__)"
TORCHAUDIO = _SAY + "import torchaudio; say(version=torchaudio.__version__)"
FLASH_ATTN = _SAY + "import flash_attn; say(version=flash_attn.__version__)"
GRADERS = _SAY + (
    "import asyncio, sys\n"
    "from fastreason.config import RewardConfig\n"
    "from fastreason.rollout.graders import GraderPool\n"
    "async def main():\n"
    "    async with GraderPool(RewardConfig.model_validate_json(sys.argv[1])) as pool:\n"
    "        say(sentence=await pool.self_test())\n"
    "asyncio.run(main())"
)
