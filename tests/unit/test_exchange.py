"""The exchange file: a digest that any change shows in, a comparison tensor by tensor, a reader that never sees half."""

import fcntl

import pytest
import torch
from safetensors import SafetensorError

from fastreason.exchange import Digest, ExchangeFolder, compare_held, read_weights, write_weights


def tensors():
    return {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
    }


def digest_of(named):
    digest = Digest()
    for name in sorted(named):
        digest.add(name, named[name])
    return digest.hexdigest()


def test_both_sides_compute_the_same_digest(tmp_path):
    path = tmp_path / "w.safetensors"
    written = write_weights(path, tensors())
    digest = Digest()
    read = dict(read_weights(path, digest))
    assert list(read) == ["a", "b", "scalar"]
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert digest.hexdigest() == written.hexdigest() == digest_of(tensors())
    assert (written.num_tensors, written.num_bytes) == (3, 6 * 4 + 2 * 2 + 4)


def test_the_digest_is_the_same_on_every_machine():
    assert digest_of({"w": torch.tensor([1.0, 2.0])}) == "8f2e7ac057661a03888d2c3149cbb898"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(c=t.pop("b")),
        lambda t: t.update(b=t["b"].reshape(3, 2)),
        lambda t: t.update(b=t["b"].view(torch.int32)),
        lambda t: t.update(b=t["b"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])),
        lambda t: t.update(b=torch.where(t["b"] == 0, -0.0, t["b"])),
        lambda t: t.pop("scalar"),
        lambda t: t.update(d=torch.zeros(0)),
        lambda t: t.update(a=t["a"].flip(0)),
    ],
    ids=["name", "shape", "dtype", "value", "sign of zero", "missing", "empty", "order"],
)
def test_any_change_shows_in_the_digest(change):
    changed = tensors()
    change(changed)
    assert digest_of(changed) != digest_of(tensors())


def test_the_digest_sees_values_not_memory():
    transposed = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3).T.contiguous().T}
    assert not transposed["b"].is_contiguous()
    assert digest_of(transposed) == digest_of({"b": tensors()["b"]})


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    write_weights(path, tensors())

    def torn(named, file):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("fastreason.exchange.save_file", torn)
    with pytest.raises(OSError, match="no space left"):
        write_weights(path, {"b": torch.zeros(1)})
    assert digest_of(dict(read_weights(path))) == digest_of(tensors())


def test_a_damaged_file_does_not_read_as_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    written = write_weights(path, tensors())
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    digest = Digest()
    list(read_weights(path, digest))
    assert digest.hexdigest() != written.hexdigest()
    path.write_bytes(raw[:-3])
    with pytest.raises(SafetensorError):
        list(read_weights(path))


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def sent():
    return {
        "layers.0.q_proj.weight": torch.full((2, 3), 1.0),
        "layers.0.k_proj.weight": torch.full((1, 3), 2.0),
        "layers.0.v_proj.weight": torch.full((1, 3), 3.0),
        "norm.weight": torch.ones(3),
    }


def test_what_an_engine_holds_is_counted_in_bytes():
    qkv = torch.cat([torch.full((2, 3), 1.0), torch.full((1, 3), 2.0), torch.full((1, 3), 3.0)])
    held = [("layers.0.qkv_proj.weight", qkv), ("norm.weight", torch.ones(3))]
    assert compare_held(held, sent(), FUSED) == (15 * 4, [])


def test_what_differs_is_named_also_within_a_fused_tensor():
    qkv = torch.cat([torch.full((2, 3), 1.0), torch.full((1, 3), 3.0), torch.full((1, 3), 2.0)])
    held = [("layers.0.qkv_proj.weight", qkv), ("norm.weight", torch.tensor([1.0, 1.0, 1.0 + 1e-6]))]
    assert compare_held(held, sent(), FUSED) == (0, ["layers.0.qkv_proj.weight", "norm.weight"])


def test_what_an_engine_keeps_in_its_own_layout_is_neither_equal_nor_different():
    held = [
        ("norm.weight", torch.zeros(2)),  # a shard
        ("layers.0.q_proj.weight", torch.zeros(2, 3, dtype=torch.int8)),  # repacked
        ("rotary.cache", torch.zeros(3)),  # never sent
        ("layers.0.gate_up_proj.weight", torch.zeros(3)),  # its parts were not sent
    ]
    assert compare_held(held, sent(), FUSED) == (0, [])


def test_an_exchange_folder_is_private_its_own_and_gone_afterwards(tmp_path):
    first, second = (ExchangeFolder(0, (tmp_path,)) for _ in range(2))
    assert first.path != second.path and first.path.parent == tmp_path
    assert first.path.stat().st_mode & 0o077 == 0
    first.remove()
    assert not first.path.exists() and second.path.exists()
    second.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_exchange_folder_goes_where_there_is_room(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    folder = ExchangeFolder(0, (small, large))
    assert folder.path.parent == small
    folder.remove()
    folder = ExchangeFolder(1 << 60, (small, large))
    assert folder.path.parent == large, "the last place is taken where no other has the room"
    folder.remove()


def test_what_a_killed_run_left_is_removed_by_the_next_and_nothing_else(tmp_path):
    left, used, foreign = (tmp_path / name for name in ("fastreason-left", "fastreason-used", "other"))
    for folder in (left, used, foreign):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "weights").touch()
    with open(used / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ExchangeFolder(0, (tmp_path,)).remove()
        assert not left.exists()
        assert (used / "weights").exists() and (foreign / "weights").exists()
