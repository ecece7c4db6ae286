"""Where fp32 weights lie in the cells that round to them. It owns how they are spread, and knows neither models nor engines.

A model is loaded from bf16 weights, so its fp32 masters start in the middle of the cells that round to them, and updates that
sum to less than half a cell change nothing that a forward sees: at a learning rate of 3e-5 a first update moves no weight
above 0.008. Started anywhere in its cell, a weight crosses with probability (update / cell), so that what the forward sees
moves by the update in the mean, from the first one on. The same holds of bf16 weights that an adapter's product is merged into.
"""

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements: the temporaries stay small beside the weights


@torch.no_grad()
def dither_(weights: Tensor, generator: torch.Generator) -> None:
    """Add noise to fp32 weights, in place, that does not change what they round to in bf16.

    w + u ulp(w), u ~ U(-1/2, 1/2), ulp the distance from w to the next bf16 number away from zero. A sum that rounds to another
    number (below a power of two the cell is narrower) leaves w as it is, and so does a w that is 0 or no bf16 number.
    weights: fp32, any shape, contiguous. generator: of their device.
    """
    for chunk in weights.view(-1).split(CHUNK):
        away = (chunk.view(torch.int32) + 0x10000).view(torch.float32)
        noise = torch.rand(chunk.shape, generator=generator, device=chunk.device).sub_(0.5).mul_(away - chunk)
        moved = noise.add_(chunk)
        kept = (moved.bfloat16().float() == chunk) & (chunk != 0)
        chunk.copy_(torch.where(kept, moved, chunk))


@torch.no_grad()
def spread(weights: Tensor, number: int) -> None:
    """What `dither_` does, to fp32 weights that are bf16 numbers, several times faster: the low half of their bits is drawn.

    The seed is made of the weights' number, so that one publication differs from the next by the update alone. A 0 stays.
    """
    generator = torch.Generator(weights.device).manual_seed(number)
    for chunk in weights.view(-1).split(CHUNK):
        # Of 65,536 offsets of the bits, all but the two at the ends surely round back.
        noise = torch.randint(-32767, 32768, chunk.shape, generator=generator, dtype=torch.int32, device=chunk.device)
        chunk.view(torch.int32).add_(noise.mul_(chunk != 0))
