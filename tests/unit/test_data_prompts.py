"""Prompts from sources of every shape: answers found, doubles and long ones dropped, evaluation problems found."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from prepared_data import lines, save_word_tokenizer, write

from fastreason import cli
from fastreason.config import DataConfig
from fastreason.data import load_problems
from fastreason.data.contamination import Contamination
from fastreason.data.lengths import Lengths

FOLDER = Path(os.environ.get("FASTREASON_DATA", "/nonexistent"))
needs_real = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="FASTREASON_DATA does not name the folder with the public data sets"
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than everything else."""
    monkeypatch.setattr(Lengths, "draw", lambda *_: None)


def prepare(
    capsys: pytest.CaptureFixture[str], out: Path, *arguments: Any, kind: str = "prompts", code: int = 0
) -> tuple[Any, str]:
    capsys.readouterr()
    result = cli.main(["data", kind, *map(str, arguments), "--out", str(out)])
    said = capsys.readouterr()
    assert result == code, said.err
    return (json.loads((out / "report.json").read_text()) if code == 0 else None), said.out + said.err


GSM8K = {"question": "Ann has 4.", "answer": "2 * 618 = <<2*618=1236>>1236\n#### 1,236"}
MATH = {"problem": "P", "solution": "So \\boxed{1}, thus \\boxed{\\frac{1}{2}}.", "level": "Level 5", "type": "Algebra"}
NUMINA = {"source": "amc", "problem": "P", "solution": "\\boxed{3}", "messages": [{"role": "user", "content": "P"}]}
DEEPSCALER = {"problem": "P", "answer": "7", "solution": "\\boxed{8}"}


@pytest.mark.parametrize(
    ("row", "shape", "answer"),
    [(GSM8K, "gsm8k", "1236"), (MATH, "math", "\\frac{1}{2}"), (NUMINA, "numina", "3"), (DEEPSCALER, "deepscaler", "7"),
     (DEEPSCALER | {"answer": None}, "deepscaler", "8"), (DEEPSCALER | {"answer": 12.0}, "deepscaler", "12")],
)  # fmt: skip
def test_the_shape_is_told_by_the_columns(row, shape, answer, capsys, tmp_path) -> None:
    report, printed = prepare(capsys, tmp_path / "out", write(tmp_path / "a.jsonl", [row]))
    (line,) = lines(tmp_path / "out" / "prompts.jsonl")
    assert report["shape"] == shape and f"read as: {shape}" in printed
    assert (line["id"], line["problem"], line["answer"]) == ("0", row.get("problem", row.get("question")), answer)
    assert line.get("level") == row.get("level") and line.get("source") == row.get("source")


def test_what_is_written_is_what_training_reads(capsys, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [GSM8K, GSM8K | {"question": "Bob has 5."}])
    prepare(capsys, tmp_path / "out", path)
    config = DataConfig(source="file", path=str(tmp_path / "out" / "prompts.jsonl"), id_column="id")
    problems = load_problems(config)
    assert [(p.id, p.text, p.answer) for p in problems] == [("0", "Ann has 4.", "1236"), ("1", "Bob has 5.", "1236")]


def test_every_filter_drops_its_row_and_the_counts_add_up(capsys, tmp_path) -> None:
    contaminated = "What is the sum of the first one hundred odd numbers?"
    good = {"problem": "Good one", "answer": "1", "problem_is_valid": "Yes"}
    rows: list[Any] = [good, "{", good | {"problem": ["x"]}, good | {"problem": "b", "problem_is_valid": "No"}]
    rows += [good | {"problem": " "}, good | {"problem": "c", "answer": "proof"}, good | {"problem": "d", "answer": ""}]
    rows += [good | {"problem": "e", "answer_missing": True}, good | {"problem": "GOOD  one"}]
    rows += [good | {"problem": contaminated}, good | {"problem": "Last one"}]
    against = ["--against", write(tmp_path / "e.jsonl", [{"problem": contaminated + " Say."}]), "--drop-contaminated"]
    report, printed = prepare(capsys, tmp_path / "out", write(tmp_path / "a.jsonl", rows), *against)
    assert report["dropped"] == {
        "bad_row": 2, "problem_not_valid": 1, "no_problem": 1, "no_answer": 3, "prompt_too_long": 0, "repeated": 1,
        "contaminated": 1,
    }  # fmt: skip
    assert report["rows"] == 11 and report["prompts"] == 2
    assert [line["problem"] for line in lines(tmp_path / "out" / "prompts.jsonl")] == ["Good one", "Last one"]
    assert len(lines(tmp_path / "out" / "bad_rows.jsonl")) == 2 and "a.jsonl, line 2" in printed


def test_long_prompts_are_dropped_as_training_renders_them(capsys, tmp_path) -> None:
    # Two words more than the problem.
    template = "user {% for m in messages %}{{ m.content }}{% endfor %} assistant"
    words = save_word_tokenizer(tmp_path / "words", template)
    path = write(tmp_path / "a.jsonl", [{"problem": "one two three", "answer": 1}, {"problem": "one two", "answer": 1}])
    for most, kept in ((5, 2), (4, 1)):
        limits = ["--tokenizer", words, "--max-prompt-tokens", most]
        report, _ = prepare(capsys, tmp_path / str(most), path, *limits)
        assert report["prompts"] == kept and report["dropped"]["prompt_too_long"] == 2 - kept
    assert report["lengths"]["prompt"]["max"] == 4


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"text": "x", "label": 1}, [], "the columns fit no known source (gsm8k: question and answer; deepscaler:"),
        ({"text": "x", "label": 1}, [], "There are: text, label. Rename them."),
        (DEEPSCALER, ["--shape", "gsm8k"], "no known source (gsm8k: question and answer). There are: problem"),
        (DEEPSCALER, ["--max-response-tokens", "3"], "unrecognized arguments"),
    ],
)
def test_an_unknown_shape_is_one_message(row, arguments, message, capsys, tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    try:
        _, printed = prepare(capsys, tmp_path / "out", path, *arguments, code=2)
    except SystemExit as refused:
        assert refused.code == 2
        printed = capsys.readouterr().err
    assert message in printed and not (tmp_path / "out").exists()


def test_math_in_its_original_form_a_file_a_problem(capsys, tmp_path) -> None:
    for subject in ("algebra", "geometry"):
        (tmp_path / "train" / subject).mkdir(parents=True)
        for number in range(3):
            row = MATH | {"problem": f"{subject} {number}"}
            (tmp_path / "train" / subject / f"{number}.json").write_text(json.dumps(row, indent=1))
    report, _ = prepare(capsys, tmp_path / "out", tmp_path / "train", kind="math")
    assert report["shape"] == "math" and report["prompts"] == 6
    assert lines(tmp_path / "out" / "prompts.jsonl")[3]["problem"] == "geometry 0"
    _, printed = prepare(capsys, tmp_path / "no", write(tmp_path / "a.jsonl", [GSM8K]), kind="math", code=2)
    assert "(math: problem and solution)" in printed


def test_what_counts_as_the_same_text_and_as_a_shared_8gram(tmp_path) -> None:
    rows = [{"id": "long", "problem": "a b c $d$ e f g h i"}, {"id": "short", "question": "", "problem": "x y"}]
    rows.append({"id": "longer", "problem": "b c d e f g h i j k l m n"})
    found = Contamination([str(write(tmp_path / "e.jsonl", rows))])
    assert [(m.problem_id, m.same_text, m.share) for m in found.find("A  b c,\nd e f g h i?")] == [("long", True, 1.0)]
    # Each has one of two, and one of six 8-grams.
    assert [(m.problem_id, m.same_text, m.share) for m in found.find("z b c d e f g h i z")] == [("long", False, 0.5)]
    assert [(m.problem_id, m.share) for m in found.find("z b c d e f g h i j k z")] == [("long", 0.5)]
    assert [(m.problem_id, m.share) for m in found.find("z b c d e f g h i j k l m z")] == [("longer", 0.833)]
    assert [(m.problem_id, m.share) for m in found.find("z c d e f g h i j z")] == [("longer", 0.167)]
    assert found.find("b c d e f g h z") == [], "seven words in a row"
    assert [(m.problem_id, m.same_text) for m in found.find("X: Y.")] == [("short", True)]
    assert found.find("x y z") == [], "a short problem is found by its whole text only"
    (report,) = found.report()
    assert report | {"file": ""} == {
        "file": "", "problems": 3, "rows_with_same_text": 2, "rows_with_shared_8gram": 6, "rows_with_half_of_8grams": 5,
        "problems_found": ["long", "longer", "short"],
    }  # fmt: skip


@needs_real
@pytest.mark.parametrize(
    ("name", "rows", "no_answer", "repeated", "same_text", "half"),
    [("math_train", 7500, 2, 1, 1, 57), ("gsm8k_train", 7473, 0, 0, 0, 0), ("deepscaler_level1", 7961, 0, 201, 1, 19)],
)
def test_real_sources_become_prompts(name, rows, no_answer, repeated, same_text, half, capsys, tmp_path) -> None:
    path, against = FOLDER / f"{name}.jsonl", FOLDER / "math500.jsonl"
    if not (path.is_file() and against.is_file()):
        pytest.skip(f"FASTREASON_DATA has no {name}.jsonl or no math500.jsonl")
    report, _ = prepare(capsys, tmp_path / name, path, "--against", against)
    print(f"{name}: {report['rows_per_s']:.0f} rows/s")
    dropped = {filter: number for filter, number in report["dropped"].items() if number}
    assert dropped == {key: n for key, n in (("no_answer", no_answer), ("repeated", repeated)) if n}
    assert report["rows"] == rows and report["prompts"] == rows - no_answer - repeated
    (found,) = report["contamination"]["sets"]
    assert (found["rows_with_same_text"], found["rows_with_half_of_8grams"]) == (same_text, half)
