"""Two hosts as network namespaces: an engine server on one, a run on the other, and the link between them cut and restored."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_serve import Serve
from test_fleet import assert_nothing_lost

from fastreason.ledger import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CUT_S, HANG_S = 10.0, 4.0


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with a cable between them: 10.213.0.1 and 10.213.0.2, the ends of veth-a and veth-b."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` here (Debian's package iproute2): two hosts cannot be made of one machine")
    names = (f"fr{os.getpid()}a", f"fr{os.getpid()}b")
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "del", name)
            ip("-n", names[0], "link", "add", "veth-a", "type", "veth", "peer", "name", "veth-b", "netns", names[1])
            for name, end, address in zip(names, ("veth-a", "veth-b"), ("10.213.0.1/30", "10.213.0.2/30"), strict=True):
                ip("-n", name, "addr", "add", address, "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield names


def test_a_link_that_is_cut_for_ten_seconds_costs_only_the_time(train_run, tiny_model: Path, tmp_path: Path, hosts):
    there, here = hosts
    server = Serve(tmp_path, tiny_model, "10.213.0.1", ["ip", "netns", "exec", there])
    run = train_run(
        run={"hang_timeout_s": HANG_S},
        resources={"urls": [server.url]},
        rollout={"transport": "file", "exchange_dir": str(server.exchange), "max_staleness": 1},
        train={"steps": 10},
        checkpoint={"save_model": False},
    )
    run.prefix = ["ip", "netns", "exec", here]
    try:
        server.start()
        run.environment["FASTREASON_ENGINE_KEY"] = server.key_file.read_text().strip()
        run.start()
        run.until(lambda: run.num_steps() >= 2, what="the first steps")
        ip("-n", here, "link", "set", "veth-b", "down")
        cut = time.time()
        run.until(lambda: time.time() > cut + CUT_S, what="the end of the cut")
        done = run.num_steps()
        ip("-n", here, "link", "set", "veth-b", "up")
        assert run.wait(200) == 0, run.output + run.logs()
    finally:
        server.stop()
    assert_nothing_lost(run, 10)
    assert done < 10, "the link was cut too late for this test to show anything"
    events = [row for row in read_ledger(run.run_dir) if row["event"] in ("engine_lost", "engine_back")]
    assert [row["event"] for row in events] == ["engine_lost", "engine_back"], events
    assert events[0]["time"] > cut and events[1]["time"] > cut + CUT_S
    assert run.left_behind(2) == [] and list(server.exchange.iterdir()) == []
