"""Noise on master weights: none that a forward sees, and updates come through in the mean."""

import pytest
import torch

from fastreason.update import dither
from fastreason.update.dither import dither_


def bf16_weights(num: int = 200_000) -> torch.Tensor:
    """Of both signs and many magnitudes, powers of two and zeros among them; fp32."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(num, generator=generator) * 10.0 ** torch.randint(-6, 3, (num,), generator=generator)
    weights[:40] = 2.0 ** torch.arange(-20, 20)
    weights[40:60] = 0.0
    return weights.bfloat16().float()


def dithered(weights: torch.Tensor, seed: int = 0) -> torch.Tensor:
    moved = weights.clone()
    dither_(moved, torch.Generator().manual_seed(seed))
    return moved


def ulp(weights: torch.Tensor) -> torch.Tensor:
    """Distance to the next bf16 number away from zero: 8 significant bits."""
    return 2.0 ** (weights.abs().log2().floor() - 7)


def test_a_forward_in_bf16_sees_no_difference():
    weights = bf16_weights()
    moved = dithered(weights)
    assert torch.equal(moved.bfloat16(), weights.bfloat16())
    assert torch.equal(moved[40:60], weights[40:60]), "zero stays zero"
    assert float((moved != weights).float().mean()) > 0.98


def test_it_is_spread_evenly_over_the_cell():
    weights = bf16_weights()[60:]
    offset = (dithered(weights) - weights) / ulp(weights)
    assert float(offset.abs().max()) <= 0.5
    assert float(offset.mean()) == pytest.approx(0, abs=0.005)
    assert float(offset.std()) == pytest.approx(12**-0.5, abs=0.005)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_updates_below_half_a_cell_come_through_in_the_mean(share):
    weights = bf16_weights()[60:]
    update = share * ulp(weights) * weights.sign()  # away from zero, where every cell is as wide
    seen = ((dithered(weights) + update).bfloat16().float() - weights) / (ulp(weights) * weights.sign())
    assert float(seen.mean()) == pytest.approx(share, abs=0.005)
    assert torch.equal((weights + update).bfloat16().float(), weights), "without it nothing comes through"


def test_the_noise_is_the_generators_in_every_chunk(monkeypatch):
    weights = bf16_weights(5000)
    assert torch.equal(dithered(weights, 3), dithered(weights, 3))
    assert not torch.equal(dithered(weights, 3), dithered(weights, 4))
    monkeypatch.setattr(dither, "CHUNK", 512)
    assert torch.equal(dithered(weights, 3).bfloat16(), weights.bfloat16())


def test_what_is_no_bf16_number_is_left_alone():
    weights = torch.tensor([0.1, 1 / 3, -1e-7 + 0.5, float("inf")])
    assert torch.equal(dithered(weights), weights)
