"""How much of the dense time the policy loss takes with half of the rows inactive, the three calls in alternation.

    python bench/inactive.py [--rounds 21] [--shape N,H,V]

bench/ops.py times dense and half inactive calls as separate cases, minutes apart; their ratio then holds the machine's
drift too. Here each round runs all three, and the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from fastreason_kernels import PolicyLossSpec, linear_logprob, linear_policy_loss


def calls(num_tokens: int, width: int, vocab: int) -> dict[str, Callable[[], None]]:
    """GRPO's loss forward and backward, bf16, both gradients: dense, and every other row with zero advantage."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * 0.08).bfloat16().requires_grad_()
    ids = torch.randint(0, vocab, (num_tokens,), generator=generator)
    advantages = torch.randn(num_tokens, generator=generator)
    with torch.no_grad():
        behaviour_logp = linear_logprob(hidden, weight, ids)[0]

    def call(used: torch.Tensor, statistics: str) -> None:
        out = linear_policy_loss(
            hidden, weight, ids, used, PolicyLossSpec(), behaviour_logp=behaviour_logp, statistics=statistics
        )
        out.loss_sum.backward()
        hidden.grad = weight.grad = None

    half = advantages * (torch.arange(num_tokens) % 2)
    return {
        "dense": partial(call, advantages, "all"),
        "half, all statistics": partial(call, half, "all"),
        "half, active only": partial(call, half, "active"),
    }


def seconds(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shape", default="2048,576,49152")
    options = parser.parse_args()
    table = calls(*map(int, options.shape.split(",")))
    for call in table.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(options.rounds):
        for name, call in table.items():
            times[name].append(seconds(call))
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["dense"], strict=True))
        print(f"{name:22} {statistics.median(taken) * 1e3:7.0f} ms   {ratio:.2f} of dense")


if __name__ == "__main__":
    main()
