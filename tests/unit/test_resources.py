"""Who runs where: shares of cores and GPUs, splits that cannot be, addresses of engines elsewhere, the table of a run."""

import pytest

from fastreason import resources
from fastreason.config import parse_config
from fastreason.cores import cores_text, parse_cores
from fastreason.errors import ConfigError
from fastreason.resources import KEY_VARIABLE, EngineShare, check_resources, engine_shares, resource_table

REMOTE = {"transport": "file", "exchange_dir": "/shared"}
URLS = ["http://node1:8000", "https://node2/engine"]


def make(**sections):
    raw = {
        "model": {"path": "none"},
        "data": {"task": "chain_sum"},
        "rollout": {"engine": "vllm"},
        "train": {"steps": 1, "prompts_per_step": 2},
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    return parse_config(raw)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(resources, "available_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setenv(KEY_VARIABLE, "k")


@pytest.mark.parametrize(
    ("engines", "rollout", "device", "expected"),
    [
        (None, {}, "cpu", [(None, None, 0)]),  # one engine has what the config says, whatever there is
        (None, {"cores": "1-3", "port": 8000}, "cpu", [("1-3", None, 8000)]),
        (2, {}, "cpu", [("0-1", None, 0), ("2-3", None, 0)]),
        (3, {"port": 8000}, "cpu", [("0", None, 8000), ("1", None, 8001), ("2", None, 8002)]),
        (2, {"cores": "0,2,4,6"}, "cpu", [("0,2", None, 0), ("4,6", None, 0)]),
        (2, {"gpus": "4-7", "tensor_parallel": 2}, "cuda", [(None, "4-5", 0), (None, "6-7", 0)]),
        (None, {"gpus": "6-7", "tensor_parallel": 2}, "cuda", [(None, "6-7", 0)]),
    ],
)
def test_every_engine_has_an_even_share(engines, rollout, device, expected):
    config = make(resources={"engines": engines}, rollout=rollout)
    assert engine_shares(config, device) == [EngineShare(*share) for share in expected]


@pytest.mark.parametrize(
    ("sections", "device", "message"),
    [
        (
            {"resources": {"engines": 5}},
            "cpu",
            r"resources\.engines=5: this process may use 4 core\(s\), fewer than one",
        ),
        (
            {"resources": {"engines": 2}, "rollout": {"cores": "7"}},
            "cpu",
            r"resources\.engines=2: rollout\.cores='7' names 1 core\(s\), fewer than one for each",
        ),
        (
            {"resources": {"engines": 2}, "rollout": {"cores": "0-2"}},
            "cpu",
            r"rollout\.cores='0-2': 3 cores are no even share for resources\.engines=2\. Give a multiple of 2",
        ),
        (
            {"rollout": {"cores": "0-2", "tensor_parallel": 2}},
            "cpu",
            r"3 cores are no even share for resources\.engines=1 x rollout\.tensor_parallel=2",
        ),
        (
            {"resources": {"engines": 2}, "rollout": {"gpus": "0-2", "tensor_parallel": 2}},
            "cuda",
            r"rollout\.gpus='0-2': 3 GPU\(s\), and resources\.engines=2 x rollout\.tensor_parallel=2 have 4",
        ),
        ({"rollout": {"gpus": "6-7"}}, "cuda", r"rollout\.gpus='6-7': 2 GPU\(s\), .* have 1\. Name exactly so many"),
        ({"resources": {"engines": 2}}, "cuda", r"resources\.engines=2: say which GPUs .* rollout\.gpus=0-1"),
        ({"resources": {"engines": 2}, "rollout": {"port": 65535}}, "cpu", r"rollout\.port=65535.*no port 65536"),
        (
            {"resources": {"engines": 2}, "rollout": {"engine": "hf"}},
            "cpu",
            r"resources\.engines=2: rollout\.engine=hf is no server",
        ),
        (
            {"resources": {"urls": URLS}, "rollout": {"engine": "hf", **REMOTE}},
            "cpu",
            r"resources\.urls: .*hf is no serv",
        ),
        (
            {"resources": {"urls": ["node1:8000"]}, "rollout": REMOTE},
            "cpu",
            r"'node1:8000' is no address.*FASTREASON_ENG",
        ),
        ({"resources": {"urls": ["http://me:key@n"]}, "rollout": REMOTE}, "cpu", r"is no address of a server"),
        ({"resources": {"urls": ["http://n", "http://n/"]}, "rollout": REMOTE}, "cpu", r"one is there twice"),
        ({"resources": {"urls": URLS, "engines": 3}, "rollout": REMOTE}, "cpu", r"engines=3 beside 2 resources\.urls"),
        (
            {"resources": {"urls": URLS}, "rollout": {**REMOTE, "gpus": "1"}},
            "cpu",
            r"rollout\.gpus=1: no engine is start",
        ),
        (
            {"resources": {"urls": URLS}},
            "cpu",
            r"rollout\.transport=auto.*Set rollout\.transport=file and rollout\.exch",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(sections, device, message):
    with pytest.raises(ConfigError, match=message):
        check_resources(make(**sections), device)


@pytest.mark.parametrize(
    "url", ["http://[node1]:8000", "http://node1:80000", "http://node1:abc", "http://node1:0", "http://", "ftp://node1"]
)
def test_an_address_that_can_be_none_is_refused_with_its_place(url):
    config = make(resources={"urls": [URLS[0], url]}, rollout=REMOTE)
    with pytest.raises(ConfigError) as caught:
        check_resources(config, "cpu")
    assert str(caught.value).startswith(
        f"resources.urls[1]: {url!r} is no address of a server. Write e.g. http://node1:8000"
    )


@pytest.mark.parametrize(
    "url",
    [
        "http://me:SECRET@host",
        "http://:SECRET@host",
        "http://me:SECRET@[node1]",
        "http://h?key=SECRET",
        "http://h/#SECRET",
    ],
)
def test_an_address_with_a_secret_in_it_is_refused_and_not_said(url):
    with pytest.raises(ConfigError, match=r"^resources\.urls\[0\]: is no address.*FASTREASON_ENGINE_KEY") as caught:
        check_resources(make(resources={"urls": [url]}, rollout=REMOTE), "cpu")
    assert "SECRET" not in str(caught.value)


def test_engines_elsewhere_need_their_key_in_the_environment(monkeypatch):
    config = make(resources={"urls": URLS}, rollout=REMOTE)
    check_resources(config, "cpu")
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(ConfigError, match=r"Set FASTREASON_ENGINE_KEY in the environment"):
        check_resources(config, "cpu")


def test_lists_of_cores_are_written_as_short_as_they_are_read():
    for text in ("0", "0-3", "0,2,4-7", "1-2,5"):
        assert cores_text(parse_cores(text)) == text


@pytest.mark.parametrize(
    ("offload", "how"),
    [("cpu", "ZeRO-3, optimizer on the cpu"), ("cpu_weights", "ZeRO-3, optimizer and weights on the cpu")],
)
def test_the_table_says_what_is_on_the_host(offload, how):
    config = make(train={"zero_stage": 3, "offload": offload})
    assert resource_table(config, "cpu")[-1].endswith(f"  {how}")


def test_the_table_says_who_runs_where():
    config = make(resources={"engines": 2}, reward={"workers": 3}, train={"ranks": 2, "cores": "2-3", "zero_stage": 3})
    assert resource_table(config, "cpu") == [
        "                 processes  where                            how",
        "engine 0 (vllm)  1 server   core 0-1                         tensor parallel 1",
        "engine 1 (vllm)  1 server   core 2-3                         tensor parallel 1",
        "graders          3          this machine, with the producer",
        "trainer          2          core 2-3                         ZeRO-3",
    ]
    remote = resource_table(make(resources={"urls": URLS}, rollout=REMOTE), "cuda", only="rollout")
    assert [line.split() for line in remote[1:3]] == [
        ["engine", str(index), "(vllm)", "elsewhere", url, "by", "URL"] for index, url in enumerate(URLS)
    ]
    assert len(remote) == 4, "the collector trains nothing"
    assert [line.split()[0] for line in resource_table(config, "cpu", only="train")[1:]] == ["trainer"]
