"""What `fastreason serve` makes of its words, and where its key is kept."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from engine_site import KEY, Site

from fastreason import cli, serve
from fastreason.arguments import build_parser
from fastreason.errors import ConfigError, EngineError
from fastreason.resources import KEY_VARIABLE
from fastreason.serve import keep, kept_key, read_serve_config


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def read(*words):
    return read_serve_config(build_parser().parse_args(["serve", *map(str, words)]))


def test_a_model_alone_is_enough_and_keys_override(tmp_path):
    config = read("/models/m", "rollout.cores=0", "model.dtype=float32", "--exchange-dir", tmp_path, "--port", 8123)
    assert (config.model.path, config.model.dtype, config.rollout.cores) == ("/models/m", "float32", "0")
    assert (config.rollout.port, config.rollout.transport, config.rollout.exchange_dir) == (8123, "file", str(tmp_path))


def test_the_runs_own_config_is_taken_but_for_what_the_run_alone_needs(tmp_path):
    path = tmp_path / "run.yaml"
    rollout = {"exchange_dir": str(tmp_path), "transport": "file", "max_new_tokens": 99}
    raw = {"model": {"path": "/m"}, "rollout": rollout, "train": {"steps": 7, "ranks": 2, "prompts_per_step": 1}}
    path.write_text(json.dumps({**raw, "resources": {"urls": ["http://here:8000"]}, "algorithm": {"name": "dapo"}}))
    config = read("--config", path)
    assert (config.model.path, config.rollout.max_new_tokens, config.resources.urls) == ("/m", 99, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"name one model"),
        (["/a", "/b"], r"name one model"),
        (["/m"], r"--exchange-dir None: no such folder\. Give the one on shared storage"),
        (["/m", "--exchange-dir", "/no/such"], r"--exchange-dir /no/such: no such folder"),
        (["/m", "--exchange-dir", "/tmp", "rollout.engine=hf"], r"rollout\.engine=hf is no server"),
        (["/m", "--exchange-dir", "/tmp", "rollout.prot=1"], r"rollout\.prot: unknown key.*did you mean 'port'"),
        (["/m", "--exchange-dir", "/tmp", "resources.engines=2"], r"resources\.engines=2: one server .*Leave it out"),
        (["/m", "--exchange-dir", "/tmp", "--port", "70000"], r"serve: --port 70000: there is no such port"),
        (["/m", "--exchange-dir", "/tmp", "--port=-1"], r"serve: --port -1: there is no such port"),
        (["/m", "--exchange-dir", "/tmp", "rollout.cores=0-2", "rollout.tensor_parallel=2"], r"no even share"),
    ],
)
def test_what_cannot_be_served_is_refused(words, message, capsys):
    with pytest.raises(ConfigError, match=message):
        read(*sorted(words, key=lambda word: "=" not in word and word != "/m"))
    assert cli.main(["serve", *words]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_the_help_says_the_longest_sequence_without_a_config(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    assert f"else the model's, {serve.LONGEST} at most" in " ".join(capsys.readouterr().out.split())


def test_deaths_are_counted_from_the_last_answer_and_a_start_may_take_its_time(monkeypatch, tmp_path):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    keys = ("rollout.engine=fake", "rollout.startup_timeout_s=0.3", "run.timeout_s=0.3", "run.hang_timeout_s=0.3")
    config, lives = read("/m", *keys, "--exchange-dir", tmp_path), []

    async def main():
        site = Site(monkeypatch)
        await site.up()

        async def watch():
            for number in (1, 2, 3):
                async with asyncio.timeout(8):
                    while len(lives) < number:
                        await asyncio.sleep(0.01)
                await site.down()
                await asyncio.sleep(1.0)
                await site.up()
            await site.down()
            raise EngineError("that is all")

        keeper = SimpleNamespace(watch=watch, note_life=lambda: lives.append(1), report_hung=lambda reason: None)
        await keep(keeper, config, site.url, KEY, tmp_path / "log", "words")

    with pytest.raises(EngineError, match="that is all"):
        asyncio.run(main())


def test_the_key_is_made_once_in_a_file_that_only_its_user_can_read(tmp_path, capsys):
    path = tmp_path / "new" / "key"
    key = kept_key(path)
    assert len(key) > 30 and kept_key(path) == key and path.stat().st_mode & 0o777 == 0o600
    said = capsys.readouterr().err
    assert key not in said and f"export {KEY_VARIABLE}=$(cat {path})" in said
    assert [file.name for file in path.parent.iterdir()] == ["key"]
    path.write_text("\n")
    with pytest.raises(ConfigError, match=r"it is empty\. Remove it"):
        kept_key(path)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others can read it\. Run: chmod 600"):
        kept_key(path)


def test_a_key_that_two_servers_make_at_once_is_whole_and_the_same(tmp_path, monkeypatch, capsys):
    path, seen = tmp_path / "key", []

    def another(number=32):
        """Between this server's look and its file, another one of the same home starts."""
        if len(seen) < 1:
            seen.append("")
            assert not path.exists(), "a file without its key could be read"
            seen[0] = kept_key(path)
        return f"{len(seen)}-{next(numbers):040}"

    numbers = iter(range(9))
    monkeypatch.setattr(serve, "new_key", another)
    assert kept_key(path) == seen[0] == path.read_text().strip()
    assert [file.name for file in tmp_path.iterdir()] == ["key"]
