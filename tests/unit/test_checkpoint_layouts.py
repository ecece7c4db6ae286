"""A checkpoint goes on with another number of ranks and another ZeRO stage: real DeepSpeed over gloo, one and two ranks.

This file is also the program of the ranks. One rank and two run at the same time: each saves every setting, waits until the
other has, and loads what the other has saved, at every stage.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_deepspeed_updater as ours
import torch

from fastreason.errors import CheckpointError
from fastreason.update.layouts import Layout, Piece, SavedState, read_saved

# What is trained, its dtype, and the ZeRO stages that it is saved and loaded at; the number of ranks differs too.
CASES = [
    *(("model", "float32", saved, stage) for saved, stage in ((0, 3), (2, 0), (3, 2))),
    *(("model", "bfloat16", saved, stage) for saved, stage in ((1, 3), (3, 1))),
    ("adapter", "bfloat16", 2, 3),
    ("critic", "float32", 3, 2),
]
NUM_DONE = 2
UNIT = 2.0**-24
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

# ---------------------------------------------------------------------------------------------------------------------
# What runs in the ranks


def make(kind: str, dtype: str, stage: int, blank: bool = False) -> Any:
    """An updater; blank: of other weights, so that what it has afterwards is the checkpoint's."""
    from fastreason.config import TrainConfig
    from fastreason.critic import ValueModel
    from fastreason.update.deepspeed import DeepSpeedCritic

    if kind == "adapter":
        return ours.make_updater(stage, ours.adapted_model(dtype, 2 if blank else 1), dtype)
    model = ours.tiny_model(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.mul_(0.0 if blank else 1.0)
    if kind == "model":
        return ours.make_updater(stage, model, dtype)
    train = TrainConfig(steps=1, prompts_per_step=1, lr=ours.PEAK, zero_stage=stage)
    return DeepSpeedCritic(ValueModel(model).train(), train, dtype, 4)


def one_update(updater: Any) -> dict[str, Any]:
    """An update of the same rows, whatever the number of ranks; each alone in its micro-batch, so that its own sums are too."""
    import torch.distributed as dist

    mine = ours.make_rows()[dist.get_rank() :: dist.get_world_size()]
    batches = ours.micro_batches(mine, len(mine))
    if hasattr(updater, "fit"):
        result = updater.fit(batches, lambda values, batch: (values - batch.advantages_N).square().sum(), 17.0)
        return {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
    return ours.run_updates(updater, batches, 1)[0]


def whole_state(updater: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Master and moments of every trained parameter, as DeepSpeed itself puts them together."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not updater._unwrapped and updater.engine.zero_optimization_stage() < 3:
        # DeepSpeed finds moments at the first step, and of its first group alone.
        updater.optimizer._hp_optimizer_states_linked = False
        updater.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in updater.engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if updater._unwrapped:
            adam = updater.optimizer.state[parameter]
            values = {"master": parameter.data, "exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}
        else:
            values = {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            values["master"] = safe_get_full_fp32_param(parameter)
        found[name] = {key: value.clone().flatten() for key, value in values.items()}
    return found


def adam_steps(updater: Any) -> set[float]:
    """How many updates Adam has counted, of each of the tensors that it updates on this rank."""
    adam = updater.optimizer if updater._unwrapped else updater.optimizer.optimizer
    return {float(state["step"]) for state in adam.state.values()}


def published(updater: Any) -> dict[str, torch.Tensor]:
    return ours.whole_weights(updater) if hasattr(updater, "weights") else {}


def job_save() -> dict[str, Any]:
    import torch.distributed as dist

    found = {}
    for kind, dtype, stage, _ in CASES:
        updater = make(kind, dtype, stage)
        for _ in range(NUM_DONE):
            one_update(updater)
        updater.save(HERE / f"{kind}-{dtype}-{stage}")
        state = {"published": published(updater), "state": whole_state(updater)}
        found[kind, dtype, stage] = state | {"next": one_update(updater), "after": published(updater)}
    dist.barrier()
    if dist.get_rank() == 0:
        (HERE / "done").touch()
    return found


def job_load() -> dict[str, Any]:
    import torch.distributed as dist

    other = HERE.with_name(str(3 - dist.get_world_size()))
    deadline = time.monotonic() + 300
    while not (other / "done").exists():
        assert time.monotonic() < deadline, "the other launch has not saved"
        time.sleep(0.1)
    found = {}
    for kind, dtype, saved, stage in CASES:
        updater = make(kind, dtype, stage, blank=True)
        updater.load(other / f"{kind}-{dtype}-{saved}")
        state = {"published": published(updater), "state": whole_state(updater), "steps": adam_steps(updater)}
        found[kind, dtype, saved, stage] = state | {"next": one_update(updater), "after": published(updater)}
    # The same ranks and another stage.
    updater = make("model", "float32", 3, blank=True)
    updater.load(HERE / "model-float32-2")
    found["same ranks"] = published(updater)
    return found


JOBS = {"save": job_save, "load": job_load}

# ---------------------------------------------------------------------------------------------------------------------
# The tests


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What was measured, by the number of ranks."""
    root = tmp_path_factory.mktemp("layouts")
    for num in (1, 2):
        (root / str(num)).mkdir()
    with ThreadPoolExecutor(2) as pool:
        runs = {num: pool.submit(ours.launch, root / str(num), num, list(JOBS), 500, __file__) for num in (1, 2)}
        return {num: run.result() for num, run in runs.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("kind", "dtype", "saved", "stage"), CASES)
def test_another_number_of_ranks_and_stage_goes_on_with_the_same_numbers(found, ranks, kind, dtype, saved, stage):
    """Masters, moments, publication: to the bit. The next loss: of rows that are computed alike, so to a sum's rounding."""
    before, after = found[3 - ranks]["save"][kind, dtype, saved], found[ranks]["load"][kind, dtype, saved, stage]
    assert_equal(after["published"], before["published"])
    assert sorted(after["state"]) == sorted(before["state"])
    for name, values in before["state"].items():
        assert_equal(after["state"][name], values)
        assert bool(values["exp_avg"].any()), f"{name}: nothing was trained, and equality shows nothing"
    assert after["steps"] == {NUM_DONE}
    assert after["next"]["lr"] == before["next"]["lr"]
    assert after["next"]["loss"] == pytest.approx(before["next"]["loss"], rel=1e-12)


def largest_moves(state: dict[str, torch.Tensor], gradient: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """How far an update may differ where the clipped gradient differs by at most `error`, elementwise, to first order times 2.

    w' = w - r (m' / c1) / (sqrt(v' / c2) + eps); m' and v' are the moments with the new gradient.
    """
    c1, c2 = 1 - BETA1 ** (NUM_DONE + 1), 1 - BETA2 ** (NUM_DONE + 1)
    m = (BETA1 * state["exp_avg"] + (1 - BETA1) * gradient) / c1
    root = ((BETA2 * state["exp_avg_sq"] + (1 - BETA2) * gradient.square()) / c2).sqrt() + EPS
    slope = (1 - BETA1) / c1 / root + m.abs() * (1 - BETA2) * gradient.abs() / c2 / root**3
    # And the roundings of the update itself: some of the move, and one of the weight.
    rate = ours.RATES[NUM_DONE]
    return 2 * rate * slope * error + UNIT * (8 * rate * (m / root).abs() + 2 * state["master"].abs())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("saved", "stage"), [case[2:] for case in CASES if case[:2] == ("model", "float32")])
def test_the_next_step_is_that_of_the_uninterrupted_run(found, ranks, saved, stage):
    """The rows' gradients are the same numbers, summed in another order: n - 1 additions, each rounding a partial sum once.

    So a sum of n is wrong by at most (n - 1) u sum |g|, and two of them differ by twice that. What clips it is one factor for
    all: of a norm that is summed pairwise, off by log2(17,000) / 2 u in each of two runs, and of three products: 20 u.
    """
    before = found[3 - ranks]["save"]["model", "float32", saved]
    model, rows = ours.tiny_model(), ours.make_rows()
    model.load_state_dict(before["published"], strict=False)
    gradients = []
    for row in rows:
        model.zero_grad()
        (ours.row_loss(model, row) / ours.DENOMINATOR).backward()
        gradients.append({name: p.grad.flatten().clone() for name, p in model.named_parameters()})
    total = {name: sum(g[name] for g in gradients) for name in gradients[0]}
    scale = ours.CLIP / float(torch.cat(list(total.values())).norm())
    after = found[ranks]["load"]["model", "float32", saved, stage]
    assert after["next"]["grad_norm"] == pytest.approx(before["next"]["grad_norm"], rel=1e-5)
    for name, tensor in before["after"].items():
        sizes = sum(g[name].abs() for g in gradients)
        error = scale * UNIT * (2 * (len(rows) - 1) * sizes + 20 * total[name].abs())
        bound = largest_moves(before["state"][f"model.{name}"], scale * total[name], error)
        excess = ((after["after"][name].flatten() - tensor.flatten()).abs() / bound).max()
        assert float(excess) <= 1, f"{name}, from ZeRO {saved} to {stage}: {float(excess):.2f} times its bound"
        moved = (tensor - before["published"][name]).abs().flatten()
        assert bool((moved > 10 * bound).float().mean() > 0.9), f"{name}: the bound is as wide as the step"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_from_one_checkpoint_zero_3_publishes_what_zero_2_does(found, ranks):
    expected = found[ranks]["save"]["model", "float32", 2]["published"]
    assert_equal(found[ranks]["load"]["same ranks"], expected)


def test_a_parameter_that_has_never_had_a_gradient_has_moments_of_zero():
    from fastreason.update.layouts import _blocks_of_plain

    adam = {1: {"exp_avg": torch.tensor([1.0]), "exp_avg_sq": torch.tensor([2.0]), "step": torch.tensor(5.0)}}
    weights = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([5.0])}
    saved = SavedState(Layout(0, 1, False), {})
    saved.add(_blocks_of_plain({"module": weights, "optimizer": {"state": adam}}, ["a", "b"]))
    assert saved.step == 5
    moments = torch.ones(2)
    saved.copy("exp_avg", "a", 0, moments)
    assert moments.tolist() == [0, 0]


def block_of(names, values):
    from fastreason.update.layouts import Block

    return Block(names, {"master": torch.tensor(values)})


def test_pieces_of_two_ranks_are_put_together_across_their_seam():
    saved = SavedState(Layout(2, 2, False), {})
    saved.add([block_of([Piece("a", 0, 3, 1)], [9.0, 0.0, 1.0, 2.0])])
    saved.add([block_of([Piece("a", 3, 2, 0), Piece("b", 0, 1, 2)], [3.0, 4.0, 7.0])])
    assert saved.whole("a", 5).tolist() == [0, 1, 2, 3, 4]
    assert saved.whole("b", 1).tolist() == [7]
    part = torch.empty(2)
    saved.copy("master", "a", 2, part)
    assert part.tolist() == [2, 3]
    assert saved.step is None
    with pytest.raises(CheckpointError, match="a: 1 of 6 elements"):
        saved.whole("a", 6)


def test_a_checkpoint_without_a_rank_s_file_is_refused(tmp_path):
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    torch.save({"ds_config": config, "dp_world_size": 2}, tmp_path / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointError, match=r"2 ranks, ZeRO 2, bfloat16.*ranks \[0\]"):
        read_saved(tmp_path, [])
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"no file of torch")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_saved(tmp_path, [])


if __name__ == "__main__":
    HERE = Path(sys.argv[1])
    ours.main(*sys.argv[1:], jobs=JOBS)
