"""Checkpoints: seen whole or not at all, the newest and the best kept, and errors in place of a wrong resume."""

import json
import math

import pytest

from fastreason.checkpoint import STATE_FILE, CheckpointStore, TrainerState, read_producer_state, read_state
from fastreason.errors import CheckpointError


def state(step, score=0.0):
    return TrainerState(step=step, version=step, num_groups=2 * step, score=score, figures={"tokens": 1})


def save(store, step, score=0.0):
    (store.aside(step) / "updater").write_text(f"weights of {step}")
    return store.commit(state(step, score), f"books of {step}".encode())


def names(store):
    return [path.name for path in store.complete()]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep_last=2, keep_best=True)


def test_what_was_saved_comes_back(store):
    path = save(store, 12, score=0.25)
    assert path.name == "step-000012" and (path / "updater").read_text() == "weights of 12"
    assert store.latest() == (path, state(12, 0.25))
    assert read_producer_state(path) == b"books of 12"
    (path / "producer.msgpack").unlink()
    with pytest.raises(CheckpointError, match="producer"):
        read_producer_state(path)


def test_a_score_of_nothing_yet_comes_back(store):
    save(store, 1, -math.inf)
    assert store.latest()[1].score == -math.inf


def test_what_is_being_written_is_not_seen(store):
    save(store, 1)
    (store.aside(2) / "updater").write_text("half")
    assert names(store) == ["step-000001"]
    # Killed after the state was written, before the renaming.
    (store.folder / "step-000002.writing" / STATE_FILE).write_text(json.dumps(vars(state(2))))
    assert names(store) == ["step-000001"] and store.latest()[1].step == 1


def test_what_is_being_removed_is_not_seen_and_swept_with_what_is_half_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=False)
    save(store, 1)

    def die(path, **_):
        assert path.name != "step-000001", "a checkpoint in its place lost files"
        raise KeyboardInterrupt

    (store.aside(2) / "updater").touch()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        # Writing aside begins with a clean-up too: only the removal of the first is struck.
        patched.setattr(
            "fastreason.checkpoint.shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or die(path)
        )
        store.commit(state(2), b"")
    (store.aside(3) / "updater").touch()
    assert names(store) == ["step-000002"] and len(list(store.folder.iterdir())) == 3
    store.sweep()
    assert [path.name for path in store.folder.iterdir()] == ["step-000002"]
    CheckpointStore(tmp_path / "none", 1, keep_best=False).sweep()


def test_a_folder_without_its_state_is_not_seen(store):
    save(store, 1)
    (store.folder / "step-000003").mkdir()
    assert store.latest()[1].step == 1


def test_writing_aside_starts_empty(store):
    (store.aside(2) / "left over").touch()
    assert list(store.aside(2).iterdir()) == []


def test_a_step_saved_again_replaces_the_former(store):
    save(store, 1, 0.1)
    path = save(store, 1, 0.9)
    assert names(store) == ["step-000001"] and read_state(path).score == 0.9


def test_the_newest_are_kept_and_the_best(store):
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        save(store, step, score)
    assert names(store) == ["step-000002", "step-000004", "step-000005"]
    save(store, 6, 0.95)
    assert names(store) == ["step-000005", "step-000006"]


def test_without_the_best_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=False)
    for step, score in enumerate([0.9, 0.1, 0.2], start=1):
        save(store, step, score)
    assert names(store) == ["step-000003"]


def test_the_newest_is_the_highest_step_not_the_last_written(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=9, keep_best=False)
    for step in (10, 100, 9):
        save(store, step)
    assert store.latest()[1].step == 100


def test_nothing_to_resume_from_says_when_runs_save(store):
    with pytest.raises(CheckpointError, match=r"no complete checkpoint to resume from.*checkpoint\.every"):
        store.latest()


def test_another_format_is_refused(store):
    path = save(store, 1)
    raw = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps({**raw, "format": 1}))
    with pytest.raises(CheckpointError, match=r"step-000001: checkpoint format 1, this version reads 2"):
        store.latest()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"format": 2}', '{"format": 2, "unheard": 2}'])
def test_a_state_that_cannot_be_read_is_named(store, text):
    path = save(store, 1)
    (path / STATE_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="step-000001"):
        store.latest()
