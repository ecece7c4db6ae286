"""What devices can do: memory, operations, bytes a second; given by their vendors or measured here.

It owns the table, and the shares of a peak that real programs reach, which are assumptions and printed as such. It
refuses to measure (`calibration.py`).
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastreason.errors import ConfigError

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU with the cores that a run gives it.

    memory: bytes. flops: of dense bf16 products (CPU: of the run's dtype), a second. bandwidth: of its memory, bytes a
    second. link, node_link: bytes a second from it to one in the same node, to one in another. source: of the figures.
    itemsize: bytes of a number of the run. decode_flops: a CPU's on the engine's cores, of a few rows at a time.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    node_link: float
    source: str
    is_cpu: bool = False
    itemsize: int = 2
    decode_flops: float | None = None
    per_node: int = 8


def _gpu(name: str, gb: float, tflops: float, tb_s: float, link_gb: float, node_gb: float, source: str) -> Device:
    return Device(name, gb * GB, tflops * TERA, tb_s * TERA, link_gb * GB, node_gb * GB, source)


SHEET = "vendor's data sheet"
# node_link: a 400 Gb/s card a GPU (A100, L40S: 200), which is an assumption about the cluster, not a figure of the GPU.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("a100", 80, 312, 2.04, 300, 25, f"{SHEET}: A100 SXM 80 GB"),
        _gpu("h100", 80, 989, 3.35, 450, 50, f"{SHEET}: H100 SXM"),
        _gpu("h200", 141, 989, 4.8, 450, 50, f"{SHEET}: H200 SXM"),
        _gpu("b200", 180, 2250, 7.7, 900, 50, f"{SHEET}: HGX B200, dense"),
        _gpu("l40s", 48, 362, 0.864, 32, 25, f"{SHEET}: L40S, PCIe 4.0 x16"),
        _gpu("rtx4090", 24, 165, 1.008, 32, 25, f"{SHEET}: RTX 4090, fp32 accumulation, PCIe 4.0 x16"),
    )
}


@dataclass(frozen=True)
class Rates:
    """Shares of a peak that are assumed, and fixed costs; none is measured on a GPU here. `--rate key=value` changes one."""

    train_mfu: float = 0.40  # products of forward and backward, of the device's flops
    prefill_mfu: float = 0.50  # prompts
    decode_mfu: float = 0.50  # products of decoding, where they and not memory bound it
    decode_bandwidth: float = 0.60  # of memory bandwidth, reading weights and KV cache
    decode_step_s: float = 0.004  # beside the device's work: scheduling, launches, sampling; of each token step
    link_share: float = 0.70  # of a link's rate in collectives
    reserve_gib: float = 4.0  # of a GPU: context, communication, fragmentation
    memory_share: float = 0.90  # of an engine's GPU that it may fill
    publish_gb_s: float = 2.0  # shared memory or a file: gathered, written, read, loaded
    swap_gb_s: float = 20.0  # the offloaded optimizer's gradients and weights between GPU and host, each way
    sleep_s: float = (
        1.0  # colocated: an engine falls asleep or wakes; its memory is unmapped and mapped, nothing is copied
    )
    asleep_gib: float = 2.0  # colocated: of a GPU, what an engine that sleeps still holds: context, captured graphs
    stream_gb_s: float = 10.0  # offloaded weights to a GPU, from memory that is not pinned, and so beside no products
    host_gb_s: float = (
        50.0  # what Adam reads and writes of the host's memory where it is offloaded, a node's ranks together
    )


# On a CPU the rates of products are measured as products, with no peak above them. decode_mfu is fitted to vLLM's CPU build,
# 64 responses at once on one core: bench/README.md, "fastreason plan beside runs".
CPU_RATES = replace(
    Rates(),
    train_mfu=0.75,
    prefill_mfu=0.75,
    decode_mfu=0.27,
    decode_bandwidth=0.8,
    decode_step_s=0.02,
    reserve_gib=1.0,
    publish_gb_s=0.5,
)


def named_device(name: str) -> Device:
    """A row of the table; raises ConfigError that lists the rows."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise ConfigError(
            f"--gpu {name}: no such device. There are: {', '.join(DEVICES)}; --calibrate measures this machine's CPU, and a "
            "file that it wrote (--gpu FILE.json) is one too."
        )
    return device


def changed_rates(rates: Rates, changes: list[str]) -> Rates:
    """`rates` with `key=value` changes; raises ConfigError for a key or a value that is none."""
    known = {field.name for field in fields(Rates)}
    made: dict[str, Any] = {}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            made[key] = float(value)
        except ValueError:
            made[key] = -1.0
        if key not in known or made[key] < 0:
            raise ConfigError(f"--rate {change}: allowed: key=number >= 0 with a key of {', '.join(sorted(known))}.")
    return replace(rates, **made)


def device_to_json(device: Device) -> dict[str, Any]:
    return asdict(device)


def device_from_json(raw: Any, where: str) -> Device:
    """The device in a file of --calibrate; raises ConfigError where it is none."""
    try:
        return Device(**raw)
    except TypeError as error:
        raise ConfigError(f"--gpu {where}: not a file that fastreason plan --calibrate wrote: {error}") from error
