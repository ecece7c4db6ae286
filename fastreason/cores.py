"""Reads a list of CPU cores as people write it: `0`, `0-3`, `0,2,4-7`. No heavy import."""

import os

from fastreason.errors import ConfigError

MOST_CORES = 8192  # what Linux can be built for; a typing error must not become a list of billions


def parse_cores(text: str, key: str = "cores") -> list[int]:
    """The core numbers that `text` names, sorted, each once; raises `ConfigError` that names `key` and the value."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last) if dash else (first, first)
        # isdecimal alone accepts digits of other scripts, which the engine's own parser does not.
        if not all(end.isascii() and end.isdecimal() for end in ends):
            raise ConfigError(f"{key}={text!r}: {part.strip()!r} is no core and no range. Write e.g. '0' or '0-3'.")
        low, high = int(ends[0]), int(ends[1])
        if low > high:
            raise ConfigError(f"{key}={text!r}: the range {part.strip()!r} runs backwards. Write {high}-{low}.")
        if high >= MOST_CORES:
            raise ConfigError(f"{key}={text!r}: no machine has a core {high}; {MOST_CORES - 1} is the highest allowed.")
        cores.update(range(low, high + 1))
    return sorted(cores)


def cores_text(cores: list[int]) -> str:
    """The shortest list that `parse_cores` reads as these: `0-3,8`."""
    parts: list[list[int]] = []
    for core in sorted(set(cores)):
        if parts and core == parts[-1][-1] + 1:
            parts[-1][1:] = [core]
        else:
            parts.append([core])
    return ",".join("-".join(map(str, part)) for part in parts)


def available_cores() -> list[int]:
    """The cores that this process may run on: fewer than the machine has under taskset, Slurm or a container."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def require_cores(text: str, key: str = "cores") -> list[int]:
    """As `parse_cores`, and also raises `ConfigError` when one of them may not be used by this process."""
    cores, available = parse_cores(text, key), available_cores()
    missing = sorted(set(cores) - set(available))
    if missing:
        names = ",".join(map(str, available))
        raise ConfigError(f"{key}={text!r}: core(s) {missing} are not available. This process may use: {names}.")
    return cores
