"""Runs with several engine servers, some of which die or go away: the run goes on, and no prompt is lost or trained twice."""

import json
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import secret_search
import yaml
from engine_serve import Serve

from fastreason.ledger import audit_ledger, read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).resolve().parents[2]


def assert_nothing_lost(run: Any, steps: int, per_step: int = 3) -> None:
    audit = audit_ledger(read_ledger(run.run_dir))
    assert (audit.lost, audit.twice, audit.num_dropped) == ([], [], 0)
    assert audit.num_issued == audit.num_trained == per_step * steps
    assert [row["step"] for row in run.metrics()] == list(range(1, steps + 1))


def test_one_of_two_servers_is_killed_and_the_run_goes_on_with_the_other_until_it_is_back(train_run):
    """Two servers, two trainer ranks. The one that is killed comes back with the weights of then, and works again.

    The quickstart's sums and reward. The fake engine's bytes are hardly ever a sum, so a second reward gives them a gradient.
    """
    steps = 24
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    run = train_run(
        data={**quickstart["data"], "path": None, "max_prompt_tokens": 160},  # a byte is a token here
        reward={"functions": {**quickstart["reward"]["functions"], "user_reward_of_the_test:even": 1.0}},
        resources={"engines": 2},
        rollout={"fake_token_s": 0.02, "max_staleness": 1},
        train={"ranks": 2, "steps": steps},
        checkpoint={"save_model": False},
    )
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"  # so that it is back in time on a fast machine too
    run.start()
    run.until(lambda: run.num_steps() >= 2, what="the first steps")
    _, second = run.find("rollout.fake_server")
    second.send_signal(signal.SIGKILL)
    killed_at = run.num_steps()
    assert run.wait(250) == 0, run.output + run.logs()
    assert_nothing_lost(run, steps)
    rows = run.metrics()
    requests = [[row[f"engine/requests_{index}"] for row in rows] for index in range(2)]
    assert all(sum(each) > 0 for each in requests), "one of the engines had nothing to do"
    assert requests[1][-1] + requests[1][-2] > 0, "the one that came back was not asked again"
    assert rows[-1]["engine/alive"] == 2
    assert max(row["rollout/staleness_max"] for row in rows) <= 1
    events = [row for row in read_ledger(run.run_dir) if row["event"] in ("engine_lost", "engine_back")]
    assert [row["event"] for row in events] == ["engine_lost", "engine_back"], events
    restarts = json.loads((run.run_dir / "summary.json").read_text())["restarts"]
    assert restarts == {"engine-0": 0, "engine-1": 1, "producer": 0}
    samples, sums = run.samples(), r".*arithmetic problem: \d [+-] \d ="
    assert all(re.fullmatch(sums, row["prompt"]) for row in samples), samples[0]["prompt"]
    assert all(set(row["parts"]) == {"math", "user_reward_of_the_test:even"} for row in samples), samples[0]["parts"]
    assert all(row["train/grad_norm"] > 0 for row in rows)
    assert killed_at < steps - 8, "it was killed too late for this test to show anything"
    assert "engine 1 (fake)  1 server" in run.output and run.left_behind(2) == [] and run.files_left() == []


@pytest.fixture
def serve(tmp_path: Path, tiny_model: Path) -> Iterator[Serve]:
    server = Serve(tmp_path, tiny_model)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def test_a_server_elsewhere_is_closed_without_its_key_and_waited_for_where_it_is_started_again(train_run, serve):
    """Its key is in a file that nobody else can read. Weights come by a shared folder."""
    steps = 14
    key = serve.key_file.read_text().strip()
    assert serve.key_file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{serve.url}/health", timeout=10)
    sections = {
        "resources": {"urls": [serve.url]},
        "rollout": {"transport": "file", "exchange_dir": str(serve.exchange), "max_staleness": 1},
        "train": {"steps": steps},
        "checkpoint": {"save_model": False},
    }
    refused = train_run(**sections)
    refused.environment["FASTREASON_ENGINE_KEY"] = "another"
    assert refused.run(timeout_s=100) == 1, refused.output + refused.logs()
    message = f"the fake engine at {serve.url} refused the key of this run (401): set FASTREASON_ENGINE_KEY to that of"
    assert refused.output.count("\nerror:") == 1 and message in refused.output, refused.output
    assert refused.left_behind(2) == [] and refused.files_left() == []
    run = train_run(**sections)
    run.environment["FASTREASON_ENGINE_KEY"] = key
    run.environment["TEST_REWARD_SLEEP_S"] = "0.02"
    run.start()
    run.until(lambda: run.num_steps() >= 2, what="the first steps")
    serve.stop()
    away = run.num_steps()
    serve.start()
    assert run.wait(200) == 0, run.output + run.logs()
    assert_nothing_lost(run, steps)
    assert away < steps - 4, "it was stopped too late for this test to show anything"
    events = [row["event"] for row in read_ledger(run.run_dir) if row["event"] in ("engine_lost", "engine_back")]
    assert events == ["engine_lost", "engine_back"]
    assert f"elsewhere  {serve.url}" in run.output and "starting the" not in run.output
    assert list(serve.exchange.iterdir()) == [] and run.left_behind(2) == []
    assert secret_search.files_that_tell([run.folder], [key]) == [] and key not in run.output
