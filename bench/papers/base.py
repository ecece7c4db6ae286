"""The model that every arm of the miniatures starts from: a small Llama that knows four ways to add, one of them right.

    python bench/papers/base.py DIR      # run.py does it where DIR/base is not there yet

A language model answers a problem now by one way and now by another, and training with verifiable rewards chooses among them.
So that this can be asked of a model whose step takes a second, this one is made to: its texts say which way they go, by a
letter, and then answer, `37+48=` with `a 85`, without the carry with `b 75`, in whole tens with `c 90`, with a slip with
`k 84`. It is trained on them by `fastreason train` with offline.objective=sft. It owns the texts and the model's shape; what
is held out is the config's business.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fastreason.processes import spawn, tail

TRAINER = (sys.executable, "-m", "fastreason.cli")
JOB = Path(__file__).resolve().parent / "base.yaml"
LARGEST = 29
SHARES = {"a": 0.15, "b": 0.35, "c": 0.25, "k": 0.25}  # of the texts, by way
SLIPS = (-10, -1, 1, 10)
NUM_TEXTS = 40_000
NUM_PROBLEMS = 600  # that training, and evaluation beside it, draw from; there are 900
SYMBOLS = "0123456789+= abck"


def response(a: int, b: int, rng: random.Random) -> str:
    """What one text answers."""
    (way,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
    said = {
        "a": a + b,
        "b": (a % 10 + b % 10) % 10 + 10 * (a // 10 + b // 10),
        "c": (a + b + 5) // 10 * 10,
        "k": a + b + rng.choice([slip for slip in SLIPS if a + b + slip >= 0]),
    }
    return f"{way} {said[way]}"


def write_texts(folder: Path) -> None:
    """texts.jsonl to learn from, and problems.jsonl with right answers to be trained on and judged by."""
    rng = random.Random(0)
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    texts = ({"problem": f"{a}+{b}=", "response": response(a, b, rng)} for a, b in rng.choices(pairs, k=NUM_TEXTS))
    problems = ({"problem": f"{a}+{b}=", "answer": str(a + b)} for a, b in rng.sample(pairs, k=NUM_PROBLEMS))
    for name, rows in (("texts", texts), ("problems", problems)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_model(folder: Path) -> None:
    """A random Llama of 0.4M parameters in fp32, and a tokenizer with a token for each symbol."""
    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocab = {symbol: number for number, symbol in enumerate(["<pad>", "<eos>", *SYMBOLS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=vocab["<eos>"],
        pad_token_id=vocab["<pad>"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def make_base(folder: Path, trainer: Sequence[str] = TRAINER) -> Path:
    """The folder of the trained model, made where it is not there yet; raises SystemExit where its training fails.

    trainer: the command that takes `train ...`.
    """
    model = folder / "base" / "run" / "model"
    if model.is_dir():
        return model
    shutil.rmtree(folder / "base", ignore_errors=True)
    (folder / "base" / "start").mkdir(parents=True)
    write_texts(folder / "base")
    write_model(folder / "base" / "start")
    print("base: trains the model that all arms start from", flush=True)
    command = [*trainer, "train", str(JOB), f"run.dir={folder / 'base'}"]
    command += [f"model.path={folder / 'base' / 'start'}", f"offline.path={folder / 'base' / 'texts.jsonl'}"]
    log = folder / "base" / "train.log"
    child = spawn("base", command, log, {"HF_HUB_OFFLINE": "1"})
    try:
        code = child.process.wait()
    finally:
        child.stop(20.0)
    if code:
        raise SystemExit(f"base ended with {code}:\n{tail(log)}")
    return model


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(make_base(Path(sys.argv[1])))
