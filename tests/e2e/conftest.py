"""What the end-to-end tests share: a tiny real model folder, and `fastreason train` as a watched process.

Every process of a run carries the run's tag in its environment, so that whatever is left behind is found in /proc and
ended, and nothing else is.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

TAG = "FASTREASON_TEST_TAG"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
USER_REWARD = '''
import os, time

def even(text, prompt):
    """The share of characters whose code is even. Says in a file that it has begun, where the test names one."""
    if mark := os.environ.get("TEST_REWARD_MARK"):
        open(mark, "a").write(".")
    time.sleep(float(os.environ.get("TEST_REWARD_SLEEP_S", "0")))
    return sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))

def crash(text, prompt):
    raise KeyError("the judge is broken")
'''


def build_tokenizer() -> Any:
    """Bytes as tokens, and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(folder: Path, **sizes: int) -> Path:
    """A Hugging Face folder: a random Llama in fp32 with a tied head, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.1M parameters."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return build_model(tmp_path_factory.mktemp("tiny") / "model", num_attention_heads=2, num_key_value_heads=1, **sizes)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5M parameters: large enough that training and publishing take a while, so that a test can strike meanwhile."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    return build_model(
        tmp_path_factory.mktemp("small") / "model", num_attention_heads=4, num_key_value_heads=2, **sizes
    )


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"problem": f"{i} + {j} = ?", "answer": str(i + j)} for i in range(10) for j in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TrainRun:
    """One `fastreason train` in a process group, a temporary folder and a folder of runs of its own."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.tag = folder, uuid.uuid4().hex
        # Short, because a Unix socket's path holds only 107 characters.
        self.tmp = Path(tempfile.mkdtemp(prefix="fr-"))
        self.config_path = folder / "config.yaml"
        self.config_path.write_text(yaml.safe_dump(config))
        (folder / "user_reward_of_the_test.py").write_text(USER_REWARD)
        self.environment: dict[str, str] = {}
        self.prefix: list[str] = []  # before the command
        self.command = [str(Path(sysconfig.get_path("scripts")) / "fastreason"), "train"]
        self.process: subprocess.Popen[str] | None = None
        self.output = ""
        self._traces: set[str] = set()
        self._seen: set[psutil.Process] = set()
        self._looked = 0.0

    def start(self, *arguments: str, resume: Path | None = None) -> None:
        given = ["--resume", str(resume)] if resume else [str(self.config_path)]
        self._log = open(self.folder / f"out-{uuid.uuid4().hex[:6]}.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*self.prefix, *self.command, *given, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,
            env={
                **os.environ,
                TAG: self.tag,
                "TMPDIR": str(self.tmp),
                # What the tests import is what the runs are of, also where another checkout is installed.
                "PYTHONPATH": os.pathsep.join([str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "HF_HUB_OFFLINE": "1",
                **self.environment,
            },
        )

    def wait(self, timeout_s: float, beside: "TrainRun | None" = None) -> int:
        """The exit code; the output is kept in `output`. Fails the test with the output when it takes longer.

        `beside` is a run at the same time, which is watched meanwhile.
        """
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while (code := self.process.poll()) is None:
            for run in (self, beside):
                if run is not None:
                    run._note()
            if time.monotonic() > deadline:
                self._read()
                pytest.fail(f"still running after {timeout_s} s:\n{self.output[-3000:]}\n{self.logs()}")
            time.sleep(0.1)
        self._read()
        return code

    def run(self, *arguments: str, timeout_s: float = 300, resume: Path | None = None) -> int:
        self.start(*arguments, resume=resume)
        return self.wait(timeout_s)

    def _note(self) -> None:
        """Remember the run's processes, for some rename themselves and lose their environment, its exchange folder and its
        shared memory."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(psutil.Error):
                self._seen.update(psutil.Process(self.process.pid).children(recursive=True))
        if time.monotonic() - self._looked > 0.5:
            self._looked = time.monotonic()
            for process in self._seen:
                with contextlib.suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self._traces.update(re.findall(r"/dev/shm/(?:psm_|sem\.)\S+(?=\n)", maps))
        for path in self.tmp.glob("*/session.json"):
            with contextlib.suppress(OSError, ValueError):
                self._traces.add(json.loads(path.read_text())["exchange_dir"])

    def _read(self) -> None:
        self._log.seek(0)
        self.output = self._log.read()

    def until(self, condition: Callable[[], bool], timeout_s: float = 240, what: str = "the condition") -> None:
        """Wait for something to become true of the running command."""
        assert self.process is not None
        deadline = time.monotonic() + timeout_s
        while not condition():
            self._note()
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._read()
                pytest.fail(f"{what} did not happen:\n{self.output[-3000:]}\n{self.logs()}")
            time.sleep(0.05)

    def logs(self) -> str:
        found = sorted(self.folder.glob("runs/*/logs/*.log"))
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in found)

    @property
    def run_dir(self) -> Path:
        (found,) = (self.folder / "runs").iterdir()
        return found

    def metrics(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        return read_lines((run_dir or self.run_dir) / "metrics.jsonl")

    def samples(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        return read_lines((run_dir or self.run_dir) / "samples.jsonl")

    def num_steps(self) -> int:
        files = list((self.folder / "runs").glob("*/metrics.jsonl"))
        return files[0].read_bytes().count(b"\n") if files else 0

    def phase(self) -> tuple[str, int]:
        """What the run says that it is doing, and in which step."""
        found = list((self.folder / "runs").glob("*/progress.json"))
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(found[0].read_bytes()) if found else {}
            return said.get("phase", ""), said.get("step", 0)
        return "", 0

    def processes(self) -> list[psutil.Process]:
        """Every living process of the run, whoever its parent is now."""
        self._note()
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                tagged = process in self._seen or process.environ().get(TAG) == self.tag
                if tagged and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process)
        return sorted(found, key=lambda process: process.pid)

    def find(self, *words: str) -> list[psutil.Process]:
        """The processes of the run whose command line holds all words."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if all(word in " ".join(process.cmdline()) for word in words):
                    found.append(process)
        return found

    def left_behind(self, within_s: float = 0.0) -> list[str]:
        """The command lines of what still runs after at most `within_s` seconds."""
        deadline = time.monotonic() + within_s
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline())[:200])
        return lines

    def files_left(self) -> list[str]:
        """What the run left in its temporary folder and in shared memory (caches of libraries are not its own)."""
        assert self._traces, "the run was never seen to have a session"
        names = [path.name for path in self.tmp.iterdir()]
        return [name for name in names if not name.startswith(("torchinductor", "triton"))] + [
            path for path in self._traces if os.path.exists(path)
        ]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the launcher alone."""
        assert self.process is not None
        self.process.send_signal(number)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._log.close()
        self._note()
        for path in map(Path, (self.tmp, *self._traces)):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def run_maker(tmp_path: Path, model: Path, problems: Path) -> Iterator[Callable[..., TrainRun]]:
    """Makes runs: `make(train={"steps": 2}, ...)` gives one, not yet started, of the fake engine on `model`."""
    runs: list[TrainRun] = []
    numbers = itertools.count()  # runs are made by several threads

    def make(**sections: dict[str, Any]) -> TrainRun:
        folder = tmp_path / f"at{next(numbers)}"
        folder.mkdir()
        config: dict[str, Any] = {
            "run": {"name": f"r{uuid.uuid4().hex[:8]}", "dir": str(folder / "runs"), "timeout_s": 150},
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"source": "file", "path": str(problems), "max_prompt_tokens": 64},
            "reward": {"functions": {"user_reward_of_the_test:even": 1.0}},
            "rollout": {"engine": "fake", "samples_per_prompt": 4, "max_new_tokens": 8, "max_staleness": 0},
            "train": {"steps": 3, "prompts_per_step": 3, "lr": 1e-3, "zero_stage": 2},
        }
        for name, section in sections.items():
            config[name] = {**config.get(name, {}), **section}
        run = TrainRun(folder, config)
        runs.append(run)
        return run

    try:
        yield make
    finally:
        for run in runs:
            run.close()


@pytest.fixture
def train_run(tmp_path: Path, tiny_model: Path, problems: Path) -> Iterator[Callable[..., TrainRun]]:
    """Makes runs on the tiny model, see `run_maker`."""
    with run_maker(tmp_path, tiny_model, problems) as make:
        yield make


@pytest.fixture(scope="module")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, problems: Path
) -> Iterator[Callable[..., TrainRun]]:
    """Makes runs on the small model, see `run_maker`; they may be used by several tests of a module."""
    with run_maker(tmp_path_factory.mktemp("runs"), small_model, problems) as make:
        yield make
