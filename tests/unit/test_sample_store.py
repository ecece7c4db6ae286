"""The file of graded responses: what a kill leaves of it, what is refused, and that nothing comes twice."""

import json
import resource

import pytest

from fastreason.errors import ConfigError, DataError
from fastreason.rollout.sample_store import SAMPLES_FILE, Response, SampleStore, check_settings
from fastreason.types import Prompt


def response(id="q1", sample=0, problem="1 + 1?", text="2", **more):
    told = {"num_tokens": 3, "finish_reason": "stop", "correct": True, "reward": 1.0, **more}
    return Response(id=id, sample=sample, problem=problem, answer="2", response=text, **told)


@pytest.fixture
def filled(tmp_path):
    """A folder with three responses, one of them in letters of several bytes."""
    store = SampleStore(tmp_path)
    for each in (response(), response(sample=1, text="zwölf ≠ 2", correct=False), response(id="q2", problem="2 + 2?")):
        store.add(each)
    store.close()
    return tmp_path


def test_what_was_added_is_found_again_with_its_place(filled):
    store = SampleStore(filled)
    assert {id: sorted(kept) for id, kept in store.kept.items()} == {"q1": [0, 1], "q2": [0]}
    assert len(store) == 3
    kept = store.kept["q1"][1]
    assert (kept.correct, kept.truncated, kept.num_tokens, kept.num_chars) == (False, False, 3, 9)
    assert store.read(kept) == response(sample=1, text="zwölf ≠ 2", correct=False)
    late = response(sample=2, text=" \n", correct=False, timed_out=True)
    store.add(late)
    store.add(response(sample=3, text="", correct=False, refusal="too long"))
    marks = [(k.empty, k.timed_out, k.refused) for k in store.kept["q1"].values()]
    assert marks == [(False, False, False)] * 2 + [(True, True, False), (True, False, True)]
    assert store.read(store.kept["q2"][0]).problem == "2 + 2?"
    store.close()
    store.close()


@pytest.mark.parametrize("num_bytes", [1, 40, -1])
def test_a_torn_last_line_is_cut_off_and_its_place_is_taken(filled, num_bytes):
    whole = (filled / SAMPLES_FILE).read_bytes()
    torn = json.dumps({"id": "q3", "sample": 0, "problem": "three?", "response": "x" * 50}).encode()[:num_bytes]
    (filled / SAMPLES_FILE).write_bytes(whole + torn)
    store = SampleStore(filled)
    assert len(store) == 3
    store.add(response(sample=2))
    store.close()
    text = (filled / SAMPLES_FILE).read_bytes()
    assert text.startswith(whole) and text.count(b"\n") == 4
    assert len(SampleStore(filled)) == 4


def test_a_line_that_cannot_be_read_or_comes_twice_names_its_number(filled):
    file = filled / SAMPLES_FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"not json\n" + lines[1])
    with pytest.raises(DataError, match="line 2 is no graded response"):
        SampleStore(filled)
    file.write_bytes(lines[0] + lines[1] + lines[0])
    with pytest.raises(DataError, match=r"line 3: response 0 to 'q1' is there twice"):
        SampleStore(filled)
    assert file.read_bytes() == lines[0] + lines[1] + lines[0], "a refused file is left as it is"


@pytest.mark.parametrize("room", [0, 60])
def test_a_full_disk_leaves_whole_lines_and_what_comes_later_is_kept(filled, room):
    before = (filled / SAMPLES_FILE).read_bytes()
    store = SampleStore(filled)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
    try:
        with pytest.raises(DataError, match=r"Make room, then go on"):
            store.add(response(sample=2, text="x" * 500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (filled / SAMPLES_FILE).read_bytes() == before
    # Another response was in flight when the disk was full, and there is room again.
    store.add(response(sample=3))
    assert store.read(store.kept["q1"][3]) == response(sample=3) and sorted(store.kept["q1"]) == [0, 1, 3]
    store.close()
    assert len(SampleStore(filled)) == 4


def test_nothing_is_added_twice(filled):
    store = SampleStore(filled)
    with pytest.raises(DataError, match="twice"):
        store.add(response())


def test_two_processes_do_not_write_at_once(filled):
    first = SampleStore(filled)
    with pytest.raises(ConfigError, match="another process is writing"):
        SampleStore(filled)
    first.close()
    SampleStore(filled).close()


def test_responses_to_another_problem_under_the_same_id_are_refused(filled):
    store = SampleStore(filled)
    store.check_problems([Prompt(id="q1", text="1 + 1?", answer="2"), Prompt(id="new", text="?", answer="1")])
    for other in (Prompt(id="q1", text="1 + 2?", answer="2"), Prompt(id="q1", text="1 + 1?", answer="3")):
        with pytest.raises(ConfigError, match=r"'q1'.*section data has changed"):
            store.check_problems([other])
    with pytest.raises(DataError, match="another problem's before"):
        store.add(response(sample=7, problem="something else"))


def test_other_settings_are_refused_by_name_once_there_is_a_response(tmp_path):
    check_settings(tmp_path, {"distill.temperature": 1.0, "source": "vllm"})
    check_settings(tmp_path, {"distill.temperature": 0.6, "source": "vllm"})  # nothing was sampled yet
    store = SampleStore(tmp_path)
    store.add(response())
    store.close()
    check_settings(tmp_path, {"distill.temperature": 0.6, "source": "vllm"})
    with pytest.raises(ConfigError, match=r"distill\.temperature=0\.6 then, 1\.0 now") as caught:
        check_settings(tmp_path, {"distill.temperature": 1.0, "source": "vllm"})
    assert "source" not in str(caught.value)
    with pytest.raises(ConfigError, match="model=None then, 'x' now"):
        check_settings(tmp_path, {"distill.temperature": 0.6, "source": "vllm", "model": "x"})
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        check_settings(tmp_path, {"distill.temperature": 0.6, "source": "vllm"})
