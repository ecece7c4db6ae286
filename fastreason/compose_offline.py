"""The composition root of an offline run's trainer: puts its parts together, and brings the reference's scores."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastreason.compose import collective_timeout_s, save_adapter_of
from fastreason.config import Config, num_updates
from fastreason.data.traces import TraceOrder, Traces, num_examples
from fastreason.device import prepare_device
from fastreason.metrics import MetricsLog, Progress, write_summary
from fastreason.objectives import resolve_objective
from fastreason.offline import OfflineLoop, OfflineParts, score_reference
from fastreason.offline_data import TRACES, offline_layout
from fastreason.reference import KeptScores
from fastreason.run_summary import versions
from fastreason.session import Outcome, Session, StopFlag


def run_offline(session: Session, config: Config) -> Outcome:
    """The trainer's process of an offline run, one of its ranks."""
    import torch

    from fastreason.beats import Beat
    from fastreason.checkpoint import CheckpointStore
    from fastreason.models import attention_tokens
    from fastreason.policy import load_policy
    from fastreason.ranks import Ranks
    from fastreason.sync import save_model
    from fastreason.trace import Trace
    from fastreason.update.deepspeed import DeepSpeedUpdater, initialise_distributed

    run_dir, model_dir = Path(session.run_dir), Path(session.model_dir)
    stop = StopFlag(session.stop_file)
    Beat(session.folder, f"trainer-{os.environ.get('RANK', '0')}").in_thread()
    device = prepare_device(session.device, config.train)
    initialise_distributed(session.device, collective_timeout_s(config))
    torch.manual_seed(config.run.seed)
    objective, traces = resolve_objective(config), Traces(run_dir / TRACES)
    policy = load_policy(model_dir, config.model, str(device), session.attention, session.liger, config.lora)
    store = CheckpointStore(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    epochs = config.offline.epochs
    parts = OfflineParts(
        config=config,
        objective=objective,
        updater=DeepSpeedUpdater(policy, config.train, config.model.dtype, num_updates(config)),
        ranks=Ranks(device),
        rows=traces,
        order=TraceOrder(
            len(traces),
            config.train.prompts_per_step,
            config.run.seed,
            None if epochs is None else num_examples(len(traces), epochs),
        ),
        checkpoints=store,
        layout=offline_layout(config, traces.report, session.attention, session.device),
        pad_token_id=policy.model.config.pad_token_id or 0,
        attention_tokens=attention_tokens(policy.model.config),
        stop_requested=stop,
        resume_from=store.latest() if session.resume and store.complete() else None,
    )
    if parts.ranks.is_first:
        # A run that was ended before its first checkpoint goes on from step 0.
        resume_step = parts.resume_from[1].step if parts.resume_from else 0 if session.resume else None
        parts.metrics = MetricsLog(run_dir, config.log, resume_step)
        parts.progress = Progress(run_dir, config.train.steps)
        parts.trace = Trace(run_dir if config.log.trace else None, "trainer")
    loop = OfflineLoop(parts)
    try:
        if objective.needs_reference and not bring_reference(
            parts, model_dir, run_dir / TRACES, traces.report.fingerprint
        ):
            return Outcome(finished=False)
        finished = loop.run()
    finally:
        parts.trace.close()
    if finished and config.checkpoint.save_model:
        if parts.progress is not None:
            parts.progress.update("save model", step=loop.step)
        dtype, end = getattr(torch, config.model.dtype), traces.report.end_token_id
        save_model(parts.updater, model_dir, run_dir / "model", dtype, end)
        save_adapter_of(parts.updater, config, run_dir)
    parts.ranks.barrier()
    if parts.metrics is not None:
        write_summary(run_dir / "summary.json", summary_of(loop, run_dir))
        parts.metrics.close()
    saved = store.complete()
    return Outcome(finished=finished, step=loop.step, saved=str(saved[-1]) if saved else None)


def bring_reference(parts: OfflineParts, model_dir: Path, folder: Path, traces: str) -> bool:
    """The pairs' scores under the initial weights: kept in `folder` or computed and kept; False where stopped.

    traces: the fingerprint of the data. Raises ConfigError or CheckpointError where a run that goes on lacks its own scores.
    """
    step = parts.resume_from[1].step if parts.resume_from else 0
    said, keep = None, lambda scores: None
    if parts.ranks.is_first:
        kept = KeptScores(
            folder, {"traces": traces, "model": fingerprint(model_dir), "dtype": parts.config.model.dtype}
        )
        # One rank may see a file that another does not see yet, so only one reads. A message may not be empty.
        said, keep = b"." + kept.read(step, len(parts.rows)).tobytes(), kept.append
    done = np.frombuffer(bytearray(parts.ranks.broadcast(said)[1:]), dtype=np.float64).reshape(-1, 2)
    parts.reference = score_reference(parts, done, keep)
    return parts.reference is not None


def fingerprint(model_dir: Path) -> str:
    """Names a model by the content of its config and weights."""
    digest = hashlib.sha256()
    for path in sorted([model_dir / "config.json", *model_dir.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def summary_of(loop: OfflineLoop, run_dir: Path) -> dict[str, Any]:
    """What the trainer knows of the run; the launcher adds the whole run's seconds and memory."""
    config, parts = loop.parts.config, loop.parts
    return {
        "run": run_dir.name,
        "seed": config.run.seed,
        "model": config.model.path,
        "objective": config.offline.objective,
        "updater": parts.updater.name,
        "layout": parts.layout,
        "steps": loop.step,
        "finished": loop.step == config.train.steps,
        "num_rows": len(parts.rows),
        "evals": {},
        "tokens_trained": loop.totals.tokens_trained,
        "train_wall_s": loop.totals.train_wall_s,
        "versions": versions(),
    }
