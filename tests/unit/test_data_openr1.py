"""Positives and pairs from rows with several verified generations: each filter, the order, bad rows, kills, memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from prepared_data import lines, save_word_tokenizer, write

from fastreason import cli
from fastreason.data.lengths import Lengths
from fastreason.data.openr1 import PAIR_DROPS, ROW_DROPS
from fastreason.data.prepare import prepare_openr1
from fastreason.types import Grade, Prompt

HERE = Path(__file__).resolve().parents[1]
FIXTURE = HERE / "data" / "openr1_filters.jsonl"
EXPECTED = json.loads((HERE / "data" / "openr1_filters.expected.json").read_text())
REAL = Path(os.environ.get("FASTREASON_DATA", "/nonexistent")) / "rollouts_qwen25math_math100x8.jsonl"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason=f"FASTREASON_DATA does not name a folder with {REAL.name}")


def row(id: str | None = None, **columns: Any) -> dict[str, Any]:
    """A row that becomes a pair."""
    labels = {"llama_verification": [False, True], "math_verify_reparsed_answer": [False, True]}
    whole = {"problem": f"Problem {id}?", "answer": "5", "source": "olympiads", "problem_is_valid": "Yes"}
    whole |= {"generations": ["wrong", "right"], "correctness": labels} | ({} if id is None else {"id": id})
    return {name: value for name, value in (whole | columns).items() if value is not ...}


def prepare(capsys: pytest.CaptureFixture[str], out: Path, *arguments: Any, code: int = 0) -> tuple[Any, str]:
    """The report and what was printed; `code` is the exit code that must come."""
    capsys.readouterr()
    result = cli.main(["data", "openr1", *map(str, arguments), "--out", str(out)])
    said = capsys.readouterr()
    assert result == code, said.err
    return (json.loads((out / "report.json").read_text()) if code == 0 else None), said.out + said.err


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else; one test looks at the picture."""
    if "length" not in request.node.name:
        monkeypatch.setattr(Lengths, "draw", lambda *_: None)


@pytest.mark.parametrize("verifiers", ["both", "either"])
def test_each_row_of_the_fixture_falls_to_its_filter(verifiers, capsys, tmp_path, words) -> None:
    limits = ["--tokenizer", words, "--max-prompt-tokens", 7, "--max-response-tokens", 15]
    report, printed = prepare(capsys, tmp_path / "out", FIXTURE, "--verifiers", verifiers, *limits)
    assert {key: report[key] for key in EXPECTED[verifiers]} == EXPECTED[verifiers]
    assert sum(report["dropped"].values()) + report["positives"] == report["rows"] == 9
    positives, (pair,) = lines(tmp_path / "out" / "positives.jsonl"), lines(tmp_path / "out" / "pairs.jsonl")
    survivors = {"no_incorrect", "prompt_too_long", "response_too_long", "kept"}
    survivors |= {"no_correct"} if verifiers == "either" else set()
    assert {positive["id"] for positive in positives} == survivors
    # Of the four generations both verifiers accept the second; one of them also the first.
    chosen, rejected = (1, 0) if verifiers == "both" else (0, 2)
    said = ["First \\boxed{6}.", "Second \\boxed{5}.", "Third \\boxed{7}.", "Fourth \\boxed{5}."]
    kept = next(positive for positive in positives if positive["id"] == "kept")
    assert (pair["id"], pair["answer"], pair["problem"]) == ("kept", "5", "What is 2 + 3? (kept)")
    assert pair["chosen"] == kept["response"] == said[chosen] and pair["rejected"] == said[rejected]
    assert (pair["chosen_index"], pair["rejected_index"], pair["row"]) == (chosen, rejected, 8)
    assert f"{'positives.jsonl':<44}{report['positives']:>12}" in printed


def test_limits_hold_at_their_very_length_and_count_the_end_of_the_response(capsys, tmp_path, words) -> None:
    # The longest response has 15 words, the problems 6, one 14.
    for number, (prompt, response, dropped) in enumerate(
        [(14, 16, (0, 0)), (14, 15, (0, 1)), (13, 16, (1, 0)), (6, 15, (1, 1)), (5, 16, (3, 0)), (5, 15, (3, 0))]
    ):
        limits = ["--max-prompt-tokens", prompt, "--max-response-tokens", response, "--tokenizer", words]
        report, _ = prepare(capsys, tmp_path / str(number), FIXTURE, *limits)
        found = report["pairs_dropped"]
        assert (found["prompt_too_long"], found["response_too_long"]) == dropped
        assert report["positives"] == 4, "positives have no limit"
    assert report["lengths"]["unit"] == "tokens" and report["lengths"]["rejected"]["max"] == 16
    assert (tmp_path / "0" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_tokenizer_there_are_no_limits_and_it_says_so(capsys, tmp_path) -> None:
    report, printed = prepare(capsys, tmp_path / "out", FIXTURE)
    assert report["pairs"] == 3 and "no limit of length was applied" in printed
    assert report["lengths"]["chosen"]["max"] == len("Second \\boxed{5}.")
    _, printed = prepare(capsys, tmp_path / "no", FIXTURE, "--max-prompt-tokens", 5, code=2)
    assert "--max-prompt-tokens 5: tokens need a tokenizer. Add --tokenizer MODEL." in printed


def test_a_tokenizer_may_be_a_hub_name_that_is_cached_or_may_be_fetched(capsys, tmp_path, words, monkeypatch) -> None:
    import huggingface_hub

    from fastreason import models

    limits = ["--max-response-tokens", 15, "--tokenizer"]
    _, printed = prepare(capsys, tmp_path / "no", FIXTURE, *limits, "some/model", code=2)
    assert "error: --tokenizer 'some/model'" in printed and "cache" in printed, printed
    assert "--allow-download" in printed and not (tmp_path / "no").exists()
    expected, _ = prepare(capsys, tmp_path / "folder", FIXTURE, *limits, words)
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, any("safetensors" in pattern for pattern in allow_patterns)))
        return str(words)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched, _ = prepare(capsys, tmp_path / "fetched", FIXTURE, *limits, "some/model", "--allow-download")
    monkeypatch.setattr(models, "_hub_snapshot", lambda name: words if name == "some/model" else None)
    cached, _ = prepare(capsys, tmp_path / "cached", FIXTURE, *limits, "some/model")
    assert asked == [("some/model", False)], "the tokenizer, without weights, once"
    run = tmp_path / "run"
    shutil.copytree(words, run / "model")
    (run / "config.yaml").touch()
    (run / "model" / "config.json").write_text("{}")
    trained, _ = prepare(capsys, tmp_path / "trained", FIXTURE, *limits, run)
    assert fetched["lengths"] == cached["lengths"] == trained["lengths"] == expected["lengths"]
    assert expected["lengths"]["unit"] == "tokens"
    assert cached["pairs_dropped"]["response_too_long"] == 1


def test_the_order_is_that_of_datasets_shuffle(capsys, tmp_path) -> None:
    import datasets

    rows = [row(str(number)) for number in range(200)]
    path = write(tmp_path / "rows.jsonl", rows)
    for seed in (42, 7):
        shuffled = datasets.Dataset.from_list(rows).shuffle(seed=seed)["id"]
        prepare(capsys, tmp_path / f"{seed}", path, "--seed", seed)
        assert [line["id"] for line in lines(tmp_path / f"{seed}" / "pairs.jsonl")] == list(shuffled)
        prepare(capsys, tmp_path / f"{seed}-few", path, "--seed", seed, "--limit", 30)
        assert [line["id"] for line in lines(tmp_path / f"{seed}-few" / "positives.jsonl")] == list(shuffled)[:30]


def test_bad_rows_are_reported_with_their_line_and_skipped(capsys, tmp_path) -> None:
    bad = ['{"id": "torn", "prob', "[1, 2]", '{"id": "b", "x": "\xff"}', ""]
    bad += [row("c", generations="not a list"), row("d", correctness={"llama_verification": ["yes", "no"]})]
    path = write(tmp_path / "rows.jsonl", [row("a"), *bad, row("z", generations=["\ud800", "right"])])
    path.write_bytes(path.read_bytes().replace("\xff".encode(), b"\xff"))
    report, printed = prepare(capsys, tmp_path / "out", path)
    assert report["rows"] == 7 and report["dropped"]["bad_row"] == 5 and report["pairs"] == 2
    found = {line["place"]: line["reason"] for line in lines(tmp_path / "out" / "bad_rows.jsonl")}
    assert list(found) == [f"rows.jsonl, line {number}" for number in (2, 3, 4, 6, 7)]
    assert "not JSON" in found["rows.jsonl, line 2"] and "a list where an object" in found["rows.jsonl, line 3"]
    assert found["rows.jsonl, line 6"] == "'generations' is not a list of texts"
    assert "is not a list of true and false" in found["rows.jsonl, line 7"]
    assert "bad row: rows.jsonl, line 2: not JSON" in printed
    assert {line["rejected"] for line in lines(tmp_path / "out" / "pairs.jsonl")} == {"wrong", "?"}


def test_only_the_first_bad_rows_are_shown(capsys, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", [row("a"), *["{"] * 30])
    report, printed = prepare(capsys, tmp_path / "out", path)
    assert report["dropped"]["bad_row"] == len(lines(tmp_path / "out" / "bad_rows.jsonl")) == 30
    assert printed.count("bad row: rows.jsonl") == 20 and "more of them are only in bad_rows.jsonl" in printed


def test_parquet_files_of_a_folder_give_what_json_lines_give(capsys, tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [row(str(number), other=number) for number in range(150)] + lines(FIXTURE)
    folder = tmp_path / "parquet" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        table = pyarrow.Table.from_pylist(rows[part * 60 : (part + 1) * 60])
        pyarrow.parquet.write_table(table, folder / f"train-{part}.parquet")
    (tmp_path / "parquet" / "dataset_infos.json").write_text("{}")
    prepare(capsys, tmp_path / "a", folder.parent)
    prepare(capsys, tmp_path / "b", write(tmp_path / "rows.jsonl", rows))
    for name in ("positives.jsonl", "pairs.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert len(lines(tmp_path / "a" / "pairs.jsonl")) == 153


def test_a_data_set_that_the_hub_library_reads(capsys, tmp_path, monkeypatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: Any, split: str) -> Any:
        asked.append((name, config, split, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_list(lines(FIXTURE))

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare(capsys, tmp_path / "a", "open-r1/OpenR1-Math-Raw")
    prepare(capsys, tmp_path / "b", FIXTURE)
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (tmp_path / "b" / "pairs.jsonl").read_bytes()
    assert asked == [("open-r1/OpenR1-Math-Raw", None, "train", True)], "only from the cache without --allow-download"


def test_a_hub_name_that_is_not_there_says_what_to_do(capsys, tmp_path) -> None:
    _, printed = prepare(capsys, tmp_path / "out", "open-r1/OpenR1-Math-Raw", code=2)
    assert "not in the local cache: add --allow-download" in printed and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"problem": ...}, [], "no column for 'problem': none of problem, question. There are: answer, source"),
        ({"problem_is_valid": ...}, [], "--columns valid=NAME"),
        ({"correctness": {"llama": [True]}}, [], "There are: problem, answer"),
        ({}, ["--columns", "llama=corectness.llama_verification"], "Did you mean 'correctness.llama_verification'?"),
        ({}, ["--columns", "judge=x"], "judge=x: no such role. The roles: problem, answer, generations, llama"),
        ({}, ["--columns", "llama"], "--columns llama: write role=column"),
        ({}, ["--columns", "generations="], "--columns generations=: it is needed"),
        ({}, ["--columns", "llama=source", "--verifiers", "regrade"], "llama=source: no such role"),
        ({}, ["--limit", "0"], "--limit 0: give at least 1"),
        ({}, ["--verifiers", "regrade", "--workers", "0"], "--workers 0: give at least 1"),
        ({}, ["--drop-contaminated"], "--drop-contaminated: against what?"),
        ({}, ["--drop-contaminated", "5", "--against", str(FIXTURE)], "--drop-contaminated 5: a share lies in 0"),
        ({}, ["--against", "/none.jsonl"], "/none.jsonl does not exist"),
        ({}, ["--tokenizer", "/none"], "--tokenizer '/none': there is no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_message_and_leaves_nothing(columns, arguments, message, capsys, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", [row("a", **columns)])
    _, printed = prepare(capsys, tmp_path / "out", path, *arguments, code=2)
    assert message in printed and printed.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content"), [("a.csv", "x"), ("a.parquet", "x"), ("a.jsonl", "\n"), ("a.json", "{")])
def test_a_file_that_holds_no_rows_is_refused(name, content, capsys, tmp_path) -> None:
    (tmp_path / name).write_text(content)
    _, printed = prepare(capsys, tmp_path / "out", tmp_path / name, code=2)
    assert str(tmp_path / name) in printed


def test_columns_can_be_named_and_their_filters_turned_off(capsys, tmp_path) -> None:
    other = {"problem": ..., "prompt": "Why?", "correctness": ..., "problem_is_valid": ..., "source": "cn_k12"}
    path = write(tmp_path / "rows.jsonl", [row("a", **other, ok=[1, 0])])
    mapping = ["--columns", "problem=prompt", "llama=ok", "math_verify=ok", "valid=", "source="]
    prepare(capsys, tmp_path / "out", path, *mapping)
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (pair["problem"], pair["chosen"], pair["rejected"]) == ("Why?", "wrong", "right")


def test_either_lets_one_verifier_decide_where_the_other_never_did(capsys, tmp_path) -> None:
    labels = {"llama_verification": None, "math_verify_reparsed_answer": [True, False]}
    path = write(tmp_path / "rows.jsonl", [row("a", correctness=labels)])
    report, _ = prepare(capsys, tmp_path / "both", path)
    assert report["dropped"]["label_lengths"] == 1
    prepare(capsys, tmp_path / "either", path, "--verifiers", "either")
    assert [pair["chosen"] for pair in lines(tmp_path / "either" / "pairs.jsonl")] == ["wrong"]


def test_a_generation_without_text_is_neither_chosen_nor_rejected(capsys, tmp_path) -> None:
    labels = [False, True, True, False]
    both = {"llama_verification": labels, "math_verify_reparsed_answer": labels}
    prepare(
        capsys,
        tmp_path / "out",
        write(tmp_path / "r.jsonl", [row("a", correctness=both, generations=["", " ", "r", "w"])]),
    )
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("r", "w")


def test_an_id_that_repeats_gets_the_number_of_its_row(capsys, tmp_path) -> None:
    path = write(tmp_path / "rows.jsonl", [row("a"), row("b"), row("a"), row(None), row("a#2")])
    prepare(capsys, tmp_path / "out", path)
    ids = {line["row"]: line["id"] for line in lines(tmp_path / "out" / "positives.jsonl")}
    assert ids == {0: "a", 1: "b", 2: "a#2", 3: "3", 4: "a#2#4"}


def test_a_folder_that_holds_data_is_replaced_only_when_asked(capsys, tmp_path) -> None:
    out = tmp_path / "out"
    prepare(capsys, out, write(tmp_path / "a.jsonl", [row("a"), "{"]))
    before = (out / "positives.jsonl").read_bytes()
    other = write(tmp_path / "b.jsonl", [row("b")])
    _, printed = prepare(capsys, out, other, code=2)
    assert f"--out {out} already holds positives.jsonl, pairs.jsonl, bad_rows.jsonl" in printed
    assert (out / "positives.jsonl").read_bytes() == before
    prepare(capsys, out, other, "--overwrite")
    assert [line["id"] for line in lines(out / "positives.jsonl")] == ["b"]
    assert not (out / "bad_rows.jsonl").exists(), "of the data that was replaced"


def test_contamination_is_counted_and_dropped_only_when_asked(capsys, tmp_path) -> None:
    shared = "How many ways are there to seat nine people at a round table?"
    rows = [row("same", problem=shared.upper()), row("near", problem=f"Today: {shared} Explain."), row("other")]
    rows.append(row("phrase", problem="How many ways are there to seat nine dogs?"))
    path = write(tmp_path / "rows.jsonl", rows)
    against = ["--against", write(tmp_path / "eval.jsonl", [{"id": "e1", "problem": shared}])]
    report, printed = prepare(capsys, tmp_path / "a", path, *against)
    (found,) = report["contamination"]["sets"]
    assert (found["rows_with_same_text"], found["rows_with_shared_8gram"], found["problems_found"]) == (1, 3, ["e1"])
    assert found["rows_with_half_of_8grams"] == 2
    assert report["positives"] == 4 and "1 problems: 1 rows have the text of one, 2 at least half" in printed
    assert {line["id"] for line in lines(tmp_path / "a" / "contaminated.jsonl")} == {"same", "near", "phrase"}
    for share, kept in (((), {"other"}), ((0.5,), {"other", "phrase"})):
        out = tmp_path / f"b{len(share)}"
        report, _ = prepare(capsys, out, path, *against, "--drop-contaminated", *share)
        assert report["dropped"]["contaminated"] == 4 - len(kept)
        assert {line["id"] for line in lines(out / "positives.jsonl")} == kept


class ByLength:
    """Calls a response right where it has as many characters as the answer says."""

    def labels(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]) -> list[list[bool | None]]:
        return [[len(text) == int(p.answer or 0) for text in said] for p, said in zip(prompts, responses, strict=True)]


def test_regrading_asks_the_grader_and_needs_no_labels(tmp_path) -> None:
    rows = [row(str(number), correctness=..., generations=["four", "seven77", "x"], answer="7") for number in range(70)]
    path = write(tmp_path / "rows.jsonl", [*rows, row("none", correctness="none", answer=None)])
    arguments = ["data", "openr1", str(path), "--out", str(tmp_path / "out"), "--verifiers", "regrade"]
    prepare_openr1(cli.build_parser().parse_args(arguments), ByLength())
    pairs = lines(tmp_path / "out" / "pairs.jsonl")
    assert len(pairs) == 70 and {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("seven77", "four")}


def test_a_response_past_its_deadline_is_neither_chosen_nor_rejected(capsys, tmp_path, monkeypatch) -> None:
    class Pool:
        """Never ends with a text that begins with "late"."""

        num_timeouts = 0

        def __init__(self, config: Any) -> None:
            pass

        async def start(self) -> None:
            pass

        async def grade(self, prompt: Prompt, texts: Sequence[str]) -> list[Grade]:
            return [Grade(reward=0, correct=text == "right", timed_out=text.startswith("late")) for text in texts]

        async def close(self) -> None:
            pass

    monkeypatch.setattr("fastreason.rollout.regrading.GraderPool", Pool)
    rows = [row("a", generations=["late", "wrong", "right"]), row("b", generations=["right", "late"])]
    rows.append(row("c", generations=["late", "late too"]))
    report, printed = prepare(capsys, tmp_path / "out", write(tmp_path / "r.jsonl", rows), "--verifiers", "regrade")
    (pair,) = lines(tmp_path / "out" / "pairs.jsonl")
    assert (pair["id"], pair["chosen"], pair["rejected"]) == ("a", "right", "wrong")
    assert (report["dropped"]["no_correct"], report["pairs_dropped"]["no_incorrect"]) == (1, 1)
    assert report["responses_timed_out"] == 4 and "4 responses were not judged in time" in printed


@needs_real
def test_real_generations_by_their_labels_and_by_our_grader(capsys, tmp_path) -> None:
    real = lines(REAL)
    mapping = ["--columns", "llama=correct", "math_verify=correct", "valid="]
    report, _ = prepare(capsys, tmp_path / "labels", REAL, *mapping)
    right = {item["id"]: item["correct"].index(True) for item in real if True in item["correct"]}
    wrong = {item["id"]: item["correct"].index(False) for item in real if False in item["correct"]}
    pairs = lines(tmp_path / "labels" / "pairs.jsonl")
    assert (report["rows"], report["positives"]) == (100, len(right))
    assert {pair["id"]: (pair["chosen_index"], pair["rejected_index"]) for pair in pairs} == {
        id: (right[id], wrong[id]) for id in right.keys() & wrong.keys()
    }
    print(f"{report['rows_per_s']:.0f} rows/s, {len(right)} positives, {len(pairs)} pairs")
    assert 0 < len(pairs) < len(right) < 100, "the file has rows of all kinds"
    assert sum(report["dropped"].values()) == report["dropped"]["no_correct"]
    prepare(capsys, tmp_path / "regraded", REAL, "--verifiers", "regrade", "--limit", 12, "--columns", "valid=")
    regraded = {pair["id"] for pair in lines(tmp_path / "regraded" / "pairs.jsonl")}
    prepare(capsys, tmp_path / "few", REAL, *mapping, "--limit", 12)
    assert regraded == {pair["id"] for pair in lines(tmp_path / "few" / "pairs.jsonl")} and regraded


KILLED = """
import os, signal, sys
from fastreason import cli
from fastreason.data import {module}
inner = {module}.{name}
calls = 0
def killed(*arguments):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments)
{module}.{name} = killed
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("module", "name", "call", "whole"),
    [("openr1", "json_line", 100, set()), ("preparation", "os.replace", 2, {"positives.jsonl"})],
)
def test_a_kill_leaves_no_half_file_and_the_next_try_succeeds(module, name, call, whole, capsys, tmp_path) -> None:
    path, out = write(tmp_path / "rows.jsonl", [row(str(number)) for number in range(300)]), tmp_path / "out"
    program = KILLED.format(module=module, name=name, call=call)
    command = [sys.executable, "-c", program, "data", "openr1", str(path), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {item.name for item in out.iterdir() if item.suffix != ".writing"} == whole
    report, _ = prepare(capsys, out, path, *(["--overwrite"] if whole else []))
    assert report["pairs"] == len(lines(out / "pairs.jsonl")) == 300
    assert not list(out.glob("*.writing"))


def test_an_error_leaves_no_file(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fastreason.data.openr1.json_line", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(capsys, tmp_path / "out", write(tmp_path / "rows.jsonl", [row("a"), "{"]))
    assert list((tmp_path / "out").iterdir()) == []


MEASURED = """
import resource, sys
from fastreason import cli
import fastreason.data.prepare, matplotlib.backends.backend_agg, numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cli.main(sys.argv[1:])
print("grew by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "MiB")
"""


def test_memory_stays_flat(tmp_path) -> None:
    line = json.dumps(
        row(correctness={"llama_verification": [True, False], "math_verify_reparsed_answer": [True, False]})
    )
    (tmp_path / "rows.jsonl").write_text(f"{line}\n" * 100_000)
    command = [
        sys.executable,
        "-c",
        MEASURED,
        "data",
        "openr1",
        str(tmp_path / "rows.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    grown = float(done.stdout.rpartition("grew by")[2].split()[0])
    # The rows as Python objects take 300 MiB, their ids as text 15; numbers and hashes, 24 bytes and one entry a row, are held.
    assert grown < 60, f"{grown:.0f} MiB"
    assert f"{'pairs.jsonl':<44}{100_000:>12,}" in done.stdout


def test_every_filter_is_in_the_fixture() -> None:
    elsewhere = {"bad_row", "contaminated"}
    assert {name for name in ROW_DROPS if EXPECTED["both"]["dropped"][name] == 0} == elsewhere
    assert set(PAIR_DROPS) == {name for name, number in EXPECTED["both"]["pairs_dropped"].items() if number}
