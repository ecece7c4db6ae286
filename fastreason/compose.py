"""The composition root of the run's processes: the only place that chooses implementations.

`run_producer` and `run_trainer` are what the hidden subcommands of the command line call, each in a process of its own.
"""

import asyncio
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastreason.config import Config, load_config, num_updates
from fastreason.errors import FastreasonError, InterruptedWaitError, StuckError
from fastreason.metrics import Progress
from fastreason.patience import Patience
from fastreason.processes import die_with_parent
from fastreason.run_folder import share
from fastreason.run_summary import write_run_summary
from fastreason.session import Outcome, Session, StopFlag, read_session, write_outcome
from fastreason.trace import Trace


def run_process(name: str) -> int:
    """Run one process of a session to its end; whatever happens, the launcher finds an outcome."""
    die_with_parent()
    session = read_session()
    share(Path(session.run_dir))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = load_config(Path(session.run_dir) / "config.yaml")
    bodies: dict[str, Callable[[Session, Config], Outcome]] = {
        "producer": run_producer,
        "trainer": trainer_body(config),
        "collector": run_collector,
    }
    body = bodies[name]
    label = name if name != "trainer" else f"trainer-{os.environ.get('RANK', '0')}"
    try:
        outcome = body(session, config)
    except InterruptedWaitError:
        outcome = Outcome(finished=False)  # told to stop before anything was trained
    except FastreasonError as error:
        outcome = Outcome(finished=False, error=str(error))
    except BaseException as error:
        traceback.print_exc()
        stuck = explain_stuck(error) if name == "trainer" else None
        message = stuck or f"{type(error).__name__}: {error}"
        outcome = Outcome(finished=False, error=message, expected=stuck is not None)
    write_outcome(session, label, outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    # Leftover threads of the libraries (gloo, tokenizers) must not keep a finished process alive.
    os._exit(1 if outcome.error else 0)


def trainer_body(config: Config) -> Callable[[Session, Config], Outcome]:
    """What a trainer's process runs."""
    if config.offline.objective is None:
        return run_trainer
    from fastreason.compose_offline import run_offline

    return run_offline


def explain_stuck(error: BaseException) -> str | None:
    from fastreason.ranks import explain_timeout

    return explain_timeout(error)


def load_tokenizer(session: Session, config: Config) -> Any:
    return load_tokenizer_of(Path(session.model_dir), config)


def load_tokenizer_of(folder: Path, config: Config) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)


def run_producer(session: Session, config: Config) -> Outcome:
    from fastreason.algorithms import resolve_algorithm
    from fastreason.beats import Beat
    from fastreason.data import PromptCursor, load_problems, render_messages, render_token_ids, split_held_out
    from fastreason.engine_clients import make_engine, make_teacher
    from fastreason.filtering import verdict
    from fastreason.rewards import check_prompts, resolve_rewards
    from fastreason.rollout.books import Books
    from fastreason.rollout.graders import GraderPool
    from fastreason.rollout.grading import Grading
    from fastreason.rollout.producer import Producer
    from fastreason.rollout.reward_model import RewardModelClient

    if config.rollout.engine == "hf" and config.rollout.cores:
        from fastreason.cores import require_cores

        os.sched_setaffinity(0, require_cores(config.rollout.cores, "rollout.cores"))
    run_dir = Path(session.run_dir)
    problems = load_problems(config.data)
    spec = resolve_rewards(config.reward)
    check_prompts(spec, problems)
    train, held_out = split_held_out(problems, config.eval.num_prompts, config.data.seed)
    tokenizer = load_tokenizer(session, config)
    reward_model = RewardModelClient(config.reward) if spec.needs_reward_model else None
    grading = Grading(spec, GraderPool(config.reward), reward_model, partial(render_messages, config=config.data))
    progress = Progress(run_dir, config.train.steps)
    trace = Trace(run_dir if config.log.trace else None, "producer")
    algorithm = resolve_algorithm(config)
    render = partial(render_token_ids, config=config.data, tokenizer=tokenizer)
    rollouts = only_rollouts(config) if session.only == "rollout" else config

    async def main() -> None:
        books = Books(
            rollouts, PromptCursor(train, config.run.seed), render, len(train), run_dir, Path(session.spool_dir)
        )
        producer = Producer(
            rollouts,
            make_engine(session, config, lambda *event: producer.note(*event)),
            grading,
            books,
            held_out,
            tokenizer,
            render,
            len(train),
            run_dir,
            on_progress=lambda phase, done, total: progress.update(phase, done=done, total=total),
            on_ready=session.ready_file.touch,
            reject=partial(verdict, filter=algorithm.filter if algorithm.filtered == "refill" else "none"),
            trace=trace,
            greedy=algorithm.greedy_baseline,
            teacher=make_teacher(config),
            sleeps=session.sleeps,
            # One that takes the place of another finds the engine as the trainer's turn wants it.
            starts_asleep=session.sleeps and not session.ready_file.exists(),
        )
        beat = asyncio.create_task(Beat(session.folder, "producer").in_loop())
        await grading.start()
        try:
            await producer.serve(session.socket_path)
        finally:
            beat.cancel()
            await grading.close()
            trace.close()

    progress.update("start engine")
    asyncio.run(main())
    return Outcome(finished=True)


def only_rollouts(config: Config) -> Config:
    """The config of a run that generates and never trains: no version follows the first, so admission must not wait for one."""
    rollout = config.rollout
    limit = rollout.max_running_groups or (rollout.max_staleness + 1) * config.train.prompts_per_step
    return config.model_copy(
        update={
            "rollout": rollout.model_copy(
                update={"max_staleness": config.train.steps, "max_running_groups": limit, "order": "issued"}
            )
        }
    )


def run_collector(session: Session, config: Config) -> Outcome:
    """In place of the trainer: takes every batch and writes it down."""
    from fastreason.replay import collect

    run_dir = Path(session.run_dir)
    progress = Progress(run_dir, config.train.steps)
    client = make_rollouts(session, config, StopFlag(session.stop_file))

    def on_batch(number: int) -> None:
        client.collected()
        progress.update("generate", done=number, total=config.train.steps, step=number)

    client.start(0, 0, None)
    progress.update("generate", step=0)
    done = collect(client, run_dir / "groups", config.train.steps, on_batch)
    client.stop()
    return Outcome(finished=done == config.train.steps, step=done)


def run_trainer(session: Session, config: Config) -> Outcome:
    import torch

    from fastreason.algorithms import resolve_algorithm
    from fastreason.beats import Beat
    from fastreason.checkpoint import CheckpointStore
    from fastreason.companions import load_critic, load_target
    from fastreason.device import prepare_device
    from fastreason.loop import Loop, Parts
    from fastreason.metrics import MetricsLog, SampleLog
    from fastreason.models import attention_tokens
    from fastreason.policy import choose_layout, load_policy
    from fastreason.ranks import Ranks
    from fastreason.sync import save_model
    from fastreason.tenancy import Tenancy
    from fastreason.update.deepspeed import DeepSpeedUpdater, initialise_distributed

    run_dir = Path(session.run_dir)
    stop = StopFlag(session.stop_file)
    Beat(session.folder, f"trainer-{os.environ.get('RANK', '0')}").in_thread()
    client = await_engine(session, config, stop) if session.colocated else None
    device = prepare_device(session.device, config.train)
    initialise_distributed(session.device, collective_timeout_s(config))
    torch.manual_seed(config.run.seed)
    algorithm = resolve_algorithm(config)
    policy = load_policy(
        Path(session.model_dir), config.model, str(device), session.attention, session.liger, config.lora
    )
    num_columns = policy.head.weight.shape[0]
    updater = DeepSpeedUpdater(policy, config.train, config.model.dtype, num_updates(config))
    ranks = Ranks(device)
    dtype = getattr(torch, config.model.dtype)
    store = CheckpointStore(run_dir, config.checkpoint.keep_last, config.checkpoint.keep_best)
    resume_from = store.latest() if session.resume and store.complete() else None
    parts = Parts(
        config=config,
        algorithm=algorithm,
        updater=updater,
        ranks=ranks,
        publisher=make_publisher(session, config, device, policy.model),
        checkpoints=store,
        run_dir=run_dir,
        layout=choose_layout(config.train.share_prompts, session.attention, session.device),
        pad_token_id=policy.model.config.pad_token_id or 0,
        attention_tokens=attention_tokens(policy.model.config),
        stop_requested=stop,
        resume_from=resume_from,
        target=load_target(session, config, algorithm, device, num_columns, updater),
        critic=load_critic(session, config, device) if algorithm.critic else None,
        silent=frozenset(session.silent_ids),
        tenancy=Tenancy(session.tenant_file, ranks) if session.sleeps else None,
    )
    if ranks.is_first:
        # A run that was ended before its first checkpoint goes on from step 0.
        resume_step = resume_from[1].step if resume_from else 0 if session.resume else None
        parts.metrics = MetricsLog(run_dir, config.log, resume_step)
        parts.samples = SampleLog(run_dir, config.log, resume_step)
        parts.progress = Progress(run_dir, config.train.steps)
        parts.trace = Trace(run_dir if config.log.trace else None, "trainer")
        parts.rollouts = client = client or make_rollouts(session, config, stop)
    loop = Loop(parts)
    try:
        finished = loop.run()
    except BaseException:
        parts.trace.close()  # the last second of the timeline is what one wants to see of a run that failed
        raise
    if finished and config.checkpoint.save_model:
        if parts.progress is not None:
            parts.progress.update("save model", step=loop.step)
        save_model(updater, Path(session.model_dir), run_dir / "model", dtype)
        save_adapter_of(updater, config, run_dir)
    ranks.barrier()
    if ranks.is_first:
        write_run_summary(run_dir, config, loop)
        assert parts.metrics is not None and parts.samples is not None
        parts.metrics.close()
        parts.samples.close()
        parts.trace.close()
        assert client is not None
        client.stop()
    saved = store.complete()
    return Outcome(finished=finished, step=loop.step, saved=str(saved[-1]) if saved else None)


def save_adapter_of(updater: Any, config: Config, run_dir: Path) -> None:
    """Write what a run with an adapter has trained as a folder of its own, beside the merged model; on all ranks."""
    if config.lora.rank is None:
        return
    from fastreason.lora import save_adapter

    tensors = list(updater.adapter())
    if updater.rank == 0:
        save_adapter(tensors, updater.engine.module.model, config.model.path, run_dir / "adapter")


def make_publisher(session: Session, config: Config, device: Any, model: Any) -> Any:
    """The trainer's side of `rollout.transport`."""
    import torch

    from fastreason import sync
    from fastreason.lora import save_settings

    def open_group(port: int, world_size: int) -> Any:
        from fastreason.rollout.vllm_api import open_group

        return open_group(port, world_size)

    dtype = getattr(torch, config.model.dtype)
    if config.lora.applied_by_engine:
        return sync.AdapterPublisher(
            Path(session.exchange_dir), dtype, partial(save_settings, model, config.model.path)
        )
    return sync.make_publisher(config.rollout.transport, Path(session.exchange_dir), dtype, device, open_group)


def collective_timeout_s(config: Config) -> float:
    """Longest wait of one rank for another: rank 0 may itself wait for an evaluation, a batch and a producer's restart."""
    return 3 * config.run.timeout_s + config.rollout.startup_timeout_s


def make_rollouts(session: Session, config: Config, stop: StopFlag) -> Any:
    """The producer, or with `--only train` the groups that an earlier run has written."""
    if session.only == "train":
        from fastreason.replay import ReplayRollouts

        assert session.groups_dir is not None
        return ReplayRollouts(Path(session.groups_dir))
    from fastreason.rollout.client import ProducerClient

    return ProducerClient(
        session.socket_path,
        config.run.timeout_s,
        config.rollout.startup_timeout_s + 60,
        stop,
        may_rejoin=config.run.max_restarts > 0,
    )


def await_engine(session: Session, config: Config, stop: StopFlag) -> Any:
    """Wait until the engine on these GPUs has taken its memory, and has given it up again where it sleeps; for every rank.

    vLLM measures at its start what others leave free. Rank 0 gets the producer's client, the others None.
    """
    if os.environ.get("RANK", "0") == "0":
        client = make_rollouts(session, config, stop)
        if session.sleeps:
            session.tenant_file.touch()
        return client
    patience = Patience(config.rollout.startup_timeout_s + 60)
    while not session.ready_file.exists():
        if stop():
            raise InterruptedWaitError("told to stop while starting")
        patience.look()
        if patience.exhausted:
            raise StuckError(
                f"waited {patience.limit_s:g} s for the engine that this rank shares its GPU with to start"
            )
        time.sleep(0.1)
    return None
