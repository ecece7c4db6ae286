"""`fastreason distill` without an engine: keys that are refused, recipes, recorded responses, a student, a running server."""

import asyncio
import json
import re
import socket
import threading
from pathlib import Path

import pytest
import yaml
from aiohttp import web

from fastreason import cli
from fastreason.distill.section import dump_distill_config, load_distill_config
from fastreason.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if "\ndistill:" in p.read_text()]

pytestmark = pytest.mark.timeout(300)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes a config: that of recorded responses, with sections changed by keyword; None takes a section out."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": "a", "problem": "2 + 2?", "answer": "4", "texts": [r"\boxed{4}", r"\boxed{5}", r"so \boxed{4}", None]},
        {"id": "b", "problem": "1 + 2?", "answer": "3", "texts": [r"\boxed{1}", ""]},
        {"id": "c", "problem": "3 + 3?", "answer": "6", "texts": [r"\boxed{6}"]},
        {"id": "d", "problem": "3 - 3?", "answer": "0", "answer_missing": True, "texts": ["0"]},
        {"id": "a", "problem": "2 + 2?", "answer": "4", "texts": [r"\boxed{7}"]},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**sections):
        raw = {
            "data": {"source": "file", "path": "rows.jsonl", "id_column": "id"},
            "distill": {"responses_column": "texts"},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if section is not None else None
        Path("c.yaml").write_text(yaml.safe_dump({k: v for k, v in raw.items() if v is not None}))
        return "c.yaml"

    return write


def refused(path, *words, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_distill_config(path, list(overrides))
    assert all(word in str(caught.value) for word in words), caught.value


def test_keys_without_an_effect_are_refused_with_what_to_do(make):
    model = {"distill": {"responses_column": None}, "model": {"path": "m"}}
    refused(
        make(**model, rollout={"temperature": 0.6}), "rollout.temperature: has no effect", "Use distill.temperature"
    )
    refused(make(**model, run={"name": "x"}), "run.name: has no effect", "Remove it", "max_restarts")
    refused(make(train={"steps": 3}), "train: unknown key", "distill")
    refused(make(distill={"kep": 3}), "distill.kep: unknown key; did you mean 'keep'?", "held_out")
    refused(make(**model), "model.pth: unknown key; did you mean 'path'?", overrides=["model.pth=x"])
    refused(make(distill={"keep": 0}), "distill.keep=0", "at most")
    refused(make(model={"path": "m"}), "model.path='m'", "distill.responses_column", "Pass model=null")
    refused(make(distill={"url": "http://x"}), "distill.url='http://x'", "one of the two")
    refused(make(distill={"responses_column": None}), "model.path: missing", "distill.url")
    refused(make(distill={"held_out": 5}), "distill.held_out=5", "Set it to 0")
    refused(make(data={"source": "reasoning_gym", "task": "chain_sum"}), "data.source=reasoning_gym", "file or hub")
    refused(make(data={"path": None}), "data.path: missing")
    refused(make(reward={"functions": {"format": 1.0}}), "reward.functions", "Add math")
    refused(ROOT / "configs" / "quickstart.yaml", "no section distill", "configs/mini/distill.yaml")


@pytest.mark.parametrize(
    ("section", "key", "value", "acts_with"),
    [
        ("distill", "samples_per_prompt", 4, "model server"),
        ("distill", "temperature", 0.5, "model server"),
        ("distill", "top_p", 0.5, "model server"),
        ("distill", "top_k", 5, "model server"),
        ("distill", "max_new_tokens", 50, "model server"),
        ("distill", "seed", 5, "model server"),
        ("distill", "concurrency", 5, "model server recorded"),
        ("distill", "student", "s", "model server recorded"),
        ("data", "max_prompt_tokens", 50, "model"),
        ("data", "system_prompt", "Think.", "model server recorded"),
        ("rollout", "engine", "hf", "model"),
        ("rollout", "port", 5000, "model"),
        ("rollout", "temperature", 0.5, ""),
        ("rollout", "request_timeout_s", 50, "model server"),
        ("run", "max_restarts", 5, "model"),
        ("run", "seed", 5, ""),
    ],
)
def test_a_key_is_accepted_where_it_acts(make, section, key, value, acts_with):
    sources = {
        "model": {"distill": {"responses_column": None}, "model": {"path": "m"}},
        "server": {"distill": {"responses_column": None, "url": "http://x"}},
        "recorded": {},
    }
    for name, sections in sources.items():
        path = make(**{**sections, section: {**sections.get(section, {}), key: value}})
        if name in acts_with.split():
            assert getattr(getattr(load_distill_config(path), section), key) == value
            continue
        who = {"model": "fastreason distill", "server": "distill.url", "recorded": "distill.responses_column"}[name]
        refused(path, f"{section}.{key}: has no effect", who)
        if name == "recorded":
            refused(path, "Remove it")


def test_the_folder_of_a_run_is_the_model_that_it_has_trained(make, capsys):
    path = make(
        distill={"responses_column": None}, model={"path": "run"}, data={"id_column": None}, rollout={"engine": "hf"}
    )
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: {}")
    assert cli.main(["distill", path, "--out", "out", "--dry-run"]) == 2
    assert "a run's folder without a trained model" in capsys.readouterr().err
    Path("run/model").mkdir()
    Path("run/model/config.json").write_text('{"max_position_embeddings": 1500}')
    assert cli.main(["distill", path, "--out", "out", "--dry-run"]) == 2
    assert "max_position_embeddings=1500" in capsys.readouterr().err, "the model that is in it is looked at"
    assert cli.main(["distill", path, "--out", "out", "--dry-run", "distill.max_new_tokens=400"]) == 0
    assert f"path: {Path('run/model').resolve()}" in capsys.readouterr().out


def test_a_resolved_config_reads_back_equal(make):
    for path in [make(), *RECIPES]:
        config = load_distill_config(path)
        Path("again.yaml").write_text(dump_distill_config(config))
        assert load_distill_config("again.yaml") == config


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_passes_a_dry_run_without_a_network(path, tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = path.read_text()
    assert re.match(r"# .+\.\n", text) and max(map(len, text.splitlines())) <= 140
    overrides = []
    if load_distill_config(path).distill.student is not None:
        (tmp_path / "samples.jsonl").touch()
        overrides = [f"distill.student={tmp_path}"]
    out = tmp_path / "out"
    assert cli.main(["distill", str(path), "--out", str(out), "--dry-run", *overrides]) == 0, capsys.readouterr().err
    assert not out.exists() and "max_new_tokens" in capsys.readouterr().out


def test_the_papers_recipes_have_its_numbers():
    read = {path.stem: load_distill_config(path) for path in RECIPES if path.parent.name == "rl_vs_distillation"}
    own, reasoning = read["self_distillation"], read["reasoning_only"]
    assert (own.model.path, own.distill.keep, own.distill.student) == ("Qwen/Qwen2.5-3B", 8, None)
    assert (own.distill.temperature, own.distill.top_k, own.distill.max_new_tokens) == (0.9, 50, 4000)
    assert reasoning.distill.student is not None and reasoning.data.path == own.data.path
    page = (ROOT / "configs" / "README.md").read_text()
    assert all(f"{name}.yaml" in page for name in [*read, "mini/distill"])


def test_recorded_responses_are_verified_selected_and_counted(make, capsys):
    assert cli.main(["distill", make(), "--out", "out"]) == 0, capsys.readouterr().err
    verdicts = {(row["id"], row["sample"]): row["correct"] for row in lines(Path("out/samples.jsonl"))}
    assert verdicts == {
        **{("a", 0): True, ("a", 1): False, ("a", 2): True, ("a", 4): False},
        **{("b", 0): False, ("b", 1): False, ("c", 0): True},
    }
    positives = lines(Path("out/positives.jsonl"))
    assert [(row["id"], row["response"]) for row in positives] == [
        ("a#0", r"\boxed{4}"),
        ("a#2", r"so \boxed{4}"),
        ("c#0", r"\boxed{6}"),
    ]
    assert [row["answer"] for row in positives] == ["4", "4", "6"] and positives[0]["problem"] == "2 + 2?"
    (pair,) = lines(Path("out/pairs.jsonl"))
    assert (pair["id"], pair["chosen"], pair["rejected"]) == ("a", r"\boxed{4}", r"\boxed{5}")
    report = json.loads(Path("out/report.json").read_text())
    for name in ("questions", "responses", "pairs"):
        assert report[name]["in"] - sum(report[name]["dropped"].values()) == report[name]["out"], name
    assert (report["questions"]["in"], report["responses"]["in"], report["responses"]["out"]) == (3, 7, 3)
    assert report["accuracy"]["pass_at_1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert report["arguments"]["distill"]["responses_column"] == "texts"
    printed = capsys.readouterr().out
    assert (
        "0.500" in printed
        and "empty 1, wrong 3" in printed
        and "7 responses in" in printed
        and "out/pairs.jsonl" in printed
    )
    assert not list(Path("out").glob("*.writing"))


def test_a_pair_has_no_blank_side(make):
    rows = [{"id": "a", "problem": "2 + 2?", "answer": "4", "texts": ["", " \n", r"\boxed{5}", r"\boxed{4}"]}]
    path = make()
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["distill", path, "--out", "out"]) == 0
    (pair,) = lines(Path("out/pairs.jsonl"))
    assert (pair["chosen"], pair["rejected"]) == (r"\boxed{4}", r"\boxed{5}")
    dropped = json.loads(Path("out/report.json").read_text())["responses"]["dropped"]
    assert (dropped["empty"], dropped["wrong"]) == (2, 1)


def test_what_is_kept_can_be_chosen_again_without_grading_again(make, capsys):
    cli.main(["distill", make(), "--out", "out"])
    before = Path("out/samples.jsonl").read_bytes()
    assert cli.main(["distill", "c.yaml", "--out", "out"]) == 2
    assert "holds responses already" in capsys.readouterr().err
    assert cli.main(["distill", "--out", "out", "--resume", "distill.keep=1"]) == 0
    assert "7 responses there, 0 to verify" in capsys.readouterr().out
    assert [row["id"] for row in lines(Path("out/positives.jsonl"))] == ["a#0", "c#0"]
    assert Path("out/samples.jsonl").read_bytes() == before
    assert cli.main(["distill", "--out", "out", "--resume", "reward.range=plus_minus_one"]) == 2
    assert "reward.range='zero_one' then, 'plus_minus_one' now" in capsys.readouterr().err
    assert cli.main(["distill", "c.yaml", "--out", "nowhere", "--resume"]) == 2
    assert "nowhere holds no samples.jsonl" in capsys.readouterr().err
    assert cli.main(["distill", "--out", "nowhere"]) == 2
    assert "give a config file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["positives.jsonl", "pairs.jsonl", "report.json", "config.yaml"])
def test_the_files_of_another_command_are_not_replaced(make, capsys, name):
    path = make()
    Path("out").mkdir()
    Path("out", name).write_text("somebody's")
    assert cli.main(["distill", path, "--out", "out"]) == 2
    assert f"out holds {name}" in (error := capsys.readouterr().err) and "choose another folder" in error, error
    assert {item.name: item.read_text() for item in Path("out").iterdir()} == {name: "somebody's"}
    # A sampling of its own that ended before its first response is begun again.
    Path("out", "sampling.json").write_text("{}")
    assert cli.main(["distill", path, "--out", "out"]) == 0


def test_its_own_samples_are_read_with_their_numbers_and_ends(make):
    rows = [
        {
            "id": "a",
            "sample": 5,
            "problem": "p",
            "answer": "4",
            "response": "4",
            "finish_reason": "length",
            "num_tokens": 9,
        },
        {
            "id": "a",
            "sample": 2,
            "problem": "p",
            "answer": "4",
            "response": "4",
            "finish_reason": "stop",
            "num_tokens": 2,
        },
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["distill", make(distill={"responses_column": "response"}), "--out", "out"]) == 0
    found = sorted((row["sample"], row["num_tokens"], row["finish_reason"]) for row in lines(Path("out/samples.jsonl")))
    assert found == [(2, 2, "stop"), (5, 9, "length")]
    assert [row["sample"] for row in lines(Path("out/positives.jsonl"))] == [2], "what was cut off has no end to learn"


@pytest.mark.parametrize(
    ("rows", "column", "words"),
    [
        ([{"problem": "p", "answer": "1", "text": "x"}], "texts", ("no such column", "did you mean 'text'?", "line 1")),
        ([{"problem": "p", "answer": "1", "texts": 7}], "texts", ("'7'", "a text or a list of texts", "line 1")),
        ([{"problem": "p", "answer": "1", "texts": ["x", 7]}], "texts", ("a text or a list of texts",)),
        ([{"id": "a", "problem": "p", "answer": "1", "sample": 0, "texts": "x"}] * 2, "texts", ("line 2", "twice")),
    ],
)
def test_rows_that_hold_no_responses_are_named(make, capsys, rows, column, words):
    rows = [{"id": str(number), **row} for number, row in enumerate(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["distill", make(distill={"responses_column": column}), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def student(folder, *rows):
    Path(folder).mkdir()
    keys = ("id", "problem", "correct")
    text = "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows)
    Path(folder, "samples.jsonl").write_text(text + '{"id": "to')  # its writer was killed


def test_only_questions_that_the_student_has_solved_are_asked(make, capsys):
    solved = [("a", "2 + 2?", right) for right in (False, True, False)]
    student("s", *solved, ("b", "1 + 2?", False), ("z", "other", True))
    assert cli.main(["distill", make(distill={"student": "s"}), "--out", "out"]) == 0, capsys.readouterr().err
    report = json.loads(Path("out/report.json").read_text())
    assert report["questions"] == {
        "in": 3,
        "dropped": {
            "held_out": 0,
            "student_not_asked": 1,
            "student_unsolved": 1,
            "no_response": 0,
            "no_right_response": 0,
        },
        "out": 1,
    }
    assert {row["id"] for row in lines(Path("out/samples.jsonl"))} == {"a"}


def test_a_student_of_other_problems_or_without_a_solved_one_is_refused(make, capsys):
    assert cli.main(["distill", make(distill={"student": "nobody"}), "--out", "out"]) == 2
    assert "distill.student='" in (error := capsys.readouterr().err) and "model.path=STUDENT" in error
    student("s", ("a", "9 + 9?", True))
    assert cli.main(["distill", make(distill={"student": "s"}), "--out", "out"]) == 2
    assert "another problem under the id 'a'" in capsys.readouterr().err
    student("t", ("a", "2 + 2?", False))
    assert cli.main(["distill", make(distill={"student": "t"}), "--out", "out"]) == 2
    assert "no question is left of 3" in (error := capsys.readouterr().err) and "'student_unsolved': 1" in error


class Server:
    """A chat and a completions interface in a thread, with a key: right where the seed is even, cut off where 3 divides it."""

    def __init__(self):
        self.requests, self.url, self.reasoning, self.before = [], "", None, ""
        self.refuses = lambda text: False

    async def models(self, request):
        if request.headers.get("Authorization") != "Bearer hush":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"data": [{"id": "oracle"}]})

    async def answer(self, request):
        body = await request.json()
        self.requests.append({**body, "path": request.path})
        if self.refuses(str(body.get("messages") or body.get("prompt"))):
            return web.json_response({"error": "longer than the context"}, status=400)
        text = f"{self.before}\\boxed{{{4 + body['seed'] % 2}}}"
        end = "length" if body["seed"] % 3 == 0 else "stop"
        message = {
            "message": {"content": text, "reasoning_content": self.reasoning},
            "text": text,
            "finish_reason": end,
        }
        return web.json_response({"choices": [message], "usage": {"completion_tokens": 11}})

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        async def serve():
            app = web.Application()
            app.add_routes([web.get("/v1/models", self.models), web.post("/v1/{path:.*}", self.answer)])
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            self._stop = asyncio.Event()
            ready.set()
            await self._stop.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


def served(make, server, **distill):
    rows = [{"id": id, "problem": f"{id}: 2 + 2?", "answer": "4"} for id in "abc"]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"responses_column": None, "url": server.url, "samples_per_prompt": 4, "max_new_tokens": 32, "top_p": 0.9}
    return make(distill={**told, **distill}, data={"system_prompt": "Think.", "user_template": "{problem}!"})


def test_a_running_server_is_asked_with_its_key_and_a_seed_for_each_response(make, capsys, monkeypatch):
    with Server() as server:
        path = served(make, server)
        assert cli.main(["distill", path, "--out", "out"]) == 1
        assert "FASTREASON_TEACHER_KEY" in capsys.readouterr().err
        monkeypatch.setenv("FASTREASON_TEACHER_KEY", "hush")
        assert cli.main(["distill", path, "--out", "out"]) == 0, capsys.readouterr().err
        assert len(server.requests) == len({request["seed"] for request in server.requests}) == 12
        asked = server.requests[0]
        assert (asked["model"], asked["temperature"], asked["top_p"], asked["max_tokens"]) == ("oracle", 1.0, 0.9, 32)
        assert asked["path"] == "/v1/chat/completions" and "top_k" not in asked
        assert asked["messages"] == [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "a: 2 + 2?!"},
        ]
        seeds = {request["seed"]: request for request in server.requests}
        rows = lines(Path("out/samples.jsonl"))
        assert sum(row["correct"] for row in rows) == sum(seed % 2 == 0 for seed in seeds)
        assert sum(row["finish_reason"] == "length" for row in rows) == sum(seed % 3 == 0 for seed in seeds)
        assert {row["num_tokens"] for row in rows} == {11}
        # Later, more of each: only the new ones are asked for.
        assert cli.main(["distill", "--out", "out", "--resume", "distill.samples_per_prompt=5"]) == 0
        assert len(server.requests) == 15 and len(lines(Path("out/samples.jsonl"))) == 15
        # And fewer: those beyond are there, and count for nothing.
        assert cli.main(["distill", "--out", "out", "--resume", "distill.samples_per_prompt=2"]) == 0
        assert json.loads(Path("out/report.json").read_text())["responses"]["in"] == 6


def test_a_question_that_the_server_refuses_is_passed_over_for_good(make, capsys, monkeypatch):
    monkeypatch.setenv("FASTREASON_TEACHER_KEY", "hush")
    with Server() as server:
        server.refuses = lambda text: "a: 2" in text  # the first that is asked
        path = served(make, server, samples_per_prompt=2, truncated="keep", concurrency=1)
        assert cli.main(["distill", path, "--out", "out"]) == 0, capsys.readouterr().err
        printed = capsys.readouterr().out
        assert "longer than the context" in printed and "refused 2" in printed
        rows = {(row["id"], row["sample"]): row for row in lines(Path("out/samples.jsonl"))}
        assert len(rows) == 6 and all("longer than the context" in rows["a", number]["refusal"] for number in (0, 1))
        assert not rows["b", 0]["refusal"] and rows["b", 0]["response"]
        report = json.loads(Path("out/report.json").read_text())
        assert report["responses"]["dropped"]["refused"] == 2 and report["questions"]["dropped"]["no_response"] == 1
        right = [[rows[id, number]["correct"] for number in (0, 1)] for id in "bc"]
        assert report["accuracy"]["pass_at_1"] == pytest.approx(sum(map(sum, right)) / 4), (
            "nothing is known of the model"
        )
        assert report["accuracy"]["num_questions"] == 2
        num = len(server.requests)
        assert cli.main(["distill", "--out", "out", "--resume"]) == 0 and len(server.requests) == num
        # One that refuses whatever it is asked has been asked wrongly: nothing is written down.
        server.refuses = lambda text: True
        assert cli.main(["distill", path, "--out", "none"]) == 1
        assert "Does its longest sequence hold" in capsys.readouterr().err
        assert Path("none/samples.jsonl").read_text() == ""


def test_a_servers_divided_response_is_put_together_and_raw_text_goes_to_completions(make, monkeypatch):
    monkeypatch.setenv("FASTREASON_TEACHER_KEY", "hush")
    with Server() as server:
        server.reasoning = "let me see\n"
        assert cli.main(["distill", served(make, server, samples_per_prompt=1), "--out", "out"]) == 0
        texts = {row["response"] for row in lines(Path("out/samples.jsonl"))}
        assert texts <= {f"<think>\nlet me see\n</think>\n\n\\boxed{{{n}}}" for n in (4, 5)}
        # A server that divides nothing, of a template that opens the thought in the prompt.
        server.reasoning, server.before = None, "let me see\n</think>\n\n"
        assert cli.main(["distill", served(make, server, samples_per_prompt=1), "--out", "whole"]) == 0
        assert {row["response"] for row in lines(Path("whole/samples.jsonl"))} <= texts
        path = served(make, server, samples_per_prompt=1, top_k=20)
        overrides = ["data.chat_template=false", "data.system_prompt=null"]
        assert cli.main(["distill", path, "--out", "raw", *overrides]) == 0
        asked = server.requests[-1]
        assert asked["path"] == "/v1/completions" and asked["prompt"].endswith(": 2 + 2?!") and asked["top_k"] == 20
