"""Which file a worker loads, and how it proves what it holds, without vLLM."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastreason.exchange import EXCHANGE_VARIABLE, write_weights
from fastreason.rollout.vllm_worker import WeightWorker, count_tokens, forgets_preempted


class PackedHead:
    """A tied head on a CPU: multiplies by a copy packed at start-up, which only its quant_method makes anew."""

    def __init__(self):
        self.weight = torch.ones(2, 2)
        self.cpu_linear = object()
        self.num_packed = 0
        self.quant_method = SimpleNamespace(process_weights_after_loading=self.pack)

    def pack(self, module):
        assert module is self
        self.num_packed += 1


class Runner:
    """vLLM's model runner as far as it is used: it fuses q and k on loading; `spoil` changes what arrived."""

    def __init__(self, spoil=False):
        self.requests = {"generate-tokens-t1.0-ab": SimpleNamespace(output_token_ids=[1, 2, 3])}
        self._held, self._spoil = {}, spoil
        self.head = PackedHead()

    def reload_weights(self, weights_iterator):
        named = dict(weights_iterator)
        self._held = {"qk.weight": torch.cat([named["q.weight"], named["k.weight"]]), "norm": named["norm"].clone()}
        if self._spoil:
            self._held["qk.weight"][0] += 1

    def get_model(self):
        return SimpleNamespace(
            packed_modules_mapping={"qk": ["q", "k"]},
            named_parameters=lambda: iter(self._held.items()),
            modules=lambda: [self.head],
        )


@pytest.fixture
def exchange(tmp_path, monkeypatch):
    folder = tmp_path / "exchange"
    folder.mkdir()
    monkeypatch.setenv(EXCHANGE_VARIABLE, str(folder))
    return folder


def worker(**keys):
    made = WeightWorker()
    made.model_runner = Runner(**keys)
    return made


def publish(path):
    named = {"q.weight": torch.ones(2, 2), "k.weight": torch.zeros(1, 2), "norm": torch.arange(2.0)}
    return write_weights(path, named).hexdigest()


def test_weights_are_loaded_proved_and_reported(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    loading = worker()
    assert loading.fastreason_beat() == {"checksum": None}
    report = loading.fastreason_load(str(path), checksum)
    assert loading.fastreason_beat() == {"checksum": checksum}
    assert report.pop("load_s") >= report.pop("reload_s") >= 0
    assert report == {
        "checksum": checksum,
        "num_tensors": 3,
        "held_bytes": 8 * 4,
        "tokens_before": {"generate-tokens-t1.0-ab": 3},
        "forgets_preempted": False,
    }


def test_a_packed_tied_head_is_packed_again(exchange):
    path = exchange / "w.safetensors"
    loading = worker()
    loading.fastreason_load(str(path), publish(path))
    assert loading.model_runner.head.num_packed == 1


def test_a_file_outside_the_exchange_folder_is_refused(exchange, tmp_path, monkeypatch):
    outside = tmp_path / "w.safetensors"
    checksum = publish(outside)
    (exchange / "link.safetensors").symlink_to(outside)
    near = Path(f"{exchange}-other")
    near.mkdir()
    publish(near / "w.safetensors")
    for path in (outside, exchange / ".." / "w.safetensors", exchange / "link.safetensors", near / "w.safetensors"):
        with pytest.raises(ValueError, match="outside the exchange folder"):
            worker().fastreason_load(str(path), checksum)
    monkeypatch.delenv(EXCHANGE_VARIABLE)
    inside = exchange / "w.safetensors"
    checksum = publish(inside)
    with pytest.raises(ValueError, match="outside the exchange folder"):
        worker().fastreason_load(str(inside), checksum)


def test_a_file_that_changed_is_refused_before_it_is_loaded(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    made = worker()
    with pytest.raises(ValueError, match=f"checksum of .* is {checksum}, sent was {'0' * 32}: the file changed"):
        made.fastreason_load(str(path), "0" * 32)
    assert made.model_runner._held == {}


def test_weights_that_did_not_arrive_as_sent_are_an_error(exchange):
    path = exchange / "w.safetensors"
    checksum = publish(path)
    with pytest.raises(ValueError, match=r"holds other values than were sent in: \['qk.weight'\]"):
        worker(spoil=True).fastreason_load(str(path), checksum)


def test_weights_that_did_not_arrive_are_not_said_to_be_held(exchange):
    path, made = exchange / "w.safetensors", worker(spoil=True)
    with pytest.raises(ValueError, match="holds other values"):
        made.fastreason_load(str(path), publish(path))
    assert made.fastreason_beat()["checksum"] not in (None, publish(path))


def test_what_was_read_ahead_is_loaded_even_if_the_file_is_gone(exchange):
    path, made = exchange / "w.safetensors", worker()
    checksum = publish(path)
    made.fastreason_prepare(str(path), checksum)
    made.fastreason_ahead[1].result(timeout=20)
    path.unlink()
    assert made.fastreason_load(str(path), checksum)["checksum"] == checksum
    with pytest.raises(FileNotFoundError):
        made.fastreason_load(str(path), checksum)


def test_what_was_read_ahead_is_checked_and_never_taken_for_another_file(exchange):
    first, second, made = exchange / "1.safetensors", exchange / "2.safetensors", worker()
    checksum = publish(first)
    publish(second)
    made.fastreason_prepare(str(first), "0" * 32)
    with pytest.raises(ValueError, match="the file changed"):
        made.fastreason_load(str(first), "0" * 32)
    made.fastreason_prepare(str(first), "0" * 32)
    assert made.fastreason_load(str(second), checksum)["num_tensors"] == 3


def test_tokens_are_counted_in_either_model_runner():
    requests = {"a": SimpleNamespace(output_token_ids=[7, 8]), "b": SimpleNamespace(output_token_ids=[])}
    assert count_tokens(SimpleNamespace(requests=requests)) == {"a": 2, "b": 0}
    states = SimpleNamespace(
        req_id_to_index={"a": 2, "b": 0},
        total_len=SimpleNamespace(gpu=torch.tensor([5, 0, 9])),
        prompt_len=SimpleNamespace(np=torch.tensor([5, 0, 3]).numpy()),
    )
    assert count_tokens(SimpleNamespace(req_states=states)) == {"a": 6, "b": 0}
    # The one with `requests` keeps those that are preempted.
    assert not forgets_preempted(SimpleNamespace(requests=requests))
    assert forgets_preempted(SimpleNamespace(req_states=states))
    assert count_tokens(SimpleNamespace()) is None


def test_the_weights_of_the_start_can_be_had_back(exchange):
    path, made = exchange / "w.safetensors", worker()
    made.fastreason_load(str(path), publish(path))

    def half():
        raise OSError("the model's folder is gone")

    made.model_runner.reload_weights = half
    with pytest.raises(OSError, match="gone"):
        made.fastreason_restore()
    assert made.fastreason_beat() == {"checksum": "being loaded"}, "it may hold half of either"
    made.model_runner.reload_weights = lambda: made.model_runner._held.clear()
    made.fastreason_restore()
    assert made.model_runner._held == {} and made.fastreason_beat() == {"checksum": None}
    assert made.model_runner.head.num_packed == 2
