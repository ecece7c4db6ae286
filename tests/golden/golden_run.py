"""A small deterministic run of the real loop for each family: real DeepSpeed, a tiny model, scripted rollouts.

    python tests/golden/golden_run.py FOLDER      run every row, write FOLDER/<row>.json
    python tests/golden/golden_run.py --accept    the same into this folder: the new numbers become the expected ones

The numbers may change only on purpose; say why in the commit that accepts them. Weights and rollouts come from formulas
and from `random.Random(text)`, not from torch's generators, which differ between versions.
"""

import json
import os
import random
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ADAPTIVE = {"kl_schedule": "adaptive", "kl_goal": 0.001, "kl_horizon": 20}
# What each run is told beside the name of its row, which is its own unless told otherwise.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "grpo": {},
    # The ratio is exactly 1 in the first update, and within a narrow clip's reach in the second.
    "grpo_trainer": {"algorithm": {"name": "grpo", "ratio_against": "trainer", "clip_low": 0.01, "clip_high": 0.01}},
    "reinforce": {},
    "reinforce_rej": {},
    "grpo_kl": {"algorithm": {"name": "grpo", "kl": "k3", "kl_coef": 0.05, **ADAPTIVE, "entropy_goal": 4.0}},
    "raft_pp": {},
    "gspo": {},
    "dapo": {},
    "remax": {},
    "ppo": {"critic": {"lr": 1e-3}},
    "iterative_dpo": {},
    "kdrl": {"algorithm": {"kl_mask": "wrong", "kl_coef": 0.1}, "teacher": {"dtype": "float32"}},
    "kd_rkl": {"teacher": {"dtype": "float32"}},
    "kdrl_exact": {"algorithm": {"name": "kdrl", "kl": "exact", "kl_coef": 0.2}, "teacher": {"dtype": "float32"}},
}
RESUMED = ("grpo_kl", "ppo")  # told to stop after two steps and resumed, they must end with the same weights
STEPS, VOCABULARY = 3, 61


def make_config(row: str, model: Path) -> Any:
    from fastreason.config import parse_config

    told = ROWS[row]
    teacher = told.get("teacher", {})
    return parse_config(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "teacher": {"path": str(model.with_name("teacher")), **teacher} if teacher else {},
            "critic": told.get("critic", {}),
            "data": {"task": "chain_sum"},
            "rollout": {"engine": "fake", "samples_per_prompt": 4, "max_new_tokens": 9, "temperature": 0.9},
            "algorithm": {"name": row, **told.get("algorithm", {})},
            # Two updates a step: the second is off-policy. Several micro-batches: their sums are part of the promise.
            "train": {
                "steps": STEPS,
                "prompts_per_step": 4,
                "prompts_per_update": 2,
                "lr": 1e-3,
                "warmup_steps": 2,
                "lr_schedule": "cosine",
                "micro_batch_tokens": 40,
                # A larger epsilon than usual: rounding noise in a tiny gradient must not become a whole step.
                "adam_eps": 1e-3,
                "max_grad_norm": 0.5,
                "device": "cpu",
            },
        }
    )


def save_model(folder: Path, size: float = 0.04, phase: float = 0.0) -> None:
    """A two-layer Llama whose weights are sines: the same with every version of torch; `size` and `phase` make another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        rope_theta=10000.0,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                index = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_(
                    (size * torch.sin(index * (0.7 + 0.31 * number) + number + phase)).reshape(parameter.shape)
                )
    model.save_pretrained(folder)


class ScriptedRollouts:
    """The producer's place: batch k is a function of k; its tokens carry the version published last."""

    def __init__(self) -> None:
        self.version = 0

    def start(self, version: int, trained: int, state: bytes | None) -> None:
        self.version = version

    def next_batch(self) -> Any:
        from fastreason.rollout.wire import Batch

        groups = [self._group(4 * self.version + number) for number in range(4)]
        return Batch(groups=groups, generate_s=1.0, grade_s=0.0, figures={})

    def _group(self, ticket: int) -> Any:
        from fastreason.types import Grade, Group, Prompt, Sample

        rng = random.Random(f"golden/{ticket}")
        samples = []
        for _ in range(4):
            length = rng.randint(2, 9)
            # One group in four is all right: no gradient for grpo. The longer responses are the better ones.
            reward = 1.0 if ticket % 4 == 3 or length > 5 else -1.0
            # Right responses become likelier, wrong ones less likely: a loss far from 0, which rounding does not reach.
            centre = -4.4 if reward > 0 else -3.9
            samples.append(
                Sample(
                    token_ids=[rng.randrange(1, VOCABULARY) for _ in range(length)],
                    sampler_logp=[centre + 0.8 * (rng.random() - 0.5) for _ in range(length)],
                    token_versions=[self.version] * length,
                    text="",
                    finish_reason="length" if length == 9 else "stop",
                    grade=Grade(reward=reward, correct=reward > 0),
                )
            )
        return Group(
            ticket=ticket,
            prompt=Prompt(id=str(ticket), text=""),
            prompt_token_ids=[rng.randrange(1, VOCABULARY) for _ in range(rng.randint(3, 8))],
            samples=samples,
            version_issued=self.version,
            greedy_reward=1.0 if ticket % 3 == 0 else -1.0,
        )

    def publish(self, update: Any, trained: int) -> Any:
        """Loads the weights as an engine does: their checksum stands for every bit of them."""
        from fastreason.exchange import Digest, read_weights
        from fastreason.types import LoadReport

        digest = Digest()
        for _ in read_weights(update.path, digest):
            pass
        assert digest.hexdigest() == update.checksum
        self.version, self.checksum = update.version, update.checksum
        return LoadReport(version=update.version, checksum=update.checksum, num_tensors=0, held_bytes=0)

    def evaluate(self, name: str) -> Any:
        raise AssertionError("the config holds nothing out")

    def save_state(self, trained: int, settle: bool) -> bytes:
        return b""


class Lines:
    """In the place of the metrics file."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def write(self, metrics: dict[str, float]) -> None:
        self.lines.append(metrics)


def make_parts(row: str, folder: Path, resume: bool) -> Any:
    """All that the loop uses; models beside the policy come from the composition root's own functions."""
    from types import SimpleNamespace

    import torch

    from fastreason import companions
    from fastreason.algorithms import resolve_algorithm
    from fastreason.checkpoint import CheckpointStore
    from fastreason.config import num_updates
    from fastreason.loop import Parts
    from fastreason.policy import load_policy
    from fastreason.ranks import Ranks
    from fastreason.sync import Publisher
    from fastreason.update.deepspeed import DeepSpeedUpdater

    config = make_config(row, folder / "model")
    algorithm, device = resolve_algorithm(config), torch.device("cpu")
    policy = load_policy(folder / "model", config.model, "cpu", "sdpa", liger=False)
    session: Any = SimpleNamespace(
        model_dir=str(folder / "model"), teacher_dir=config.teacher.path, critic_dir=None, attention="sdpa", liger=False
    )
    checkpoints = CheckpointStore(folder, 1, False)
    return Parts(
        config=config,
        algorithm=algorithm,
        updater=DeepSpeedUpdater(policy, config.train, "float32", num_updates(config)),
        ranks=Ranks(),
        publisher=Publisher(folder, torch.float32),
        checkpoints=checkpoints,
        run_dir=folder,
        layout="shared",
        pad_token_id=0,
        stop_requested=lambda: False,
        resume_from=checkpoints.latest() if resume else None,
        rollouts=ScriptedRollouts(),
        metrics=Lines(),  # type: ignore[arg-type]
        target=companions.load_target(session, config, algorithm, device, VOCABULARY),
        critic=companions.load_critic(session, config, device) if algorithm.critic else None,
    )


def run(row: str, folder: Path) -> dict[str, Any]:
    """The figures of every step, and the checksum of the last weights; that of a run resumed on the way."""
    from fastreason.loop import Loop

    save_model(folder / "model")
    save_model(folder / "teacher", size=0.12, phase=1.5)
    parts = make_parts(row, folder, resume=False)
    assert Loop(parts).run()
    keys = ("loss/policy", "train/grad_norm", "train/lr", "loss/entropy", "loss/clip_share", "reward/mean")
    own = ("kl/", "critic/", "pairs/", "loss/entropy_coef")
    steps = [
        {key: line[key] for key in ("step", *keys)} | {key: line[key] for key in line if key.startswith(own)}
        for line in parts.metrics.lines
    ]
    found = {"steps": steps, "checksum": parts.rollouts.checksum}
    if row in RESUMED:
        stopped = make_parts(row, folder, resume=False)
        loop = Loop(stopped)
        stopped.stop_requested = lambda: loop.step == 2
        assert not loop.run()
        resumed = make_parts(row, folder, resume=True)
        assert Loop(resumed).run()
        found["resumed"] = resumed.rollouts.checksum
    return found


def main(target: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(place)

    import torch

    from fastreason.update.deepspeed import initialise_distributed

    torch.set_num_threads(1)
    initialise_distributed("cpu")
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            result = run(row, Path(folder))
        if target == FOLDER:
            result = {"steps": result["steps"]}  # checksums are of this machine's rounding
        (target / f"{row}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # leftover threads of the libraries must not keep a finished process alive


if __name__ == "__main__":
    main(FOLDER if sys.argv[1] == "--accept" else Path(sys.argv[1]))
