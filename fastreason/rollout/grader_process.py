"""A grader: the process that grades, and the messages between it and the pool in `fastreason.rollout.graders`.

It loads the reward functions, says so, and then grades one message at a time until the pool's end of the socket closes.
Built-in rewards run under a memory limit; the deadline is the pool's business.
"""

import contextlib
import os
import signal
import sys
from multiprocessing.connection import Connection

import msgspec

from fastreason.config import RewardConfig
from fastreason.errors import RewardError
from fastreason.processes import die_with_parent
from fastreason.rewards import REWARDS, RewardSpec, resolve_rewards
from fastreason.types import Prompt

# A tower of powers can ask for all memory of the machine before its deadline; built-in rewards need about 0.2 GiB.
MEMORY_LIMIT_GIB = 4


class GraderRequest(msgspec.Struct):
    """To a grader: texts to grade. Without a prompt: name the loaded modules."""

    prompt: Prompt | None = None
    texts: list[str] = msgspec.field(default_factory=list)
    truncated: list[bool] = msgspec.field(default_factory=list)


class GraderReply(msgspec.Struct):
    """From a grader: the parts of one text, or the message of a `RewardError`, after which the rest is not graded."""

    parts: dict[str, float] = msgspec.field(default_factory=dict)
    error: str | None = None
    modules: list[str] = msgspec.field(default_factory=list)


def run_grader(descriptor: int, parent_pid: int) -> None:
    """The life of a grader process: load the rewards, say so, then grade until the pool's end of the socket closes."""
    die_with_parent(signal.SIGKILL)  # a grader that somebody has stopped ends too
    if os.getppid() != parent_pid:
        return
    channel = Connection(descriptor)
    with contextlib.suppress(EOFError, ConnectionError):
        config = RewardConfig.model_validate_json(channel.recv_bytes())
        try:
            spec = resolve_rewards(config)
            _warm_up(spec)
        except Exception as error:
            channel.send_bytes(msgspec.msgpack.encode(GraderReply(error=f"{type(error).__name__}: {error}")))
            return
        if all(name in REWARDS for name in spec.functions):
            limit_memory()
        channel.send_bytes(msgspec.msgpack.encode(GraderReply()))
        while True:
            _serve(channel, spec)


def _serve(channel: Connection, spec: RewardSpec) -> None:
    request = msgspec.msgpack.decode(channel.recv_bytes(), type=GraderRequest)
    if request.prompt is None:
        channel.send_bytes(msgspec.msgpack.encode(GraderReply(modules=sorted(sys.modules))))
        return
    for text, truncated in zip(request.texts, request.truncated, strict=True):
        try:
            reply = GraderReply(parts=spec.parts(text, request.prompt, truncated))
        except Exception as error:
            message = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
            reply = GraderReply(error=message[:4000])
        channel.send_bytes(msgspec.msgpack.encode(reply))
        if reply.error is not None:
            return


def _warm_up(spec: RewardSpec) -> None:
    """Import what the built-in rewards import lazily, so that no response's deadline pays for it."""
    for name in ("math", "strict"):
        if name in spec.functions:
            spec.functions[name](r"so $3 + 4 = \boxed{x}$", Prompt(id="warm-up", text="What is $3 + 4$?", answer="7"))
    if "reasoning_gym" in spec.functions:
        import reasoning_gym  # noqa: F401


def limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = MEMORY_LIMIT_GIB * 2**30
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
