"""Where a run goes on from, and whether anything is left of it to do; the answers of `--resume` before anything starts."""

from pathlib import Path

from fastreason.checkpoint import CheckpointStore, TrainerState, read_producer_state
from fastreason.config import Config, load_config
from fastreason.errors import ConfigError
from fastreason.ledger import LEDGER_FILE
from fastreason.metrics import METRICS_FILE, read_summary
from fastreason.replay import REPLAYED

START = TrainerState(step=0, version=0, num_groups=0, score=0.0)


def starting_point(config: Config, run_dir: Path, only: str | None) -> tuple[Path | None, TrainerState]:
    """The newest checkpoint and its state; (None, the start) of a run that was ended before its first.

    Raises ConfigError where the run is finished or was of one phase alone, CheckpointError where it is finished and has kept
    no checkpoint to train on from.
    """
    store = CheckpointStore(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    begins = not store.complete() and not read_summary(run_dir).get("finished")
    path, state = (None, START) if begins else store.latest()
    # How engines are given it is no part of what was trained.
    began = load_config(run_dir / "config.yaml").lora.model_copy(update={"publish": config.lora.publish})
    if path is not None and config.lora != began:
        raise ConfigError(
            f"--resume {run_dir}: its checkpoint holds what was trained with lora={began.model_dump()}, not "
            f"{config.lora.model_dump()}. Leave section lora as it was, or start a new run from its model."
        )
    offline = config.offline.objective is not None
    if state.step > config.train.steps or (state.step == config.train.steps and is_done(config, run_dir)):
        from fastreason.offline_data import how_to_train_on

        advice = how_to_train_on(config, run_dir) if offline else "Pass train.steps=N with a larger N to train on."
        raise ConfigError(
            f"--resume {run_dir}: its newest checkpoint is at step {state.step} of train.steps={config.train.steps}: it is "
            f"finished. {advice}"
        )
    if (run_dir / "groups").is_dir():
        raise ConfigError(f"--resume {run_dir}: a run of --only rollout cannot be resumed. Start a new run.")
    if not offline and only != "train" and has_replayed(run_dir, path):
        raise ConfigError(
            f"--resume {run_dir}: it was trained on written groups, and knows of no prompt that was issued. Add --only train "
            "--groups FOLDER."
        )
    return path, state


def is_done(config: Config, run_dir: Path) -> bool:
    """Whether a run whose steps are all done has also left everything else: the last evaluation, the model, the summary.

    One that was killed in between is gone through again, for what is missing.
    """
    summary = read_summary(run_dir)
    evaluates = config.eval.num_prompts and config.offline.objective is None
    return (
        summary.get("finished", False)
        and summary["steps"] == config.train.steps
        and ("after" in summary.get("evals", {}) or not evaluates)
        and ((run_dir / "model").is_dir() or not config.checkpoint.save_model)
    )


def has_replayed(run_dir: Path, checkpoint: Path | None) -> bool:
    """Whether a run has trained on written groups; without a checkpoint to tell, only a producer leaves a ledger."""
    if checkpoint is not None:
        return read_producer_state(checkpoint) == REPLAYED
    metrics = run_dir / METRICS_FILE
    return metrics.is_file() and metrics.stat().st_size > 0 and not (run_dir / LEDGER_FILE).exists()
