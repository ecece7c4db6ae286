"""What an engine server elsewhere serves, in terms that a run can compare with its own: model, tokenizer, lengths, storage.

The server describes itself from its own files (`describe_server`), the run from its; a server that differs is refused before
it has been sent anything. Of the weights only samples are read, so that it takes no time and yet another training shows.
"""

import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import xxhash

from fastreason.errors import EngineError
from fastreason.exchange import published_file
from fastreason.rollout.connection import Connection
from fastreason.rollout.transfer import call_workers

PROBE_FILE = "probe"
SAMPLE_BYTES = 256  # at either end of every tensor
# Of config.json, what says nothing about the function that is computed.
UNTOLD = {"transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "architectures"}


def describe_model(model_dir: str, tokenizer_dir: str) -> dict[str, Any]:
    """A model folder's config, and digests of its vocabulary and of samples of its weights; what is missing is null."""
    folder = local_folder(model_dir)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {
        "config": {key: value for key, value in config.items() if key not in UNTOLD},
        "tokenizer": tokenizer_digest(local_folder(tokenizer_dir)),
        "weights": weights_digest(folder),
    }


def describe_server(
    model_dir: str, tokenizer_dir: str, max_model_len: int, dtype: str, probe: str, adapter_rank: int | None = None
) -> dict[str, Any]:
    """What a server says of itself; `probe` is a file of the run's exchange folder, whose content shows that it is seen.

    adapter_rank: of those that it applies beside its model, None where it takes whole weights.
    """
    content = None
    with contextlib.suppress(OSError, ValueError):
        content = published_file(probe).read_text(encoding="utf-8")
    described = describe_model(model_dir, tokenizer_dir)
    limits = {"max_model_len": max_model_len, "dtype": dtype, "adapter_rank": adapter_rank}
    return {**described, **limits, "probe": content}


def local_folder(name: str) -> Path:
    """A model's folder, also where it is named as on the hub and lies in the cache."""
    if not Path(name).is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    return Path(name)


def tokenizer_digest(folder: Path) -> str | None:
    """Of the vocabulary with its ids, however the file is laid out."""
    file = folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        vocabulary = sorted(Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).items())
        return xxhash.xxh3_128(json.dumps(vocabulary).encode()).hexdigest()
    for file in (folder / "tokenizer.model", folder / "vocab.json"):
        if file.is_file():
            return xxhash.xxh3_128(file.read_bytes()).hexdigest()
    return None


def weights_digest(folder: Path) -> str | None:
    """Of every tensor's name, type, shape, and bytes at both of its ends, in whatever files they lie; None without any."""
    tensors: dict[str, bytes] = {}
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                ends = []
                for position in (first, max(first, last - SAMPLE_BYTES)):
                    file.seek(8 + length + position)
                    ends.append(file.read(min(SAMPLE_BYTES, last - position)))
                tensors[name] = f"{name}|{entry['dtype']}|{entry['shape']}|".encode() + b"".join(ends)
    if not tensors:
        return None
    state = xxhash.xxh3_128()
    for name in sorted(tensors):
        state.update(tensors[name])
    return state.hexdigest()


def differences(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Why a server is of no use to a run, each as a clause that says what to do; empty where it can be used."""
    reasons = []
    ours, served = mine["config"], theirs["config"]
    keys = [key for key in sorted({*ours, *served}) if ours.get(key) != served.get(key)]
    if keys:
        named = ", ".join(f"{key} is {served.get(key)} there and {ours.get(key)} here" for key in keys[:3])
        reasons.append(f"it serves another model than model.path ({named}): start it with this run's model")
    elif mine["weights"] and mine["weights"] != theirs["weights"]:
        reasons.append("its model has other weights than model.path: start it with this run's model")
    if mine["tokenizer"] != theirs["tokenizer"]:
        reasons.append("its tokenizer has another vocabulary than the model's here")
    if theirs["max_model_len"] < mine["max_model_len"]:
        reasons.append(
            f"its longest sequence is {theirs['max_model_len']} tokens, and data.max_prompt_tokens + rollout.max_new_tokens = "
            f"{mine['max_model_len']}: start it with --max-model-len {mine['max_model_len']}"
        )
    if theirs["dtype"] != mine["dtype"]:
        reasons.append(
            f"it computes in {theirs['dtype']}, and the run in {mine['dtype']}: start it with model.dtype={mine['dtype']}"
        )
    if (theirs["adapter_rank"] is None) != (mine["adapter_rank"] is None) or (
        mine["adapter_rank"] is not None and theirs["adapter_rank"] < mine["adapter_rank"]
    ):
        here, there = (
            "whole weights" if each is None else f"adapters of ranks up to {each}"
            for each in (mine["adapter_rank"], theirs["adapter_rank"])
        )
        reasons.append(f"it takes {there}, and the run publishes {here}: start it with section lora of this run")
    if mine["probe"] != theirs["probe"]:
        reasons.append(
            f"it cannot read what this run writes into {mine['folder']}: mount the storage of rollout.exchange_dir at the same "
            "path there, and start it with that path as --exchange-dir"
        )
    return reasons


def make_verify(mine: dict[str, Any], probe: Path) -> Callable[[Connection], Awaitable[None]]:
    """Shows a server to `differences`; the returned check raises EngineError where it is not what the run needs.

    mine: of `describe_model`, and the run's max_model_len and dtype. probe: a file in the run's exchange folder.
    """
    mine = {**mine, "probe": probe.read_text(encoding="utf-8"), "folder": str(probe.parent)}

    async def verify(connection: Connection) -> None:
        try:
            theirs = (await call_workers(connection, "fastreason_describe", probe=str(probe)))[0]
        except EngineError as error:
            raise EngineError(
                f"the {connection.server} cannot say what it serves: start it with `fastreason serve`. {error}"
            ) from error
        try:
            reasons = differences(mine, theirs)
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"the {connection.server} does not say what this run must know ({type(error).__name__}: {error}): it is of "
                "another version of fastreason. Start it with the one of this run."
            ) from error
        if reasons:
            raise EngineError(f"the {connection.server} is of no use to this run: {'; '.join(reasons)}.")

    return verify
