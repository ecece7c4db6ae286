"""The exchange file: a digest that any change shows in, a comparison tensor by tensor, a reader that never sees half."""

import fcntl
import socket
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastreason.exchange import Digest, ExchangeFolder, compare_held, digest_file, read_weights, write_weights


def tensors():
    return {
        "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "none": torch.zeros(0),
        "scalar": torch.tensor(3.0),
    }


def digest_of(named):
    digest = Digest()
    for name, tensor in named.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def test_both_sides_compute_the_same_digest(tmp_path):
    path = tmp_path / "w.safetensors"
    written = write_weights(path, tensors())
    digest = Digest()
    read = dict(read_weights(path, digest))
    assert list(read) == list(tensors()), "in the order in which they were written"
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())
    assert digest.hexdigest() == written.hexdigest() == digest_of(tensors())
    assert (written.num_tensors, written.num_bytes) == (4, 6 * 4 + 2 * 2 + 4)
    # Without making tensors of it, as the fake engine does.
    untouched = digest_file(path)
    assert (untouched.hexdigest(), untouched.num_tensors, untouched.num_bytes) == (written.hexdigest(), 4, 32)


def test_the_file_is_one_that_others_read(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, tensors())
    loaded = load_file(path)
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors().items())
    # And one that others wrote is read.
    save_file(tensors(), path, metadata={"format": "pt"})
    assert digest_file(path).num_bytes == 32 and dict(read_weights(path)).keys() == tensors().keys()


def test_tensors_are_written_as_they_come_and_not_held(tmp_path):
    alive = []

    def stream():
        for index in range(4):
            tensor = torch.full((5,), float(index))
            alive.append(weakref.ref(tensor))
            yield f"t{index}", tensor
            del tensor
            assert sum(reference() is not None for reference in alive[:-1]) == 0

    digest = write_weights(tmp_path / "w.safetensors", stream())
    assert digest.hexdigest() == digest_of({f"t{index}": torch.full((5,), float(index)) for index in range(4)})


def test_more_names_than_the_header_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastreason.exchange.HEADER_BYTES", 100)
    with pytest.raises(ValueError, match=r"names of 4 tensors take .* bytes, more than 100"):
        write_weights(tmp_path / "w.safetensors", tensors())
    assert not (tmp_path / "w.safetensors").exists()


def test_the_digest_is_the_same_on_every_machine():
    assert digest_of({"w": torch.tensor([1.0, 2.0])}) == "8f2e7ac057661a03888d2c3149cbb898"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [t.update({name if name != "b" else "c": t.pop(name)}) for name in list(t)],
        lambda t: t.update(b=t["b"].reshape(3, 2)),
        lambda t: t.update(b=t["b"].view(torch.int32)),
        lambda t: t.update(b=t["b"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])),
        lambda t: t.update(b=torch.where(t["b"] == 0, -0.0, t["b"])),
        lambda t: t.pop("scalar"),
        lambda t: t.update(d=torch.zeros(0)),
        lambda t: t.update(a=t["a"].flip(0)),
        lambda t: t.update(b=t.pop("b")),
    ],
    ids=["name", "shape", "dtype", "value", "sign of zero", "missing", "empty", "order within", "order"],
)
def test_any_change_shows_in_the_digest(change):
    changed = tensors()
    change(changed)
    assert digest_of(changed) != digest_of(tensors())


def test_the_digest_sees_values_not_memory():
    transposed = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3).T.contiguous().T}
    assert not transposed["b"].is_contiguous()
    assert digest_of(transposed) == digest_of({"b": tensors()["b"]})


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, tensors())

    def torn():
        yield "b", torch.zeros(1)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_weights(path, torn())
    assert digest_of(dict(read_weights(path))) == digest_of(tensors())


def test_a_damaged_file_does_not_read_as_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    written = write_weights(path, tensors())
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    digest = Digest()
    list(read_weights(path, digest))
    assert digest.hexdigest() == digest_file(path).hexdigest() != written.hexdigest()
    for length in (len(raw) - 3, 9000, 9, 3, 0):
        path.write_bytes(raw[:length])
        for read in (digest_file, lambda path: list(read_weights(path))):
            with pytest.raises(ValueError, match="is torn"):
                read(path)


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
    left, used, elsewhere, foreign = (
        tmp_path / name for name in ("fastreason-left", "fastreason-used", "fastreason-elsewhere", "other")
    )
    for folder in (left, used, elsewhere, foreign):
        folder.mkdir()
        (folder / ".lock").write_text(socket.gethostname())
        (folder / "weights").touch()
    (elsewhere / ".lock").write_text("another-machine")
    with open(used / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ExchangeFolder(0, (tmp_path,)).remove()
        assert not left.exists()
        assert all((folder / "weights").exists() for folder in (used, elsewhere, foreign))
