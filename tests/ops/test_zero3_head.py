"""FusedLMHead under DeepSpeed's ZeRO-3 against plain torch: real DeepSpeed over gloo, in processes of its own.

This file is also the program of those processes (`python test_zero3_head.py FOLDER RANK WORLD`): each rank writes what it
found to FOLDER/<rank>.pt, and the tests judge it. Every wait has a limit.
"""

import importlib.util
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastreason_kernels import PolicyLossSpec, linear_logprob
from fastreason_kernels.integrations.head import FusedLMHead

VOCAB, WIDTH, NUM_TOKENS, STEPS, RATE = 53, 16, 24, 2, 0.05
TIMEOUT_S = 540
PPO = PolicyLossSpec(clip_low=None, clip_high=None, entropy_coef=0.1)
# (tied, frozen head, spec or None for log-probabilities whose loss is made outside of the module, strategy)
CASES = {
    "A": (False, False, PPO, "A"),
    "A, tied": (True, False, PPO, "A"),
    "A, frozen": (False, True, PPO, "A"),
    "B": (False, False, PPO, "B"),
    "B, tied": (True, False, PPO, "B"),
    "F": (False, True, PPO, "F"),
    "F, tied": (True, True, PPO, "F"),
    "log-probabilities by B": (False, False, None, "B"),
    "log-probabilities by B, tied": (True, False, None, "B"),
    "log-probabilities by F": (False, True, None, "F"),
}

# ---------------------------------------------------------------------------------------------------------------------
# What ranks and tests share


class Model(torch.nn.Module):
    """An embedding, one layer, and a head; `whole_logits` computes what the head does in plain torch."""

    def __init__(self, tied, frozen):
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.body = torch.nn.Linear(WIDTH, WIDTH)
        weight = self.embed.weight if tied else torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.5)
        self.head = FusedLMHead(weight, torch.nn.Parameter(torch.randn(VOCAB) * 0.3))
        self.head.requires_grad_(not frozen)

    def hidden(self, x):
        return torch.tanh(self.body(self.embed(x["tokens"])))

    def forward(self, x, spec, strategy):
        columns = {key: x[key] for key in ("advantages", "behaviour_logp", "token_weight")}
        if spec is None:
            logp, entropy, _ = self.head(self.hidden(x), x["ids"], strategy=strategy)
            return loss_of(logp, entropy, x)
        return self.head(self.hidden(x), x["ids"], spec, strategy=strategy, **columns).loss_sum

    def whole_logits(self, x, spec):
        log_p = F.linear(self.hidden(x), self.head.weight, self.head.bias).log_softmax(-1)
        logp, entropy = log_p.gather(-1, x["ids"][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        if spec is None:
            return loss_of(logp, entropy, x)
        ratio = (logp - x["behaviour_logp"]).exp()
        return (x["token_weight"] * (-ratio * x["advantages"] - spec.entropy_coef * entropy)).sum()


def loss_of(logp, entropy, x):
    return (x["token_weight"] * (logp * (x["advantages"] + 0.1 * logp) - 0.2 * entropy)).sum()


def batch(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)

    def ids():
        return torch.randint(0, VOCAB, (NUM_TOKENS,), generator=generator)

    x = {"tokens": ids(), "ids": ids(), "advantages": torch.randn(NUM_TOKENS, generator=generator)}
    x["behaviour_logp"] = -4 + 0.5 * torch.randn(NUM_TOKENS, generator=generator)
    return x | {"token_weight": torch.rand(NUM_TOKENS, generator=generator) / NUM_TOKENS}


def plain_torch(name, world):
    """Losses of rank 0 and weights after the steps, in one process: the mean over ranks is what DeepSpeed follows."""
    tied, frozen, spec, _ = CASES[name]
    model = Model(tied, frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = [model.whole_logits(batch(step, rank), spec) for rank in range(world)]
        (sum(found) / world).backward()
        optimizer.step()
        losses.append([float(loss.detach()) for loss in found])
    return losses, {key: value.detach().clone() for key, value in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# The program of a rank


def train(name, rank):
    """Losses, whole weights and what was seen of the sharding."""
    import deepspeed

    tied, frozen, spec, strategy = CASES[name]
    model = Model(tied, frozen)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 10_000}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {**zero, "stage3_prefetch_bucket_size": 10_000, "stage3_max_live_parameters": 10_000},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default clips to a norm of 1
        "steps_per_print": 1_000_000,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    weight = engine.module.head.weight
    seen = {"sizes": [weight.numel()], "inside": [], "ds_shape": tuple(weight.ds_shape)}
    engine.module.head.register_forward_pre_hook(lambda *_: seen["inside"].append(tuple(weight.shape)))
    losses = []
    for step in range(STEPS):
        loss = engine(batch(step, rank), spec, strategy)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
        seen["sizes"].append(weight.numel())
    try:
        linear_logprob(torch.zeros(2, WIDTH), weight, torch.zeros(2, dtype=torch.int64))
        seen["error"] = "none"
    except ValueError as error:
        seen["error"] = str(error)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        weights = {key: value.detach().clone() for key, value in engine.module.named_parameters()}
    return {"losses": losses, "weights": weights, **seen}


def main(folder, rank, world):
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    init = {"init_method": f"file://{folder}/store", "rank": int(rank), "world_size": int(world)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S / 3), **init)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    found = {}
    for name in CASES:
        print(time.strftime("%X"), name, flush=True)
        found[name] = train(name, int(rank))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a finished process alive


# ---------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """What the ranks of a world of one and of a world of two found; nothing of them is left running."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    processes, logs, codes = [], [], []
    folders = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2)}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for world, folder in folders.items():
            for rank in range(world):
                env = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "RANK": str(rank)}
                env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
                logs.append(folder / f"{rank}.txt")
                with open(logs[-1], "wb") as output:
                    command = [sys.executable, __file__, str(folder), str(rank), str(world)]
                    processes.append(
                        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **env})
                    )
        codes = [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["out of time"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    text = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
    assert codes == [0] * len(processes), f"exit codes {codes}:\n{text}"
    return {
        world: [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
        for world, folder in folders.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_it_trains_like_plain_torch(worlds, world, name):
    losses, weights = plain_torch(name, world)
    start = dict(Model(*CASES[name][:2]).named_parameters())
    for rank, found in enumerate(worlds[world]):
        assert found[name]["losses"] == pytest.approx([step[rank] for step in losses], rel=1e-5, abs=1e-6)
        assert found[name]["weights"].keys() == weights.keys()
        for key, value in found[name]["weights"].items():
            torch.testing.assert_close(
                value, weights[key], rtol=1e-5, atol=1e-6, msg=lambda text, k=key: f"{k}: {text}"
            )
    for key, value in weights.items():
        moved = float((value - start[key]).abs().max().detach())
        assert moved > 1e-3 if start[key].requires_grad else moved == 0, key


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_the_weight_is_whole_inside_of_its_module_only(worlds, world, name):
    for found in worlds[world]:
        assert found[name]["ds_shape"] == (VOCAB, WIDTH)
        assert found[name]["inside"] == [(VOCAB, WIDTH)] * STEPS
        assert found[name]["sizes"] == [0] * (STEPS + 1)
        assert "weight: a ZeRO-3 shard that is not gathered" in found[name]["error"]


if __name__ == "__main__":
    main(*sys.argv[1:])
