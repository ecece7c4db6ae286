"""Learning-rate schedules: pure functions of the number of updates done."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}


def learning_rate(peak: float, schedule: str, update: int, num_updates: int, warmup: int) -> float:
    """The rate of update number `update` (from 0): linear warm-up to `peak`, then the schedule down to the end.

    The warm-up reaches the peak at update `warmup`; the first update already moves (rate peak / (warmup + 1)).
    """
    if update < warmup:
        return peak * (update + 1) / (warmup + 1)
    share = (update - warmup) / max(1, num_updates - warmup)
    return peak * SCHEDULES[schedule](min(1.0, share))
