"""Problems from generated tasks, files and hub-like folders, and the message for everything that can be wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastreason.config import DataConfig
from fastreason.data import check_data, load_problems
from fastreason.errors import ConfigError, DataError, FastreasonError

ROWS = [{"problem": "1 + 1", "answer": "2", "id": "a"}, {"problem": "2 + 2", "answer": 4, "id": "b"}]


def file_config(path: Path, **keys: Any) -> DataConfig:
    return DataConfig(source="file", path=str(path), **keys)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_generated_problems_are_different_and_repeatable() -> None:
    config = DataConfig(task="chain_sum", num_prompts=300, seed=5)
    problems = load_problems(config)
    assert len({p.text for p in problems}) == len({p.id for p in problems}) == len(problems) == 300
    assert load_problems(config) == problems
    assert load_problems(config.model_copy(update={"seed": 6}))[0].text != problems[0].text
    expression = problems[0].metadata["entry"]["metadata"]["expression"]
    assert problems[0].text == f"State the final answer to the following arithmetic problem: {expression} ="
    assert str(eval(expression)) == problems[0].answer
    json.dumps([p.metadata for p in problems])


def test_an_exhausted_task_gives_what_it_has(caplog: pytest.LogCaptureFixture) -> None:
    one_digit = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    problems = load_problems(DataConfig(task="chain_sum", task_args=one_digit))
    # Ten digits, ten digits, two operators.
    assert len({p.text for p in problems}) == len(problems) == 200
    assert "gave 200 different problems of the 2000" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "chain_sums"}, r"data\.task='chain_sums'.*did you mean 'chain_sum'"),
        ({"task": "qqqqqqq"}, r"has \d+, e\.g\. 'chain_sum'"),
        ({"task_args": {"max_term": 3}}, r"data\.task_args\.max_term.*did you mean 'max_terms'"),
        ({"task_args": {"min_terms": 9, "max_terms": 2}}, "max_terms must be >= min_terms"),
        ({"task_args": {"min_terms": "two"}}, "refuses them"),
        ({"task_args": {"seed": 1}}, r"data\.task_args\.seed=1: set data\.seed"),
        ({"task_args": {"size": 1}}, r"set data\.num_prompts"),
    ],
)
def test_a_wrong_task_is_found_by_the_check_and_by_loading(keys: dict[str, Any], message: str) -> None:
    config = DataConfig(**({"task": "chain_sum"} | keys))
    for function in (check_data, load_problems):
        with pytest.raises(ConfigError, match=message):
            function(config)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_files_of_each_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data.{ending}"
    rows = [{**row, "answer": str(row["answer"]), "level": 3} for row in ROWS]
    if ending == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        write_lines(path, rows)
    first, second = load_problems(file_config(path, id_column="id"))
    assert (first.id, first.text, first.answer, first.metadata) == ("a", "1 + 1", "2", {"level": 3})
    assert (second.id, second.text, second.answer) == ("b", "2 + 2", "4")
    assert [p.id for p in load_problems(file_config(path))] == ["0", "1"]
    assert load_problems(file_config(path))[0].metadata == {"level": 3, "id": "a"}
    assert check_data(file_config(path)) == []


def test_columns_are_mapped_and_numbers_written_out(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"q": "x?", "a": 27.0}, {"q": "y?", "a": 0.5}, {"q": 12, "a": -3}])
    config = file_config(path, problem_column="q", answer_column="a")
    assert [(p.text, p.answer) for p in load_problems(config)] == [("x?", "27"), ("y?", "0.5"), ("12", "-3")]
    assert [p.answer for p in load_problems(file_config(path, problem_column="q", answer_column=None))] == [None] * 3
    assert len(load_problems(file_config(path, problem_column="q", answer_column="a", num_prompts=2))) == 2


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    missing = {"problem": "?", "answer": "", "answer_missing": True}
    path = write_lines(tmp_path / "d.jsonl", [ROWS[0], missing, {**ROWS[1], "answer_missing": False}])
    assert [p.id for p in load_problems(file_config(path))] == ["0", "2"]
    assert "dropped 1 row" in caplog.text
    with pytest.raises(DataError, match=r"no problem \(1 row"):
        load_problems(file_config(write_lines(tmp_path / "none.jsonl", [missing])))


def test_what_cannot_travel_stays_behind(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"problem": "a\\ud800b", "answer": "1", "long": "%s", "nan": NaN, "level": 2}\n' % ("x" * 30_000))
    (problem,) = load_problems(file_config(path))
    assert problem.metadata == {"level": 2} and problem.text == "a?b"


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("", {}, "holds no problem"),
        ("\n\n", {}, "holds no problem"),
        ('{"problem": "1", "answer": "1"}\n{oops\n', {}, r"line 2 is not JSON"),
        ('[1]\n', {}, r"line 1 holds a list; each row must be an object"),
        ('{"question": "1", "answer": "1"}\n', {}, r"data\.problem_column='problem'.*it has: question, answer"),
        ('{"problems": "1", "answer": "1"}\n', {}, r"did you mean 'problems'"),
        ('{"problem": "1"}\n', {}, r"data\.answer_column='answer'.*data\.answer_column=null"),
        ('{"problem": "1", "answer": null}\n', {}, r"data\.answer_column.*line 1.*is empty.*answer_missing: true"),
        ('{"problem": "1", "answer": ["1", "2"]}\n', {}, r"is a list.*text or a number"),
        ('{"problem": "1", "answer": true}\n', {}, r"is a bool"),
        ('{"problem": " ", "answer": "1"}\n', {}, r"data\.problem_column.*is empty"),
        ('{"problem": "1", "answer": "1", "id": 7}\n{"problem": "2", "answer": "2", "id": "7"}\n', {"id_column": "id"},
         r"the id '7' is in line 1 and in line 2"),
        ('{"problem": "1", "answer": "1"}\n', {"id_column": "key"}, r"data\.id_column='key'"),
        (b"\xff\xfe{", {}, "cannot be read"),
    ],
)  # fmt: skip
def test_wrong_rows(tmp_path: Path, content: str | bytes, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for function in (load_problems, check_data):
        with pytest.raises(DataError, match=message):
            function(file_config(path, **keys))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", '{"problem": "1"}', "holds a dict; a .json file must hold a list"),
        ("d.json", '{"problem": "1"}\n{"problem": "2"}', r"One object a line\? Name it \.jsonl"),
        ("d.csv", "problem,answer", r"the ending must be one of \.jsonl, \.json, \.parquet"),
        ("d.parquet", "not parquet", "not a readable parquet file"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_problems(file_config(tmp_path / name))


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"does not exist.*Did you mean '.*train\.jsonl'"):
        load_problems(file_config(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        load_problems(file_config(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        load_problems(file_config(tmp_path / "nowhere" / "x.jsonl"))


def test_the_check_reads_only_the_first_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [ROWS[0]] * 50)
    path.write_text(path.read_text() + "{broken\n")
    assert check_data(file_config(path)) == []
    with pytest.raises(DataError, match="line 51"):
        load_problems(file_config(path))


def test_a_system_prompt_needs_the_chat_template() -> None:
    with pytest.raises(ConfigError, match=r"data\.system_prompt.*chat_template=false"):
        check_data(DataConfig(task="chain_sum", system_prompt="Be brief.", chat_template=False))


def test_a_hub_name_is_unchecked_without_the_network() -> None:
    (sentence,) = check_data(DataConfig(source="hub", path="nobody/nothing"))
    assert "nobody/nothing" in sentence and "unchecked" in sentence


def test_a_local_folder_is_read_by_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"problem": "1 + 1", "answer": "2"}])
    problems = load_problems(DataConfig(source="hub", path=str(folder)))
    assert [(p.text, p.answer) for p in problems] == [("1 + 1", "2")]
    with pytest.raises(DataError, match=r"data\.split='test'.*Check data\.path, data\.hub_config and data\.split"):
        load_problems(DataConfig(source="hub", path=str(folder), split="test"))


def test_a_hub_set_that_is_not_cached_is_not_downloaded() -> None:
    with pytest.raises(DataError, match=r"nobody/nothing.*data\.allow_download=true"):
        load_problems(DataConfig(source="hub", path="nobody/nothing"))
    import datasets
    import huggingface_hub

    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_modules_are_light() -> None:
    code = (
        "import sys, fastreason.data, fastreason.rewards; "
        "heavy = {'torch', 'transformers', 'vllm', 'deepspeed', 'datasets', 'pyarrow'} | {'reasoning_gym', 'math_verify'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_the_projects_own() -> None:
    assert issubclass(DataError, FastreasonError) and issubclass(ConfigError, FastreasonError)
