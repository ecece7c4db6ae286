"""What keeps an engine's server alive, with processes that only sleep in place of servers."""

import asyncio

import pytest

from fastreason.errors import EngineError
from fastreason.processes import spawn
from fastreason.serving import Keeper, Served


class Sleeper:
    """A server that only lives; `dies` says at which starts it ends at once."""

    name = "sleeper"

    def __init__(self, folder, dies=()):
        self.folder, self.dies, self.num_starts, self.child = folder, dies, 0, None

    def start(self):
        self.num_starts += 1
        command = ["false"] if self.num_starts in self.dies else ["sleep", "60"]
        self.child = spawn(self.name, command, self.folder / "log", {})
        return self.child

    def explain_end(self):
        return "the reason from its log"


@pytest.fixture
def keep(tmp_path):
    """Runs `work(server, keeper)` beside the keeper's watch; returns what was said."""
    servers = []

    def run(work, dies=(), max_restarts=2):
        server, said = Sleeper(tmp_path, dies), []
        servers.append(server)
        keeper = Keeper(server, max_restarts, tmp_path, said.append)

        async def main():
            keeper.start()
            await asyncio.wait_for(Served(None, keeper).beside(work(server, keeper)), 30)

        try:
            asyncio.run(main())
        finally:
            keeper.stop()
        return said

    yield run
    assert all(server.child.exit_code is not None for server in servers)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


def test_a_death_before_the_first_answer_is_final_and_explained(keep):
    async def wait(server, keeper):
        await asyncio.sleep(20)

    with pytest.raises(EngineError, match=r"sleeper failed: it ended with exit code 1; the reason from its log"):
        keep(wait, dies=(1,))


def test_it_is_started_again_after_a_death_and_where_it_hangs(keep):
    async def work(server, keeper):
        keeper.note_life()
        server.child.process.kill()
        await until(lambda: server.num_starts == 2)
        keeper.report_hung("it shows no sign of life")
        await until(lambda: server.num_starts == 3)
        await asyncio.sleep(0.3)
        assert server.num_starts == 3, "what was said of the one before does not count for the next"

    said = keep(work)
    assert said == [
        "starting the sleeper again (1 of run.max_restarts=2): it ended with exit code -9",
        "starting the sleeper again (2 of run.max_restarts=2): it shows no sign of life",
    ]


def test_starts_are_counted_since_the_last_response(keep):
    async def work(server, keeper):
        keeper.note_life()
        for num in (2, 3, 4):
            server.child.process.kill()
            await until(lambda num=num: server.num_starts == num)
            keeper.note_life()
        await asyncio.sleep(20)

    with pytest.raises(
        EngineError, match=r"failed, after 1 restart\(s\) without a response: it ended with exit code 1"
    ):
        keep(work, dies=(4, 5), max_restarts=1)


def test_what_fails_beside_a_living_engine_is_raised_as_it_is(keep):
    async def work(server, keeper):
        raise ValueError("its own fault")

    with pytest.raises(ValueError, match="its own fault"):
        keep(work)
