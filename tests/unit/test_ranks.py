"""A rank that waits too long for another says so in words."""

import os
import socket
import subprocess
import sys

import pytest

from fastreason.ranks import explain_timeout

SCRIPT = """
import datetime, sys, time
import torch.distributed as dist
from fastreason.ranks import Ranks, explain_timeout

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1))
ranks = Ranks()
ranks.barrier()
if ranks.rank == 1:
    sys.stdin.read()  # until the other one has had enough
    sys.exit()
try:
    ranks.sum([1.0])
except Exception as error:
    print(explain_timeout(error), flush=True)
"""


@pytest.mark.timeout(400)
def test_a_rank_that_does_not_come_is_reported():
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        rendezvous["MASTER_PORT"] = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **rendezvous, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        said = ranks[0].stdout.readline()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    assert "trainer rank 0 waited too long for another rank" in said and "run.timeout_s" in said


def test_other_errors_are_not_explained_away():
    assert explain_timeout(RuntimeError("CUDA out of memory")) is None
    assert explain_timeout(ValueError("timed out")) is None
