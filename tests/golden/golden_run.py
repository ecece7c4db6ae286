"""A small deterministic run of the real loop for each algorithm: real DeepSpeed, a tiny model, scripted rollouts.

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
ROWS = ("grpo", "reinforce")
STEPS, VOCABULARY = 3, 61


def make_config(row: str, model: Path) -> Any:
    from fastreason.config import parse_config

    return parse_config(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "data": {"task": "chain_sum"},
            "rollout": {"engine": "fake", "samples_per_prompt": 4, "max_new_tokens": 9, "temperature": 0.9},
            "algorithm": {"name": row},
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


def save_model(folder: Path) -> None:
    """A two-layer Llama whose weights are sines: the same numbers with every version of torch."""
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
                parameter.copy_((0.04 * torch.sin(index * (0.7 + 0.31 * number) + number)).reshape(parameter.shape))
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


def run(row: str, folder: Path) -> dict[str, Any]:
    """The figures of every step, and the checksum of the last weights."""
    import torch

    from fastreason.algorithms import resolve_algorithm
    from fastreason.checkpoint import CheckpointStore
    from fastreason.config import num_updates
    from fastreason.loop import Loop, Parts
    from fastreason.policy import load_policy
    from fastreason.ranks import Ranks
    from fastreason.sync import Publisher
    from fastreason.update.deepspeed import DeepSpeedUpdater

    save_model(folder / "model")
    config = make_config(row, folder / "model")
    policy = load_policy(folder / "model", config.model, "cpu", "sdpa", liger=False)
    rollouts, lines = ScriptedRollouts(), Lines()
    parts = Parts(
        config=config,
        algorithm=resolve_algorithm(config),
        updater=DeepSpeedUpdater(policy, config.train, "float32", num_updates(config)),
        ranks=Ranks(),
        publisher=Publisher(folder, torch.float32),
        checkpoints=CheckpointStore(folder, 1, False),
        run_dir=folder,
        layout="shared",
        pad_token_id=0,
        stop_requested=lambda: False,
        rollouts=rollouts,
        metrics=lines,  # type: ignore[arg-type]
    )
    assert Loop(parts).run()
    keys = ("loss/policy", "train/grad_norm", "train/lr", "loss/entropy", "loss/clip_share", "reward/mean")
    steps = [{"step": line["step"], **{key: line[key] for key in keys}} for line in lines.lines]
    return {"steps": steps, "checksum": rollouts.checksum}


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
            del result["checksum"]  # of this machine's rounding
        (target / f"{row}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # leftover threads of the libraries must not keep a finished process alive


if __name__ == "__main__":
    main(FOLDER if sys.argv[1] == "--accept" else Path(sys.argv[1]))
