"""Where a trainer's rank runs: on its GPU, or on its cores. It refuses to choose the device, which is preflight's."""

import os
from typing import Any

from fastreason.config import TrainConfig
from fastreason.cores import available_cores, require_cores


def prepare_device(device: str, train: TrainConfig) -> Any:
    """Bind this rank to its GPU, or to its cores and threads; returns the torch device.

    With `train.spare_cores` every thread is of the scheduler's idle class: it runs where nobody else wants to, and where a
    core is taken the system moves its thread beside the others.
    """
    import torch

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    cores = require_cores(train.cores, "train.cores") if train.cores else available_cores()
    mine = cores[local_rank :: train.ranks] or cores
    if train.spare_cores:
        spare = require_cores(train.spare_cores, "train.spare_cores")
        mine = sorted({*mine, *spare[local_rank :: train.ranks]})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(train.threads or len(mine))
    return torch.device("cpu")
