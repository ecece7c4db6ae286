"""What `dtype: auto` becomes: bf16 only where it is multiplied in hardware."""

import pytest

from fastreason import machine, preflight
from fastreason.config import parse_config
from fastreason.machine import check_precision, has_bf16_products
from fastreason.preflight import choose_dtype, settle_dtypes
from fastreason.rollout.vllm_server import server_command

X86 = "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu sse2 avx2 avx512f {}\nbugs\t\t: spectre_v1\n"


def make_config(**sections):
    raw = {"model": {"path": "m"}, "data": {"task": "chain_sum"}, "train": {"steps": 1, "prompts_per_step": 2}}
    return parse_config({name: raw.get(name, {}) | sections.get(name, {}) for name in {**raw, **sections}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86.format("amx_bf16 amx_tile"), True),
        (X86.format("avx512_bf16"), True),
        (X86.format("avx512_vnni"), False),
        # The flag of another line, and one that only begins like it, say nothing.
        (X86.format("bf16like") + "bugs\t\t: avx512_bf16\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("", False),
    ],
)
def test_the_flags_of_a_cpu_say_whether_it_multiplies_bf16(tmp_path, text, expected):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_bf16_products(file) is expected


def test_a_system_without_a_list_of_flags_counts_as_one_without_the_products(tmp_path):
    assert has_bf16_products(tmp_path / "nothing") is False


@pytest.mark.parametrize("products", [True, False])
def test_auto_follows_the_device_and_a_wish_is_kept(monkeypatch, products):
    monkeypatch.setattr(preflight, "has_bf16_products", lambda: products)
    assert choose_dtype("auto", "cuda") == "bfloat16"
    assert choose_dtype("auto", "cpu") == ("bfloat16" if products else "float32")
    for wish in ("bfloat16", "float32"):
        assert choose_dtype(wish, "cpu") == choose_dtype(wish, "cuda") == wish


def test_a_config_is_settled_for_model_and_teacher_and_stays_so(monkeypatch):
    monkeypatch.setattr(preflight, "has_bf16_products", lambda: False)
    asked = make_config(teacher={"path": "t", "dtype": "bfloat16"}, train={"device": "cpu"})
    config = settle_dtypes(asked)
    assert (asked.model.dtype, config.model.dtype, config.teacher.dtype) == ("auto", "float32", "bfloat16")
    monkeypatch.setattr(preflight, "has_bf16_products", lambda: True)
    assert settle_dtypes(config) == config
    assert settle_dtypes(asked).model.dtype == "bfloat16"
    alone = settle_dtypes(make_config())
    assert "dtype" in alone.model.model_fields_set and "dtype" not in alone.teacher.model_fields_set


def test_doctor_warns_of_bf16_that_a_cpu_cannot_multiply():
    asked, left = make_config(model={"dtype": "bfloat16"}), make_config()
    found = check_precision(asked, on_gpu=False, has_products=lambda: False)
    assert found.status == "warn" and found.advice.startswith("model.dtype=bfloat16 is several times slower")
    for config, on_gpu, products in (
        (left, False, False),
        (None, False, False),
        (asked, True, False),
        (asked, False, True),
    ):
        assert check_precision(config, on_gpu, lambda products=products: products).status == "ok"
    assert "float32" in machine.check_precision(left, False, lambda: False).seen


def test_vllm_is_never_left_to_choose():
    with pytest.raises(AssertionError, match="auto"):
        server_command(make_config().rollout, "m", 1, dtype="auto", max_model_len=9, seed=0, device="cpu")
