"""Groups on disk: what is written is read again, a damaged folder is found out, and the trainer's stand-in counts right."""

import msgspec
import pytest

from fastreason.config import parse_config
from fastreason.errors import ConfigError, DataError, InterruptedWaitError
from fastreason.replay import (
    REPLAYED,
    ReplayRollouts,
    batch_path,
    check_batches,
    collect,
    count_batches,
    read_batch,
    write_batch,
)
from fastreason.rollout.wire import Batch
from fastreason.types import Grade, Group, Prompt, Sample, WeightUpdate


def group(ticket, num_samples=2):
    samples = [
        Sample(
            token_ids=[ticket, 7, number],
            sampler_logp=[-0.5, -0.1234567890123, 0.0],
            token_versions=[0, 0, 1],
            text="ein Wörtchen\u2028mehr",
            finish_reason="stop",
            grade=Grade(reward=0.25, correct=True, parts={"math": 0.25}),
        )
        for number in range(num_samples)
    ]
    prompt = Prompt(id=f"p{ticket}", text="1 + 1 = ?", answer="2", metadata={"entry": {"terms": [1, 1]}})
    return Group(ticket=ticket, prompt=prompt, prompt_token_ids=[5, 6], samples=samples, version_issued=0)


def batch(number, size=2, num_samples=2):
    return [group(size * number + i, num_samples) for i in range(size)]


def write_batches(folder, num, **sizes):
    for number in range(1, num + 1):
        write_batch(folder, number, batch(number, **sizes))


def config_of(steps, prompts=2, samples=2):
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"task": "chain_sum"},
            "rollout": {"samples_per_prompt": samples},
            "train": {"steps": steps, "prompts_per_step": prompts},
        }
    )


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
    path = write_batch(tmp_path / "groups", 12, batch(12))
    assert path == batch_path(tmp_path / "groups", 12) and path.name == "batch-000012.msgpack"
    assert read_batch(tmp_path / "groups", 12) == batch(12)
    assert [file.name for file in (tmp_path / "groups").iterdir()] == [path.name]


def test_a_batch_is_renamed_into_place_when_it_is_whole(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fastreason.replay.os.replace", lambda a, b: seen.append((a.name, msgspec.msgpack.decode(a.read_bytes()), b))
    )
    path = write_batch(tmp_path, 1, batch(1))
    ((aside, content, target),) = seen
    assert target == path and not path.exists() and len(content) == 2
    (tmp_path / aside).rename(tmp_path / aside)
    assert count_batches(tmp_path) == 0, "a file that is still written was counted"


def test_batches_are_counted_and_a_gap_is_an_error(tmp_path):
    assert count_batches(tmp_path / "none") == 0
    write_batches(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("mine")
    assert count_batches(tmp_path) == 3
    batch_path(tmp_path, 2).unlink()
    with pytest.raises(DataError, match=r"batch-000002\.msgpack is missing"):
        count_batches(tmp_path)


def spoil(path, change):
    raw = msgspec.msgpack.decode(path.read_bytes())
    change(raw)
    path.write_bytes(msgspec.msgpack.encode(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[1].pop("ticket"), "ticket"),
        (lambda raw: raw[1]["samples"][0].update(token_ids=["a"]), "token_ids"),
        (lambda raw: raw[1]["samples"][0].update(grade=None), "ticket 3: a sample has no grade"),
        (lambda raw: raw[1]["samples"][1]["sampler_logp"].pop(), "3 tokens have 2 log-probabilities and 3 versions"),
        (lambda raw: raw[1]["samples"][1]["token_versions"].pop(), "3 tokens have 3 log-probabilities and 2 versions"),
        (
            lambda raw: raw[1]["samples"][1].update(teacher_logp=[-1.0]),
            "3 tokens have 1 log-probabilities of a teacher",
        ),
    ],
)
def test_what_is_no_graded_group_is_an_error_with_the_files_name(tmp_path, change, message):
    write_batch(tmp_path, 1, batch(1))
    spoil(batch_path(tmp_path, 1), change)
    with pytest.raises(DataError, match=r"batch-000001\.msgpack") as caught:
        read_batch(tmp_path, 1)
    assert message in str(caught.value)


def test_a_torn_file_is_an_error_with_its_name(tmp_path):
    path = write_batch(tmp_path, 1, batch(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"batch-000001\.msgpack is no batch"):
        read_batch(tmp_path, 1)


def test_a_folder_is_checked_against_the_config_before_training(tmp_path):
    write_batches(tmp_path, 3)
    check_batches(tmp_path, config_of(3))
    check_batches(tmp_path, config_of(2))
    with pytest.raises(ConfigError, match=r"no batch\(es\) there, train\.steps=2\. Write them first: .*--only rollout"):
        check_batches(tmp_path / "none", config_of(2))
    with pytest.raises(ConfigError, match=r"3 batch\(es\) there, train\.steps=4\. Pass train\.steps=3"):
        check_batches(tmp_path, config_of(4))
    write_batch(tmp_path, 3, batch(3, size=5))
    with pytest.raises(
        ConfigError, match=r"batch-000003\.msgpack was .*train\.prompts_per_step=5, .*prompts_per_step=2"
    ):
        check_batches(tmp_path, config_of(3))
    write_batch(tmp_path, 3, [group(1), group(2, num_samples=4)])
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_prompt=4, this run has rollout\.samples_per_prompt=2"):
        check_batches(tmp_path, config_of(3))
    check_batches(tmp_path, config_of(3), done=3)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("greedy", r"batch-000002\.msgpack, ticket 5: written without a greedy response, which algorithm\.name=grpo"),
        ("scored", r"batch-000002\.msgpack, ticket 5: written without a teacher's log-probabilities"),
    ],
)
def test_groups_without_what_the_algorithm_needs_are_refused_before_training(tmp_path, needs, message):
    for number in (1, 2):
        groups = batch(number)
        for each in groups:
            each.greedy_reward = 0.0
            for sample in each.samples:
                sample.teacher_logp = [-1.0] * 3
        if number == 2:
            groups[1].greedy_reward = groups[1].samples[1].teacher_logp = None
        write_batch(tmp_path, number, groups)
    check_batches(tmp_path, config_of(2))
    check_batches(tmp_path, config_of(1), **{needs: True})
    with pytest.raises(ConfigError, match=message):
        check_batches(tmp_path, config_of(2), **{needs: True})


class Client:
    """Gives `num` batches, and is then told to stop."""

    def __init__(self, num):
        self.num, self.given = num, 0

    def next_batch(self):
        if self.given == self.num:
            raise InterruptedWaitError("told to stop")
        self.given += 1
        return Batch(groups=batch(self.given), generate_s=1.0, grade_s=1.0, figures={})


def test_collecting_writes_every_batch_before_it_says_so(tmp_path):
    said = []
    client = Client(5)
    assert collect(client, tmp_path, 3, lambda number: said.append((number, count_batches(tmp_path)))) == 3
    assert said == [(1, 1), (2, 2), (3, 3)] and client.given == 3
    assert [read_batch(tmp_path, number) for number in (1, 2, 3)] == [batch(1), batch(2), batch(3)]


def test_collecting_ends_early_when_told_to_stop(tmp_path):
    assert collect(Client(2), tmp_path, 4, lambda number: None) == 2
    assert count_batches(tmp_path) == 2


def test_the_replay_gives_batch_after_batch_and_goes_on_behind_the_version(tmp_path):
    write_batches(tmp_path, 4)
    rollouts = ReplayRollouts(tmp_path)
    rollouts.start(0, 0, None)
    assert [rollouts.next_batch().groups for _ in range(2)] == [batch(1), batch(2)]
    state = rollouts.save_state(4, settle=True)
    assert state == REPLAYED
    resumed = ReplayRollouts(tmp_path)
    resumed.start(2, 4, state)
    assert resumed.next_batch().groups == batch(3)
    resumed.next_batch()
    with pytest.raises(DataError, match=r"batch-000005\.msgpack"):
        resumed.next_batch()


def test_the_replay_has_no_engine(tmp_path):
    rollouts = ReplayRollouts(tmp_path)
    report = rollouts.publish(WeightUpdate(path="none", version=3, checksum="abc", num_bytes=1), trained=6)
    assert (report.version, report.checksum, report.num_tensors, report.pause_s) == (3, "abc", 0, 0.0)
    with pytest.raises(ConfigError, match=r"eval\.num_prompts=0"):
        rollouts.evaluate("before")
