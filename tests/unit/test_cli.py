"""The command line as a user meets it: help, exit codes, and a dry run that touches nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fastreason import cli
from fastreason.checkpoint import CheckpointStore, TrainerState
from fastreason.config import load_config
from fastreason.data.traces import TraceReport
from fastreason.errors import ConfigError, EngineError
from fastreason.preflight import anchor_paths, settle_dtypes
from fastreason.replay import REPLAYED, write_batch
from fastreason.run_folder import held
from fastreason.types import Grade, Group, Prompt, Sample

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config file in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    raw = {
        "model": {"path": "model"},
        "data": {"task": "chain_sum", "num_prompts": 20},
        "rollout": {"engine": "fake"},
        "train": {"steps": 3, "prompts_per_step": 2},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_the_help_lists_the_commands_and_not_the_hidden_one(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert (
        all(name in text for name in ("train", "report", "doctor"))
        and "fastreason train configs/quickstart.yaml" in text
    )
    assert "_process" not in text and "SUPPRESS" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_help_of_train_names_its_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in ("--dry-run", "--resume", "--only", "--groups", "key=value", "quickstart.yaml"))


def test_no_command_is_bad_input(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give a config file"),
        (["train", "none.yaml"], "'none.yaml' does not exist"),
        (["train", "c.yaml", "train.lr"], "'train.lr' is not of the form section.key=value"),
        (["train", "c.yaml", "train.steps=0"], "train.steps=0"),
        (["train", "c.yaml", "trian.steps=1"], "did you mean 'train'"),
        (["train", "c.yaml", "model.path=./none", "--dry-run"], "model.path='./none'"),
        (["train", "c.yaml", "data.task=none"], "data.task='none'"),
        (["train", "--resume", "none"], "--resume none: no run there"),
        (["train", "c.yaml", "eval.num_prompts=20"], "eval.num_prompts=20"),
        (["train", "c.yaml", "--groups", "g"], "--groups g: only --only train"),
        (["train", "c.yaml", "--only", "rollout", "--groups", "g"], "--groups g: only --only train"),
        (["train", "c.yaml", "--only", "train"], "--only train: give the groups"),
        (["train", "c.yaml", "--only", "train", "--groups", "none"], "/none: no batch(es) there, train.steps=3"),
        (["train", "c.yaml", "--only", "train", "--groups", "g", "eval.num_prompts=4"], "Pass eval.num_prompts=0"),
        (["train", "--resume", "run", "--only", "rollout"], "--only rollout cannot be resumed"),
        (["report", "run", "none"], "none: no run there"),
    ],
)
def test_bad_input_ends_with_2_and_one_clear_message(config, capsys, arguments, message):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err
    assert "Traceback" not in printed.err
    assert not Path("runs").exists(), "a run that never started left a folder"


def test_unknown_options_are_bad_input(config, capsys):
    for others in (["--dryrun"], ["--dry-run", "stray"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["train", "c.yaml", *others])
        assert caught.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError("bad"), 2), (EngineError("broke"), 1), (KeyboardInterrupt(), 130)]
)
def test_each_kind_of_end_has_its_exit_code(config, monkeypatch, capsys, error, code):
    def fail(options):
        raise error

    monkeypatch.setattr(cli, "train_command", fail)
    assert cli.main(["train", "c.yaml"]) == code
    if code != 130:
        assert capsys.readouterr().err == f"error: {error}\n"


def test_a_dry_run_prints_a_config_that_loads_again(config, capsys, tmp_path):
    assert cli.main(["train", "c.yaml", "train.lr=1e-5", "--dry-run", "rollout.max_staleness=0"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(text)
    again = load_config("again.yaml")
    assert again == settle_dtypes(anchor_paths(load_config("c.yaml", ["train.lr=1e-5", "rollout.max_staleness=0"])))
    assert "# step: 2 prompts x 8 samples = 16 completions" in text and "# device: cpu" in text


def test_a_dry_run_says_who_runs_where(config, capsys, monkeypatch):
    monkeypatch.setattr("fastreason.resources.available_cores", lambda: [0, 1, 2, 3])
    assert cli.main(["train", "c.yaml", "resources.engines=2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "# engine 1 (fake)  1 server   core 2-3  " in printed and "ZeRO-2" in printed
    assert cli.main(["train", "c.yaml", "resources.engines=5", "--dry-run"]) == 2
    assert "resources.engines=5: this process may use 4 core(s)" in capsys.readouterr().err


def test_a_dry_run_says_what_a_person_should_know(config, capsys):
    keys = ["algorithm.kl=k3", "algorithm.kl_coef=0.1", "rollout.max_staleness=1"]
    assert cli.main(["train", "c.yaml", *keys, "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# warning")]
    assert line.startswith("# warning: algorithm.kl=k3 ") and "rollout.max_staleness=1" in line


def test_a_dry_run_makes_no_folder(config):
    before = sorted(Path().rglob("*"))
    assert cli.main(["train", "c.yaml", "--dry-run"]) == 0
    assert sorted(Path().rglob("*")) == before


def test_a_dry_run_loads_neither_engine_nor_updater_and_opens_no_connection(config):
    code = """
import socket, sys
def refuse(*a, **k):
    raise AssertionError("opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
from fastreason.cli import main
code = main(["train", "c.yaml", "--dry-run", "data.source=hub", "data.path=some/data", "model.path=some/model"])
print("LOADED", code, sorted({"vllm", "deepspeed", "transformers", "datasets"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=100, cwd=config.parent, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["LOADED 0 []"], done.stderr[-2000:]
    assert "# unchecked, because it may need the network: model.path='some/model'" in done.stdout


def saved_run(folder, steps_done, producer=b"state"):
    """A run that was ended right after its checkpoint."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text((folder / "c.yaml").read_text())
    store = CheckpointStore(run, keep_last=1, keep_best=False)
    store.aside(steps_done)
    state = TrainerState(step=steps_done, version=steps_done, num_groups=2 * steps_done, score=0.0)
    store.commit(state, producer)
    return run


def finish(run, steps, **summary):
    """What a run leaves after its last step."""
    (run / "model").mkdir()
    (run / "summary.json").write_text(json.dumps({"finished": True, "steps": steps, "evals": {}, **summary}))


def test_a_finished_run_is_not_resumed_but_may_be_longer(config, capsys):
    run = saved_run(config.parent, steps_done=3)
    finish(run, 3)
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "at step 3 of train.steps=3: it is finished" in capsys.readouterr().err
    before = (run / "config.yaml").read_text()
    assert cli.main(["train", "--resume", "run", "train.steps=5", "--dry-run"]) == 0
    assert "\n  steps: 5\n" in capsys.readouterr().out
    assert (run / "config.yaml").read_text() == before, "a dry run changed the run"


def test_a_resumed_run_says_how_gpus_are_shared_and_takes_paths_from_where_it_is_called(config, launched, capsys):
    run = saved_run(config.parent, steps_done=2)
    (config.parent / "exchange").mkdir()
    shared = ["resources.mode=colocated", "rollout.transport=file", "rollout.exchange_dir=exchange"]
    assert cli.main(["train", "--resume", "run", *shared]) == 0 and len(launched) == 1
    assert "\ncolocated, at the same time" in capsys.readouterr().out
    assert load_config(run / "config.yaml").rollout.exchange_dir == str(config.parent / "exchange")


def test_the_check_of_memory_hears_of_all_machines(config, monkeypatch):
    """A dry run too, which starts no launcher."""
    heard = []

    def note(config, **keys):
        heard.append(keys["nodes"])
        raise ConfigError("enough")

    monkeypatch.setattr("fastreason.preflight.preflight", note)
    assert cli.main(["train", "c.yaml"]) == 2
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "c.yaml", "--dry-run"]) == 2
    monkeypatch.setattr("fastreason.nodes.lead", lambda node, run: run(None))
    assert cli.main(["train", "c.yaml"]) == 2
    assert heard == [1, 4, 4]


def test_a_run_without_a_checkpoint_begins_again(config, launched, capsys):
    run = config.parent / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.read_text())
    assert cli.main(["train", "--resume", "run"]) == 0
    assert launched == [{"run_dir": run, "resume": True, "only": None, "groups_dir": None}]
    assert "resuming from the beginning: 0 of 3 steps done" in capsys.readouterr().out
    finish(run, 3)
    assert cli.main(["train", "--resume", "run", "train.steps=9"]) == 1 and len(launched) == 1
    assert "no complete checkpoint to resume from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "overrides"),
    [
        ("summary.json", []),
        ("model", []),
        ("summary of so many steps", []),
        ("last evaluation", ["eval.num_prompts=4"]),
    ],
)
def test_a_run_that_was_killed_after_its_last_step_is_gone_through_again(config, launched, missing, overrides):
    run = saved_run(config.parent, steps_done=3)
    finish(run, 2 if missing == "summary of so many steps" else 3)
    if missing == "summary.json":
        (run / "summary.json").unlink()
    if missing == "model":
        (run / "model").rmdir()
        assert cli.main(["train", "--resume", "run", "checkpoint.save_model=false", "--dry-run"]) == 2
    assert cli.main(["train", "--resume", "run", *overrides]) == 0
    assert len(launched) == 1


def test_a_run_that_is_alive_is_left_alone(config, launched, capsys):
    run = saved_run(config.parent, steps_done=2)
    before = (run / "config.yaml").read_text()
    with held(run):
        assert cli.main(["train", "--resume", "run", "train.steps=9"]) == 2
        assert f"the run is under way (process {os.getpid()})" in capsys.readouterr().err
        assert cli.main(["train", "--resume", "run", "train.steps=9", "--dry-run"]) == 0
    assert launched == [] and (run / "config.yaml").read_text() == before
    assert cli.main(["train", "--resume", "run", "train.steps=9"]) == 0 and len(launched) == 1


def test_a_run_of_one_phase_alone_that_has_no_checkpoint_is_not_taken_for_a_whole_one(config, launched, capsys):
    run = config.parent / "run"
    (run / "groups").mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "a run of --only rollout cannot be resumed" in capsys.readouterr().err
    (run / "groups").rmdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "was trained on written groups" in capsys.readouterr().err
    write_groups(config.parent / "g", 3)
    assert cli.main(["train", "--resume", "run", "--only", "train", "--groups", "g"]) == 0 and len(launched) == 1


def offline_run_dir(folder, steps=3, **keys):
    offline = {"objective": "sft", "path": "rows.jsonl", **keys}
    raw = {"model": {"path": "model"}, "train": {"steps": steps, "prompts_per_step": 1}, "offline": offline}
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run"


def test_an_offline_run_without_a_checkpoint_goes_on_from_its_traces(config, monkeypatch, capsys):
    """Those are complete: the file that they were made of may be gone."""
    run, calls = offline_run_dir(config.parent), []
    monkeypatch.setattr("fastreason.offline_data.resume_offline", lambda config, run_dir, decisions: decisions)
    monkeypatch.setattr("fastreason.launch.launch", lambda *_, resume, **__: calls.append(resume) or 0)
    assert cli.main(["train", "--resume", "run"]) == 0 and calls == [True]
    assert "resuming from the beginning: 0 of 3 steps done" in capsys.readouterr().out
    # One that is finished and kept no checkpoint has nothing to go on from.
    (run / "summary.json").write_text('{"finished": true, "steps": 3}')
    assert cli.main(["train", "--resume", "run"]) == 1 and calls == [True]
    assert "no complete checkpoint to resume from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "overrides", "parts"),
    [
        (2, [], ["at step 2 of train.steps=2: it is finished", "train.steps=N", "up to 4"]),
        (4, [], ["at step 4 of train.steps=4: it is finished", "offline.epochs=4 are over", "model.path=RUN"]),
        (4, ["offline.epochs=8"], ["it is finished", "model.path=RUN"]),
        (4, ["train.steps=9"], ["train.steps=9", "make only 4", "model.path=RUN"]),
        (2, ["train.steps=4", "offline.epochs=8"], ["offline.epochs=8.0, but its traces", "model.path=RUN"]),
    ],
)
def test_a_run_of_epochs_that_is_finished_says_what_can_be_done(config, capsys, monkeypatch, steps, overrides, parts):
    run = offline_run_dir(config.parent, steps=steps, epochs=4.0)
    store = CheckpointStore(run, keep_last=1, keep_best=False)
    store.aside(steps)
    store.commit(TrainerState(step=steps, version=steps, num_groups=0, score=0.0), b"")
    finish(run, 4 if "train.steps=4" in overrides else steps)
    monkeypatch.setattr("fastreason.offline_data.Traces", lambda _: SimpleNamespace(report=TraceReport(rows=1, kept=1)))
    assert cli.main(["train", "--resume", "run", *overrides]) == 2
    said = capsys.readouterr().err.replace(f"model.path={run}", "model.path=RUN")
    assert not [part for part in parts if part not in said], said
    assert "raise offline.epochs" not in said and (steps == 2 or "Pass train.steps" not in said)


def write_groups(folder, num, prompts=2, samples=8):
    """Batches of the size that the config asks for, where it is not said otherwise."""
    grade = Grade(reward=1.0, correct=True)
    sample = Sample(token_ids=[1], sampler_logp=[0.0], token_versions=[0], text="", finish_reason="stop", grade=grade)
    prompt = Prompt(id="p", text="")
    group = Group(ticket=0, prompt=prompt, prompt_token_ids=[1], samples=[sample] * samples, version_issued=0)
    for number in range(1, num + 1):
        write_batch(folder, number, [group] * prompts)


@pytest.fixture
def launched(monkeypatch):
    """The calls of the launcher, which starts nothing."""
    calls = []

    def launch(config, run_dir, decisions, resume, only, groups_dir, link=None):
        calls.append({"run_dir": run_dir, "resume": resume, "only": only, "groups_dir": groups_dir})
        return 0

    monkeypatch.setattr("fastreason.launch.launch", launch)
    return calls


def test_phases_reach_the_launcher(config, launched, tmp_path):
    assert cli.main(["train", "c.yaml", "--only", "rollout", "run.name=one"]) == 0
    write_groups(tmp_path / "g", 3)
    assert cli.main(["train", "c.yaml", "--only", "train", "--groups", "g", "run.name=two"]) == 0
    assert cli.main(["train", "c.yaml", "run.name=three"]) == 0
    assert [(call["run_dir"].name, call["only"], call["groups_dir"]) for call in launched] == [
        ("one", "rollout", None),
        ("two", "train", tmp_path / "g"),
        ("three", None, None),
    ]


def test_groups_are_checked_before_anything_starts(config, launched, capsys, tmp_path):
    command = ["train", "c.yaml", "--only", "train", "--groups", "g"]
    write_groups(tmp_path / "g", 2)
    assert cli.main([*command, "--dry-run"]) == 2
    assert "2 batch(es) there, train.steps=3. Pass train.steps=2" in capsys.readouterr().err
    write_groups(tmp_path / "g", 3, prompts=4)
    assert cli.main(command) == 2
    assert "train.prompts_per_step=4, this run has train.prompts_per_step=2" in capsys.readouterr().err
    write_groups(tmp_path / "g", 3, samples=5)
    assert cli.main(command) == 2
    assert "rollout.samples_per_prompt=5, this run has rollout.samples_per_prompt=8" in capsys.readouterr().err
    (tmp_path / "g" / "batch-000003.msgpack").write_bytes(b"\xc1")
    write_groups(tmp_path / "g", 2)
    assert cli.main(command) == 2
    assert "batch-000003.msgpack is no batch of groups" in capsys.readouterr().err
    assert launched == [] and not Path("runs").exists()


def test_groups_of_another_algorithm_are_found_out_before_anything_starts(config, launched, capsys, tmp_path):
    command = ["train", "c.yaml", "--only", "train", "--groups", "g"]
    write_groups(tmp_path / "g", 3)
    assert cli.main([*command, "algorithm.name=remax"]) == 2
    assert "written without a greedy response, which algorithm.name=remax compares with" in capsys.readouterr().err
    path = yaml.safe_load(config.read_text())["model"]["path"]
    teacher = [f"teacher.path={path}", "teacher.where=server", "teacher.url=http://t"]
    assert cli.main([*command, "algorithm.name=kdrl", *teacher]) == 2
    assert "written without a teacher's log-probabilities" in capsys.readouterr().err
    assert launched == []


def test_training_on_written_groups_is_resumed_as_such_and_not_otherwise(config, launched, capsys, tmp_path):
    run = saved_run(tmp_path, steps_done=2, producer=REPLAYED)
    assert cli.main(["train", "--resume", "run"]) == 2
    assert "was trained on written groups" in capsys.readouterr().err
    write_groups(tmp_path / "g", 3)
    (tmp_path / "g" / "batch-000001.msgpack").write_bytes(b"read no more")
    assert cli.main(["train", "--resume", "run", "--only", "train", "--groups", "g"]) == 0
    assert launched == [{"run_dir": run, "resume": True, "only": "train", "groups_dir": tmp_path / "g"}]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "c.yaml").write_text(config.read_text())
    saved_run(plain, steps_done=2)
    assert cli.main(["train", "--resume", "plain/run"]) == 0 and launched[-1]["only"] is None


def test_the_quickstart_passes_a_dry_run_on_the_cores_that_it_names(capsys, monkeypatch):
    """The other recipes are test_recipes' business."""
    monkeypatch.chdir(ROOT)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    if len(cores) < 2:
        pytest.skip("the recipe names two cores, and this process may use one")
    assert cli.main(["train", "configs/quickstart.yaml", "--dry-run"]) == 0, capsys.readouterr().err
