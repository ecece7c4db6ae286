"""The grader pool: hanging and crashing answers cost what they should, and no process is left."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fastreason.config import RewardConfig
from fastreason.errors import ConfigError, RewardError
from fastreason.patience import Patience
from fastreason.rollout import deadline
from fastreason.rollout.graders import GraderPool
from fastreason.types import Grade, Prompt

SUM = Prompt(id="sum", text="What is 3 + 4?", answer="7")
TOWER = r"\boxed{9^{9^{9^{9}}}}"

USER = '''
import os, sys, time

def judge(text, prompt):
    """Does what the response says: sleep, exit, write a file and exit once, raise, nan; else whether it is the answer."""
    if text.startswith("sleep"):
        time.sleep(float(text.split()[1]))
    elif text == "exit":
        os._exit(3)
    elif text == "stop me":
        os.kill(os.getpid(), 19)
    elif text.startswith("right after"):
        time.sleep(float(text.split()[-1]))
        return 1.0
    elif text == "sys.exit":
        sys.exit(3)
    elif text.startswith("exit once"):
        path = text.split()[-1]
        if not os.path.exists(path):
            open(path, "w").close()
            os._exit(3)
        return 1.0
    elif text == "raise":
        raise KeyError("broken judge")
    elif text == "nan":
        return float("nan")
    elif text == "recurse":
        return judge_deep(0)
    elif text == "torch":
        return float("torch" in sys.modules)
    return float(text == prompt.answer)

def judge_deep(n):
    return judge_deep(n + 1)
'''


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judge_of_a_user.py").write_text(USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "judge_of_a_user:judge"


def with_pool(use: Callable[[GraderPool], Awaitable[Any]], **keys: Any) -> Any:
    """Run `use(pool)` and check that the pool leaves no process behind."""

    async def run() -> Any:
        async with GraderPool(RewardConfig(**keys)) as pool:
            pids = pool.pids
            assert len(pids) == pool.num_alive == keys.get("workers", 1)
            result = await use(pool)
            pids += pool.pids
        assert pool.num_alive == 0 and not any(psutil.pid_exists(pid) for pid in pids)
        await pool.close()
        return result

    return asyncio.run(asyncio.wait_for(run(), 60))


async def full_strength(pool: GraderPool, num: int) -> bool:
    for _ in range(100):
        if pool.num_alive == num:
            return True
        await asyncio.sleep(0.1)
    return False


def rewards(grades: list[Grade]) -> list[float]:
    return [grade.reward for grade in grades]


def test_grades_keep_their_order_and_range() -> None:
    texts = ["7", "8", "3 + 4 = 7", "", r"\boxed{7}", "3 + 4", "\ud800 7"]

    async def use(pool: GraderPool) -> list[Grade]:
        assert await pool.grade(SUM, []) == []
        return await pool.grade(SUM, texts)

    grades = with_pool(use, workers=2, range="plus_minus_one")
    assert rewards(grades) == [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0]
    assert [grade.correct for grade in grades] == [True, False, True, False, True, False, True]
    assert grades[0] == Grade(reward=1.0, correct=True, parts={"math": 1.0}, timed_out=False)


def test_many_tasks_share_the_graders() -> None:
    async def use(pool: GraderPool) -> None:
        prompts = [Prompt(id=str(n), text=f"{n} + 1", answer=str(n + 1)) for n in range(40)]
        texts = [[str(n + 1), str(n + 2), f"so it is {n + 1}"] for n in range(40)]
        grades = await asyncio.gather(*[pool.grade(p, t) for p, t in zip(prompts, texts, strict=True)])
        assert [rewards(group) for group in grades] == [[1.0, 0.0, 1.0]] * 40
        assert pool.num_graded == 120 and pool.num_timeouts == pool.num_deaths == 0

    with_pool(use, workers=2)


def test_a_hanging_answer_costs_its_deadline_only(caplog: pytest.LogCaptureFixture) -> None:
    async def use(pool: GraderPool) -> list[Grade]:
        started = time.monotonic()
        grades = await pool.grade(SUM, ["7", TOWER, "8", "7"])
        assert 1.0 <= time.monotonic() - started < 6.0
        assert pool.num_timeouts == 1 and pool.num_deaths == 0
        assert await full_strength(pool, 1)
        again = time.monotonic()
        assert rewards(await pool.grade(SUM, ["7", "8"])) == [1.0, -1.0]
        assert time.monotonic() - again < 0.9
        return grades

    grades = with_pool(use, workers=1, deadline_s=1.0, range="plus_minus_one")
    assert rewards(grades) == [1.0, -1.0, -1.0, 1.0]
    assert [grade.timed_out for grade in grades] == [False, True, False, False]
    assert "reward.deadline_s=1" in caplog.text and "'sum'" in caplog.text


def test_the_deadline_is_for_each_response(judge: str) -> None:
    async def use(pool: GraderPool) -> None:
        grades = await pool.grade(SUM, ["sleep 0.6", "sleep 0.6", "sleep 0.6", "7"])
        assert rewards(grades) == [0.0, 0.0, 0.0, 1.0] and not any(grade.timed_out for grade in grades)
        grades = await pool.grade(SUM, ["sleep 30", "7", "sleep 31", "sleep 0.1"])
        assert [grade.timed_out for grade in grades] == [True, False, True, False]
        assert rewards(grades) == [0.0, 1.0, 0.0, 0.0]
        assert pool.num_timeouts == 2
        assert (await pool.grade(SUM, ["sleep 30"]))[0].timed_out
        assert await full_strength(pool, 1)

    with_pool(use, functions={judge: 1.0}, workers=1, deadline_s=1.2)


def test_a_hanging_answer_does_not_hold_up_the_other_graders(judge: str) -> None:
    async def use(pool: GraderPool) -> None:
        slow = asyncio.create_task(pool.grade(SUM, ["sleep 30"]))
        await asyncio.sleep(0.2)
        started = time.monotonic()
        for _ in range(10):
            assert rewards(await pool.grade(SUM, ["7"])) == [1.0]
        assert time.monotonic() - started < 1.0 and not slow.done()
        assert (await slow)[0].timed_out

    with_pool(use, functions={judge: 1.0}, workers=2, deadline_s=2.0)


@pytest.mark.parametrize("text", ["exit", "sys.exit"])
def test_an_answer_that_kills_its_grader_twice_is_wrong(
    judge: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(pool: GraderPool) -> None:
        grades = await pool.grade(SUM, ["7", text, "7", text])
        assert rewards(grades) == [1.0, 0.0, 1.0, 0.0] and not grades[1].timed_out
        assert pool.num_deaths == 4 and pool.num_timeouts == 0
        assert await full_strength(pool, 1)

    with_pool(use, functions={judge: 1.0}, workers=1)
    assert "killed its grader 2 times" in caplog.text


def test_an_answer_whose_grader_died_once_is_tried_again(judge: str, tmp_path: Path) -> None:
    async def use(pool: GraderPool) -> None:
        grades = await pool.grade(SUM, ["7", f"exit once {tmp_path / 'mark'}", "8"])
        assert rewards(grades) == [1.0, 1.0, 0.0]
        assert pool.num_deaths == 1

    with_pool(use, functions={judge: 1.0}, workers=1)


def test_a_grader_killed_while_idle_is_replaced() -> None:
    async def use(pool: GraderPool) -> None:
        os.kill(pool.pids[0], signal.SIGKILL)
        assert rewards(await pool.grade(SUM, ["7", "8"])) == [1.0, 0.0]
        assert await full_strength(pool, 1)

    with_pool(use, workers=1)


def test_a_frozen_grader_is_late(judge: str) -> None:
    async def use(pool: GraderPool) -> None:
        os.kill(pool.pids[0], signal.SIGSTOP)
        # More than a socket buffer holds: the sending itself must not wait for ever.
        grades = await pool.grade(SUM, ["x" * 2_000_000])
        assert rewards(grades) == [0.0]
        assert pool.num_deaths == 1
        assert rewards(await pool.grade(SUM, ["7"])) == [1.0]

    with_pool(use, functions={judge: 1.0}, workers=1, deadline_s=1.0)


@pytest.mark.parametrize("cut", ["before", "while", "deadline passed"])
def test_a_grader_that_somebody_stops_makes_no_right_answer_wrong(judge: str, cut: str) -> None:
    async def use(pool: GraderPool) -> None:
        (pid,) = pool.pids
        if cut == "before":
            os.kill(pid, signal.SIGSTOP)
        grading = asyncio.create_task(pool.grade(SUM, ["right after 0.8", "7", "8"]))
        if cut != "before":
            await asyncio.sleep(0.3)
            os.kill(pid, signal.SIGSTOP)
        if cut == "while":  # stopped for less than the deadline, and longer than the deadline in all
            await asyncio.sleep(0.8)
            os.kill(pid, signal.SIGCONT)
        grades = await grading
        assert rewards(grades) == [1.0, 1.0, 0.0] and not any(grade.timed_out for grade in grades)
        assert pool.num_timeouts == 0
        assert pool.num_deaths == (0 if cut == "while" else 1)
        assert await full_strength(pool, 1)
        assert (pool.pids == [pid]) == (cut == "while")

    with_pool(use, functions={judge: 1.0}, workers=1, deadline_s=1.2)


def test_a_grader_that_is_always_stopped_is_given_up(judge: str, caplog: pytest.LogCaptureFixture) -> None:
    async def use(pool: GraderPool) -> None:
        grades = await pool.grade(SUM, ["7", "stop me", "7"])
        assert rewards(grades) == [1.0, 0.0, 1.0]
        assert pool.num_deaths == 4 and pool.num_timeouts == 0

    with_pool(use, functions={judge: 1.0}, workers=1, deadline_s=0.5)
    assert "froze its grader 4 times" in caplog.text


class FakeTime:
    """The clock and the state of a process as a `Deadline` sees them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
        self.now, self.stopped, self.coreless_s = 0.0, False, 0.0
        monkeypatch.setattr(Patience.__init__, "__defaults__", (lambda: self.now,))
        monkeypatch.setattr(deadline, "_is_stopped", lambda pid: self.stopped)
        monkeypatch.setattr(deadline, "_coreless_s", lambda pid: self.coreless_s)
        self.deadline = deadline.Deadline(0, limit_s)

    def until_late(self, coreless: float = 0.0) -> tuple[type[Exception], float]:
        """The verdict and when it came, where the process waits for a core for a share `coreless` of the time."""
        began = self.now
        while True:
            step = self.deadline.next_look_s
            self.now += step
            self.coreless_s += coreless * step
            if (late := self.deadline.look()) is not None:
                return type(late), self.now - began


def test_the_deadline_counts_the_time_in_which_a_process_could_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_of() -> FakeTime:
        return FakeTime(monkeypatch, 2.0)

    assert time_of().until_late() == (deadline.LateError, pytest.approx(2.0, abs=0.02))
    assert time_of().until_late(coreless=0.5) == (deadline.LateError, pytest.approx(4.0, abs=0.3))
    assert time_of().until_late(coreless=1.0) == (deadline.FrozenError, pytest.approx(20.0, abs=0.3))
    time = time_of()
    time.stopped = True
    assert time.until_late() == (deadline.FrozenError, pytest.approx(2.0, abs=0.02))
    # We were stopped for an hour: at most half a second of it counts, and then the rest of its time is still its own.
    time = time_of()
    time.now += 3600
    assert time.deadline.look() is None
    assert time.until_late() == (deadline.LateError, pytest.approx(1.5, abs=0.02))


def test_a_process_that_waits_for_a_core_is_seen_to() -> None:
    core = max(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, [{core}]); print(flush=True)\nwhile True: pass"
    spinners = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for process in spinners:
            assert process.stdout is not None
            process.stdout.readline()
        before = deadline._coreless_s(spinners[0].pid)
        time.sleep(0.8)
        assert deadline._coreless_s(spinners[0].pid) - before > 0.3, "three others had its core"
    finally:
        for process in spinners:
            process.kill()
            process.communicate()


def test_a_user_function_that_raises_or_returns_nan_ends_the_run(judge: str) -> None:
    async def use(pool: GraderPool) -> None:
        for text, message in (("raise", "KeyError: 'broken judge'"), ("nan", "finite"), ("recurse", "RecursionError")):
            with pytest.raises(RewardError, match=rf"judge_of_a_user:judge.*{message}"):
                await pool.grade(SUM, ["7", text, "7"])
            # What was not graded of the failed request is not taken for the next one's answer.
            assert rewards(await pool.grade(SUM, ["8", "7"])) == [0.0, 1.0]

    with_pool(use, functions={judge: 1.0}, workers=1)


def test_a_truncated_response_has_no_format() -> None:
    async def use(pool: GraderPool) -> list[Grade]:
        with pytest.raises(ValueError, match="2 texts but 1 truncated"):
            await pool.grade(SUM, ["7", "8"], [True])
        return await pool.grade(SUM, [r"\boxed{7}", r"\boxed{7}"], [False, True])

    grades = with_pool(use, workers=1, functions={"math": 1.0, "format": 0.5})
    assert rewards(grades) == [1.5, 1.0]


def test_generated_problems_are_scored_by_their_task() -> None:
    from fastreason.config import DataConfig
    from fastreason.data import load_problems

    (prompt,) = load_problems(DataConfig(task="mini_sudoku", num_prompts=1))

    async def use(pool: GraderPool) -> list[Grade]:
        return await pool.grade(prompt, [f"<answer>\n{prompt.answer}\n</answer>", "no idea"])

    grades = with_pool(use, workers=1, functions={"reasoning_gym": 1.0})
    assert [grade.correct for grade in grades] == [True, False]


def test_only_a_reward_model_needs_no_grader() -> None:
    async def run() -> None:
        config = RewardConfig(functions={"reward_model": 1.0}, reward_model_url="http://127.0.0.1:1")
        async with GraderPool(config) as pool:
            assert pool.num_alive == 0
            (grade,) = await pool.grade(SUM, ["7"])
            assert pool.spec.with_part(grade, "reward_model", 0.25).reward == 0.25

    asyncio.run(run())


def test_300_fuzzed_answers_never_crash() -> None:
    source = random.Random(1)
    pieces = ["\\boxed{", "}", "{", "\\frac{1}{", "12", "7", "+", "=", "-", "^", "\\sqrt{", "$", "\\[", "(", ")", ",", "%",
              "\\text{", " and ", "\n", "!", "\\infty", " is ", "\\begin{pmatrix}", "&", "\\\\", "\x00", "\ud800", "٣", "/",
              "0", "x", "y", "\\int_0^1 ", "\\cup", "[", "]", "e", "\\pi", "9^{9", "\\log", "\\binom{9}{", "<",
              "\\le", "."]  # fmt: skip

    async def use(pool: GraderPool) -> None:
        golds = ["7", r"\frac{1}{2}", "x^2+1", "(1, 2)", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "[0, 1)"]
        prompts = [Prompt(id=str(n), text="What?", answer=golds[n % len(golds)]) for n in range(30)]
        texts = [["".join(source.choices(pieces, k=source.randint(0, 18))) for _ in range(10)] for _ in prompts]
        groups = await asyncio.gather(*[pool.grade(p, t) for p, t in zip(prompts, texts, strict=True)])
        assert [len(group) for group in groups] == [10] * 30
        assert {reward for group in groups for reward in rewards(group)} <= {0.0, 1.0}
        assert pool.num_deaths == 0 and await full_strength(pool, 2)

    with_pool(use, workers=2, deadline_s=2.0)


def test_graders_do_not_load_torch_and_get_no_key_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTREASON_REWARD_MODEL_KEY", "secret")

    async def use(pool: GraderPool) -> None:
        for modules in await pool.loaded_modules():
            assert "math_verify" in modules and "reasoning_gym" in modules
            assert not {"torch", "transformers", "vllm", "deepspeed", "datasets"} & set(modules)
        if sys.platform == "linux":
            assert b"secret" not in Path(f"/proc/{pool.pids[0]}/environ").read_bytes()

    with_pool(use, workers=2, functions={"math": 1.0, "reasoning_gym": 1.0})


def test_the_self_test_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(pool: GraderPool) -> None:
        assert "2 grader(s) judge 3 + 4 = 7 right" in await pool.self_test()

        async def all_wrong(prompt: Prompt, texts: list[str]) -> list[Grade]:
            return [pool.spec.wrong() for _ in texts]

        monkeypatch.setattr(pool, "grade", all_wrong)
        with pytest.raises(RewardError, match="misjudge"):
            await pool.self_test()

    with_pool(use, workers=2)


def test_what_cannot_be_loaded_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        GraderPool(RewardConfig(functions={"mth": 1.0}))
    # Fails in the graders only: a module that looks at who imports it.
    (tmp_path / "only_here.py").write_text(
        f"import os\nif os.getpid() != {os.getpid()}: raise OSError('no such licence')\n"
        "def f(text, prompt): return 0.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    async def run() -> None:
        pool = GraderPool(RewardConfig(functions={"only_here:f": 1.0}, workers=2))
        with pytest.raises(RewardError, match="no such licence"):
            await pool.start()
        assert pool.num_alive == 0
        with pytest.raises(RewardError, match="closed"):
            await pool.grade(SUM, ["7"])

    asyncio.run(run())


def test_closing_ends_what_is_being_graded(judge: str) -> None:
    async def run() -> None:
        pool = GraderPool(RewardConfig(functions={judge: 1.0}, workers=1, deadline_s=50))
        await pool.start()
        running = [asyncio.create_task(pool.grade(SUM, ["sleep 40"])) for _ in range(3)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await pool.close()
        results = await asyncio.gather(*running, return_exceptions=True)
        assert time.monotonic() - started < 5
        assert all(isinstance(result, RewardError) and "closed" in str(result) for result in results), results

    asyncio.run(run())


def test_a_cancelled_request_does_not_disturb_the_next(judge: str) -> None:
    async def use(pool: GraderPool) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.grade(SUM, ["sleep 0.5", "8"]), 0.1)
        assert rewards(await pool.grade(SUM, ["7", "8", "7"])) == [1.0, 0.0, 1.0]

    with_pool(use, functions={judge: 1.0}, workers=1)


@pytest.mark.skipif(sys.platform != "linux", reason="graders die with their parent on Linux")
def test_graders_die_with_their_parent(judge: str, tmp_path: Path) -> None:
    script = f"""
import asyncio, sys
sys.path.insert(0, {str(tmp_path)!r})
from fastreason.config import RewardConfig
from fastreason.patience import Patience
from fastreason.rollout import deadline
from fastreason.rollout.graders import GraderPool
from fastreason.types import Prompt
async def main():
    pool = GraderPool(RewardConfig(functions={{{judge!r}: 1.0}}, workers=2, deadline_s=100))
    await pool.start()
    print(*pool.pids, flush=True)
    await pool.grade(Prompt(id="0", text=""), ["sleep 90"])
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGINT)
    time.sleep(0.2)
    assert all(psutil.pid_exists(pid) for pid in pids), "SIGINT must not end a grader"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on Linux")
def test_the_memory_of_a_grader_is_limited() -> None:
    code = "from fastreason.rollout import grader_process as g; g.limit_memory(); bytearray((g.MEMORY_LIMIT_GIB + 1) * 2**30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MemoryError" in done.stderr
