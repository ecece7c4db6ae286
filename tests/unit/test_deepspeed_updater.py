"""The DeepSpeed updater against a plain torch AdamW loop: real DeepSpeed over gloo, in processes of its own.

This file is also the program that those processes run (`python test_deepspeed_updater.py FOLDER JOB...`): a job writes
what it measured to FOLDER/<job>-<rank>.pt, and the tests judge it. Several jobs share a process, because importing
DeepSpeed takes longer than most of them.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

PEAK, DECAY, CLIP, TEMPERATURE, DENOMINATOR = 3e-3, 0.1, 0.05, 0.8, 17.0
RATES = [PEAK / 2, PEAK, PEAK * 2 / 3]  # linear schedule over 4 updates, one of them warm-up
FIVE_RATES = [PEAK * share for share in (0.5, 1, 0.8, 0.6, 0.4)]  # the same over 6
STAGES = (0, 1, 2, 3)
QUIET = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# fp32, three updates. Adam divides by the root of the second moment, so rounding of a small gradient is magnified.
CLOSE = {"rtol": 1e-4, "atol": 2e-6}

# ---------------------------------------------------------------------------------------------------------------------
# What runs in the ranks


def tiny_model(dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype)


def make_rows(num: int = 6) -> list[Any]:
    """Rows of ragged lengths; the sampler's log-probabilities are off, so that some ratios are clipped."""
    from fastreason.packing import Row

    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, 61, (count,), generator=generator).tolist()

    rows = []
    for index in range(num):
        count = 2 + index % 4
        logp = (-4.1 + 0.5 * torch.randn(count, generator=generator)).tolist()
        rows.append(Row(tokens(3 + index), tokens(count), logp, (-1.0) ** index * (1 + index / 2), 1.0 + index / 8))
    return rows


def micro_batches(rows: list[Any], num: int, layout: Any = "padded", sampler: bool = True) -> list[Any]:
    from fastreason.packing import collate

    batches = [collate([[row] for row in rows[i::num]], layout) for i in range(num)]
    for batch in batches:
        batch.behaviour_logp_N = batch.sampler_logp_N if sampler else None
    return batches


def make_updater(stage: int, model: Any, dtype: str = "float32", num_updates: int = 4, **train: Any) -> Any:
    from fastreason.config import TrainConfig
    from fastreason.policy import Policy
    from fastreason.update.deepspeed import DeepSpeedUpdater

    keys: dict[str, Any] = {
        "steps": 1,
        "prompts_per_step": 1,
        "lr": PEAK,
        "lr_schedule": "linear",
        "warmup_steps": 1,
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "zero_stage": stage,
    }
    return DeepSpeedUpdater(Policy(model).train(), TrainConfig(**(keys | train)), dtype, num_updates)


def spec() -> Any:
    from fastreason.losses import LOSSES

    return LOSSES["clip"]


def run_updates(updater: Any, batches: list[Any], num: int = 3) -> list[dict[str, Any]]:
    results = [updater.update(batches, spec(), TEMPERATURE, DENOMINATOR) for _ in range(num)]
    return [
        {
            "loss": r.loss,
            "grad_norm": r.grad_norm,
            "lr": r.lr,
            "applied": r.applied,
            "clip_share": float(torch.cat([output.clipped for output in r.outputs]).float().mean()),
        }
        for r in results
    ]


def whole_weights(updater: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in updater.weights()}


def row_loss(model: Any, row: Any) -> torch.Tensor:
    """One row's summed loss, of whole logits."""
    ids = torch.tensor([row.prompt + row.response])
    logits = model(ids).logits[0, len(row.prompt) - 1 : -1] / TEMPERATURE
    logp = logits.log_softmax(-1).gather(-1, ids[0, len(row.prompt) :, None])[:, 0]
    ratio = (logp - torch.tensor(row.sampler_logp)).exp()
    clipped = ratio.clamp(0.8, 1.2)
    return -(row.token_weight * torch.minimum(ratio * row.advantage, clipped * row.advantage)).sum()


def plain_torch(rows: list[Any], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The specification: whole logits, the textbook PPO clip, clip_grad_norm_, torch's AdamW. Knows nothing of ours."""
    model = tiny_model().to(dtype)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], lr=PEAK, eps=1e-8
    )
    results = []
    for rate in FIVE_RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        total = sum(row_loss(model, row) for row in rows)
        (total / DENOMINATOR).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        results.append({"loss": float(total.detach()) / DENOMINATOR, "grad_norm": float(norm), "lr": rate})
    return {"results": results, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}


def job_stages() -> dict[str, Any]:
    """Five updates at every stage, this rank's share of the rows in one micro-batch and in three."""
    import torch.distributed as dist

    import fastreason.update.deepspeed as module

    module.GATHER_BYTES = 8192  # several buckets
    rows, found = make_rows(), {}
    if dist.get_rank() == 0:
        found["torch"] = plain_torch(rows)
        found["exact"] = plain_torch(rows, torch.float64)
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    for stage in STAGES:
        for num in (1, 3):
            updater = make_updater(stage, tiny_model(), num_updates=6)
            batches = micro_batches(mine, num, "shared" if num == 3 else "padded")
            logp = updater.logprobs(batches, spec(), TEMPERATURE) if num == 1 else None
            results = run_updates(updater, batches, len(FIVE_RATES))
            found[f"zero-{stage}/{num}"] = {"results": results, "weights": whole_weights(updater), "logp": logp}
    return found


def job_memory() -> dict[str, Any]:
    """The same five updates with what saves memory: offload, and activations that are computed again.

    On a CPU device and host are one memory, so what is shown is that DeepSpeed takes the keys and the numbers stay. Not what a
    GPU would save, nor copies that overlap with its work.
    """
    import torch.distributed as dist

    mine, found = make_rows()[dist.get_rank() :: dist.get_world_size()], {}
    for stage, offload, again in ((1, "cpu", False), (2, "cpu", False), (3, "cpu_weights", False), (3, "none", True)):
        model = tiny_model()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        updater = make_updater(stage, model, num_updates=6, offload=offload)
        zero = updater.engine._config.zero_config
        found[f"zero-{stage}/{offload}/{again}"] = {
            "devices": [str(part.device) for part in (zero.offload_optimizer, zero.offload_param) if part],
            "results": run_updates(updater, micro_batches(mine, 3), len(FIVE_RATES)),
            "weights": whole_weights(updater),
        }
    return found


def job_untied() -> dict[str, Any]:
    updaters = {stage: make_updater(stage, tiny_model(tied=False)) for stage in (2, 3)}
    return {
        "expected": sorted(tiny_model(tied=False).state_dict()),
        "names": {stage: sorted(whole_weights(updater)) for stage, updater in updaters.items()},
    }


def job_settings() -> dict[str, Any]:
    """Which optimizer DeepSpeed wraps ours in, for bf16 at stage 0."""
    return {"bf16 at stage 0": type(make_updater(0, tiny_model(torch.bfloat16), "bfloat16").engine.optimizer).__name__}


def job_saved_names() -> dict[str, Any]:
    """The names and shapes in a checkpoint that transformers itself writes."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        tiny_model().save_pretrained(folder)
        return {n: tuple(t.shape) for n, t in load_file(Path(folder) / "model.safetensors").items()}


def job_resume() -> dict[str, Any]:
    """Two updates, save, one more; and in a new updater: load, one more."""
    import tempfile

    import torch.distributed as dist

    rows, found = make_rows(), {}
    batches = micro_batches(rows[dist.get_rank() :: dist.get_world_size()], 2)
    settings = [(2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16")]
    if dist.get_world_size() == 1:
        settings += [(0, "float32"), (1, "float32")]
    for stage, dtype in settings:
        torch_dtype = getattr(torch, dtype)
        shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared)
        folder = Path(str(shared[0]))
        first = make_updater(stage, tiny_model(torch_dtype), dtype)
        run_updates(first, batches, 2)
        first.save(folder / "updater")
        dist.barrier()
        went_on = run_updates(first, batches, 1), whole_weights(first)
        second = make_updater(stage, tiny_model(torch_dtype), dtype)
        second.load(folder / "updater")
        loaded = run_updates(second, batches, 1), whole_weights(second)
        found[f"zero-{stage}/{dtype}"] = {"went_on": went_on, "loaded": loaded}
        third = make_updater(
            stage, tiny_model(torch_dtype), dtype, weight_decay=0.25, max_grad_norm=0.5, adam_beta2=0.95
        )
        third.load(folder / "updater")
        groups = {(group["weight_decay"], group["betas"][1]) for group in third.optimizer.param_groups}
        found[f"zero-{stage}/{dtype}"]["settings"] = groups, getattr(third.optimizer, "clip_grad", 0.5)
        dist.barrier()
        if dist.get_rank() == 0:
            import shutil

            shutil.rmtree(folder)
    return found


def job_bfloat16() -> dict[str, Any]:
    """A hundred updates, each smaller than half of what bf16 can resolve in a weight; and a sum of tiny micro-batches."""
    found: dict[str, Any] = {}
    rows = make_rows(2)
    for stage in STAGES[1:]:
        model = tiny_model(torch.bfloat16)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        constant = {"lr": 3e-6, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
        updater = make_updater(stage, model, "bfloat16", 200, **constant, max_grad_norm=1e9)
        batches = micro_batches(rows, 1, sampler=False)
        one = updater.update(batches, spec(), TEMPERATURE, 1.0).grad_norm
        for _ in range(99):
            updater.update(batches, spec(), TEMPERATURE, 1.0)
        after = whole_weights(updater)
        row = make_rows(1)[0]
        updater = make_updater(stage, tiny_model(torch.bfloat16), "bfloat16", 200, **constant, max_grad_norm=1e9)
        whole = updater.update(micro_batches([row], 1, sampler=False), spec(), TEMPERATURE, 1.0).grad_norm
        parts = micro_batches([row], 1, sampler=False) + [micro_batches([row], 1, sampler=False)[0] for _ in range(100)]
        for part in parts[1:]:
            part.advantages_N *= 1 / 1000
        summed = updater.update(parts, spec(), TEMPERATURE, 1.0).grad_norm
        found[f"zero-{stage}"] = {"before": before, "after": after, "one": one, "whole": whole, "summed": summed}
        for dither in (True, False):
            updater = make_updater(stage, tiny_model(torch.bfloat16), "bfloat16", 200, **constant, dither=dither)
            start = whole_weights(updater)
            updater.update(batches, spec(), TEMPERATURE, 1.0)
            found[f"zero-{stage}"][f"dither {dither}"] = start, whole_weights(updater)
    return found


def job_not_finite() -> dict[str, Any]:
    """A gradient that is not finite, then a good one."""
    found = {}
    settings = [(stage, "float32") for stage in STAGES] + [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")]
    for stage, dtype in settings:
        updater = make_updater(stage, tiny_model(getattr(torch, dtype)), dtype)
        batches = micro_batches(make_rows(), 1)
        before = whole_weights(updater)
        first = updater.update(batches, spec(), TEMPERATURE, float("nan"))
        after = whole_weights(updater)
        second = run_updates(updater, batches, 1)[0]
        found[f"zero-{stage}/{dtype}"] = {
            "applied": [first.applied, second["applied"]],
            "unchanged": all(torch.equal(before[n], after[n]) for n in before),
            "finite": all(bool(t.isfinite().all()) for t in whole_weights(updater).values()),
        }
    return found


def job_skip() -> dict[str, Any]:
    """An update, one without a row, another update, on every rank."""
    import torch.distributed as dist

    batches = micro_batches(make_rows()[dist.get_rank() :: dist.get_world_size()], 1)
    found = {}
    for stage, dtype in ((2, "float32"), (3, "bfloat16")):
        updater = make_updater(stage, tiny_model(getattr(torch, dtype)), dtype)
        first = run_updates(updater, batches, 1)[0]
        before = whole_weights(updater)
        skipped = updater.skip()
        after = whole_weights(updater)
        last = run_updates(updater, batches, 1)[0]
        found[f"zero-{stage}/{dtype}"] = {
            "lr": [first["lr"], skipped.lr, last["lr"]],
            "empty": (skipped.empty, skipped.outputs),
            "unchanged": all(torch.equal(before[n], after[n]) for n in before),
            "moved": not all(torch.equal(t, after[n]) for n, t in whole_weights(updater).items()),
        }
    return found


def adapted_model(dtype: str, seed: int) -> Any:
    """The tiny model frozen, with an adapter on body and head that moves it."""
    from fastreason.config import LoraConfig
    from fastreason.lora import add_adapter

    model = tiny_model(getattr(torch, dtype), tied=False)
    torch.manual_seed(seed)
    add_adapter(model, LoraConfig(rank=4, head=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def job_adapter() -> dict[str, Any]:
    """As `job_resume`, of an adapter: what is published, what a checkpoint holds, and the reference that is not a copy."""
    import shutil
    import tempfile

    import torch.distributed as dist

    from fastreason.frozen import AdapterOff, FrozenModel

    def reference(updater: Any) -> list[torch.Tensor]:
        policy = FrozenModel(AdapterOff(updater.engine.module, updater.engine), torch.device("cpu"))
        return policy.logprobs(batches, spec(), TEMPERATURE)

    rows, found = make_rows(), {}
    batches = micro_batches(rows[dist.get_rank() :: dist.get_world_size()], 2)
    settings = [(2, "float32"), (3, "float32"), (2, "bfloat16"), (3, "bfloat16")]
    for stage, dtype in [(0, "float32"), *settings] if dist.get_world_size() == 1 else settings:
        shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(shared)
        folder = Path(str(shared[0]))
        first = make_updater(stage, adapted_model(dtype, 1), dtype)
        parts = {"start": whole_weights(first), "reference": reference(first)}
        parts["results"] = run_updates(first, batches, 2)
        first.save(folder / "updater")
        dist.barrier()
        parts["saved"] = whole_weights(first)
        parts["went_on"] = run_updates(first, batches, 1), whole_weights(first)
        parts["reference after"] = reference(first)
        parts["adapter"] = {name: tensor.clone() for name, tensor in first.adapter()}
        second = make_updater(stage, adapted_model(dtype, 2), dtype)
        second.load(folder / "updater")
        parts["loaded"] = whole_weights(second)
        parts["loaded went_on"] = run_updates(second, batches, 1), whole_weights(second)
        file = folder / "updater" / "state" / f"{'zero_pp_rank_0_' if stage == 3 else ''}mp_rank_00_model_states.pt"
        parts["file"] = sorted(torch.load(file, weights_only=False)["module"])
        found[f"zero-{stage}/{dtype}"] = parts
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)
    return found


JOBS = {
    "adapter": job_adapter,
    "skip": job_skip,
    "stages": job_stages,
    "memory": job_memory,
    "untied": job_untied,
    "settings": job_settings,
    "saved_names": job_saved_names,
    "resume": job_resume,
    "bfloat16": job_bfloat16,
    "not_finite": job_not_finite,
}


def main(folder: str, *names: str, jobs: dict[str, Any] = JOBS) -> None:
    import torch.distributed as dist

    from fastreason.update.deepspeed import initialise_distributed

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    initialise_distributed("cpu")
    for job in names:
        print(time.strftime("%X"), job, flush=True)
        torch.save(jobs[job](), Path(folder) / f"{job}-{dist.get_rank()}.pt")
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may keep a finished process alive


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def launch(folder: Path, num_ranks: int, jobs: list[str], timeout_s: float, program: str = __file__) -> dict[str, Any]:
    """Run jobs under torch's elastic launcher; returns rank 0's results by job. Nothing of it is left running."""
    log = folder / "log.txt"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--max-restarts=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, program, str(folder), *jobs],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **QUIET},
            start_new_session=True,
        )
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
    assert code == 0, f"exit code {code}:\n{log.read_text(errors='replace')[-4000:]}"
    return {job: torch.load(folder / f"{job}-0.pt", weights_only=False) for job in jobs}


def end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its ranks, which have sessions of their own."""
    import psutil

    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("one"), 1, list(JOBS), 540)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("two"), 2, ["adapter", "stages", "memory", "untied", "resume", "skip"], 540)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The Euclidean norm of the difference, over all weights."""
    assert sorted(found) == sorted(expected)
    squares = [(tensor.double() - expected[name].double()).square().sum() for name, tensor in found.items()]
    return float(torch.stack(squares).sum().sqrt())


def assert_same_training(found: dict[str, Any], stages: dict[str, Any]) -> None:
    """As the rule of the kernels: no further from the same training in fp64 than plain torch in fp32 is, but for a slack of 2.

    Both round every sum once an addition, in another order; nothing else may differ. A loss and a norm pass through some dozens
    of sums, one after another, each of which rounds by a unit or so: 64 units of 2^-24.
    """
    plain, exact = stages["torch"], stages["exact"]
    for got, true in zip(found["results"], exact["results"], strict=True):
        assert got["applied"]
        assert got["lr"] == pytest.approx(true["lr"], rel=1e-12)
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(true[key], rel=64 * 2.0**-24), key
    assert distance(found["weights"], exact["weights"]) <= 2 * distance(plain["weights"], exact["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_trains_like_plain_torch(one_rank, stage, num_micro_batches):
    assert_same_training(one_rank["stages"][f"zero-{stage}/{num_micro_batches}"], one_rank["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_like_plain_torch(two_ranks, stage, num_micro_batches):
    assert_same_training(two_ranks["stages"][f"zero-{stage}/{num_micro_batches}"], two_ranks["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_saves_memory_changes_no_number(one_rank, two_ranks, ranks):
    found = (one_rank if ranks == 1 else two_ranks)["memory"]
    devices = [each["devices"] for each in found.values()]
    assert devices == [["cpu"], ["cpu"], ["cpu", "cpu"], []]
    for each in found.values():
        assert_same_training(each, (one_rank if ranks == 1 else two_ranks)["stages"])


@pytest.mark.slow
def test_the_plain_loop_clips_moves_and_has_clipped_ratios(one_rank):
    """Without these the comparison above would prove less than it says."""
    results = one_rank["stages"]["torch"]["results"]
    assert all(result["grad_norm"] > 2 * CLIP for result in results)
    start = dict(tiny_model().named_parameters())
    moved = [float((t - start[n].detach()).abs().max()) for n, t in one_rank["stages"]["torch"]["weights"].items()]
    assert min(moved) > 2e-4
    stages = one_rank["stages"]
    way = distance(stages["exact"]["weights"], {name: tensor.detach() for name, tensor in start.items()})
    assert distance(stages["torch"]["weights"], stages["exact"]["weights"]) < 1e-4 * way
    shares = [result["clip_share"] for result in one_rank["stages"]["zero-2/1"]["results"]]
    assert all(0 < share < 1 for share in shares), "in each update some tokens are clipped and some are not"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_logprobs_are_those_of_whole_logits(one_rank, stage):
    model, rows = tiny_model(), make_rows()
    expected = []
    for row in rows:
        ids = torch.tensor([row.prompt + row.response])
        logp_TV = (model(ids).logits[0, len(row.prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        expected.append(logp_TV.gather(-1, ids[0, len(row.prompt) :, None])[:, 0])
    (found,) = one_rank["stages"][f"zero-{stage}/1"]["logp"]
    torch.testing.assert_close(found, torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_what_transformers_would_save(one_rank, two_ranks, ranks, stage):
    found = (one_rank if ranks == 1 else two_ranks)["stages"][f"zero-{stage}/1"]["weights"]
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == one_rank["saved_names"]
    assert "lm_head.weight" not in found


@pytest.mark.slow
def test_an_untied_head_is_published(one_rank, two_ranks):
    for found in (one_rank["untied"], two_ranks["untied"]):
        assert "lm_head.weight" in found["expected"]
        assert found["names"] == {2: found["expected"], 3: found["expected"]}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loaded_checkpoint_continues_bit_for_bit(one_rank, two_ranks, ranks):
    for setting, found in (one_rank if ranks == 1 else two_ranks)["resume"].items():
        (results, weights), (loaded_results, loaded_weights) = found["went_on"], found["loaded"]
        assert loaded_results == results, setting
        assert results[0]["lr"] == pytest.approx(RATES[2]), setting
        for name, tensor in weights.items():
            assert torch.equal(tensor, loaded_weights[name]), f"{setting}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_goes_on_has_the_settings_that_it_is_given(one_rank, two_ranks, ranks):
    for setting, found in (one_rank if ranks == 1 else two_ranks)["resume"].items():
        assert found["settings"] == ({(0.25, 0.95), (0.0, 0.95)}, 0.5), setting


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_adapter_trains_alone_is_published_merged_and_continues_bit_for_bit(one_rank, two_ranks, ranks):
    jobs = (one_rank if ranks == 1 else two_ranks)["adapter"]
    for setting, found in jobs.items():
        dtype = getattr(torch, setting.split("/")[1])
        base = dict(tiny_model(dtype, tied=False).named_parameters())
        assert sorted(found["start"]) == sorted(base) and found["start"]["lm_head.weight"].dtype == dtype
        results, after = found["went_on"]
        assert all(result["applied"] for result in [*found["results"], *results])
        for name, tensor in base.items():
            rests = tensor.ndim == 1 or "embed" in name
            assert torch.equal(after[name], tensor) == rests, f"{setting}: {name}"
            assert torch.equal(found["loaded"][name], found["saved"][name]), f"{setting}: {name}"
            assert torch.equal(found["loaded went_on"][1][name], after[name]), f"{setting}: {name}"
        assert found["loaded went_on"][0] == results, setting
        # The base is not in a checkpoint, under none of its names.
        assert found["file"] and all("lora_" in name for name in found["file"]), setting
        assert {name.split(".")[-2] for name in found["adapter"]} == {"lora_A", "lora_B"}
        for before, later in zip(found["reference"], found["reference after"], strict=True):
            assert torch.equal(before, later), setting
    for dtype in ("float32", "bfloat16"):
        two, three = jobs[f"zero-2/{dtype}"], jobs[f"zero-3/{dtype}"]
        assert all(torch.equal(tensor, three["start"][name]) for name, tensor in two["start"].items())
        assert all(torch.equal(a, b) for a, b in zip(two["reference"], three["reference"], strict=True))
    for name, tensor in jobs["zero-2/float32"]["went_on"][1].items():
        torch.testing.assert_close(tensor, jobs["zero-3/float32"]["went_on"][1][name], **CLOSE)
        torch.testing.assert_close(tensor, one_rank["adapter"]["zero-0/float32"]["went_on"][1][name], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_skipped_update_rests_weights_and_optimizer_but_counts_in_the_schedule(one_rank, two_ranks, ranks):
    for setting, found in (one_rank if ranks == 1 else two_ranks)["skip"].items():
        assert found["lr"] == pytest.approx(RATES), setting
        assert found["empty"] == (True, []) and found["unchanged"], setting
        assert found["moved"], setting


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_updates_below_bf16_resolution_accumulate(one_rank, stage):
    """lr 3e-6 against a spacing of at least 4.9e-4 for weights over 1/16: only fp32 master weights ever move them."""
    found = one_rank["bfloat16"][f"zero-{stage}"]
    moved, total = 0, 0
    for name, before in found["before"].items():
        after = found["after"][name]
        assert after.dtype == torch.bfloat16
        large = (before.abs() > 1 / 16) & (before.abs() < 1 / 4)
        moved += int((before != after)[large].sum())
        total += int(large.sum())
    assert total > 1000
    assert moved > 0.1 * total


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_dithered_masters_let_a_first_update_through_in_the_mean(one_rank, stage):
    found = one_rank["bfloat16"][f"zero-{stage}"]
    lr, moved = 3e-6, {}
    for dither in (True, False):
        start, after = found[f"dither {dither}"]
        assert all(torch.equal(start[name], weight) for name, weight in found["before"].items()), (
            "the start is the model"
        )
        # Adam's first update is lr for every weight with a gradient; these are so large that bf16 resolves 10 lr and more.
        large = {
            name: weight.abs() > 0.008 for name, weight in start.items() if "norm" not in name and "embed" not in name
        }
        moves = torch.cat([(after[n].float() - start[n].float()).abs()[mask] for n, mask in large.items()])
        assert len(moves) > 1000
        moved[dither] = float(moves.mean()) / lr
    assert moved[False] == 0
    assert moved[True] == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_gradients_of_bf16_micro_batches_are_summed_in_fp32(one_rank, stage):
    """g + 100 * g / 1000 = 1.1 g; in bf16 each thousandth is less than half a unit of the sum and is lost."""
    found = one_rank["bfloat16"][f"zero-{stage}"]
    assert found["whole"] > 0
    assert found["summed"] == pytest.approx(1.1 * found["whole"], rel=0.01)


@pytest.mark.slow
def test_bf16_without_zero_runs_as_stage_1(one_rank):
    """DeepSpeed's own bf16 wrapper at stage 0 (FP16_UnfusedOptimizer) sums in bf16 and starts Adam one step late."""
    assert one_rank["settings"] == {"bf16 at stage 0": "BF16_Optimizer"}


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_reported_and_leaves_the_weights_alone(one_rank):
    for setting, found in one_rank["not_finite"].items():
        assert found == {"applied": [False, True], "unchanged": True, "finite": True}, setting


if __name__ == "__main__":
    main(*sys.argv[1:])
