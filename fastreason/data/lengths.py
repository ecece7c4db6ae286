"""How long prompts and responses are: counted with a tokenizer, or in characters, summed up, and drawn."""

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from fastreason.config import DataConfig, ModelConfig
from fastreason.data.render import render_token_ids
from fastreason.errors import DataError, ModelError
from fastreason.models import check_model, model_folder, resolve_model
from fastreason.types import Prompt

COLOURS = ("#2f6db3", "#4f9d69", "#c0392b")
PERCENTILES = (5, 50, 95, 99)


class LengthCounter(Protocol):
    """Counts how long texts are, in `unit`."""

    unit: str

    def prompts(self, problems: Sequence[str]) -> list[int]: ...

    def responses(self, texts: Sequence[str]) -> list[int]: ...


class TokenCounter:
    """Lengths in tokens of a model's tokenizer."""

    unit = "tokens"

    def __init__(self, name: str, allow_download: bool = False) -> None:
        """Load the tokenizer of a folder, or of a model as in `model.path`; raises `DataError` where there is none."""
        from transformers import AutoTokenizer

        folder = _tokenizer_folder(name, allow_download)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise DataError(f"--tokenizer {name} cannot be loaded: {type(error).__name__}: {error}") from error
        has_template = bool(getattr(self._tokenizer, "chat_template", None))
        self._config = DataConfig(task="none", chat_template=has_template)

    def prompts(self, problems: Sequence[str]) -> list[int]:
        """Tokens of each problem as training renders it by default: through the chat template where there is one."""
        prompts = [Prompt(id="", text=problem, answer=None) for problem in problems]
        return [len(render_token_ids(prompt, self._config, self._tokenizer)) for prompt in prompts]

    def responses(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each response and 1 for the EOS that training adds."""
        if not texts:
            return []
        ids = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [len(item) + 1 for item in ids["input_ids"]]


def _tokenizer_folder(name: str, allow_download: bool) -> Path:
    """Where the tokenizer is; a hub name's small files are fetched if that is allowed, its weights never."""
    model = ModelConfig(path=name, allow_download=allow_download)
    try:
        if Path(name).is_dir():
            return model_folder(name)
        check_model(model, weights=False)
        return resolve_model(model, weights=False)
    except ModelError as error:
        told = (
            str(error).replace("model.path=", "--tokenizer ").replace("model.allow_download=true", "--allow-download")
        )
        raise DataError(told) from error


class CharacterCounter:
    """Lengths in characters, where there is no tokenizer."""

    unit = "characters"

    def prompts(self, problems: Sequence[str]) -> list[int]:
        return [len(problem) for problem in problems]

    def responses(self, texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]


class Lengths:
    """Series of lengths in their order of drawing, 4 bytes each."""

    def __init__(self, names: Sequence[str], unit: str) -> None:
        self.unit = unit
        self._series = {name: array("i") for name in names}

    def add(self, name: str, length: int) -> None:
        self._series[name].append(length)

    def summary(self) -> dict[str, dict[str, float]]:
        """Number, mean, percentiles and maximum of each series that is not empty."""
        rows = {}
        for name, series in self._series.items():
            if series:
                values = np.frombuffer(series, dtype=np.int32)
                percentiles = np.percentile(values, PERCENTILES).tolist()
                named = {f"p{p}": value for p, value in zip(PERCENTILES, percentiles, strict=True)}
                rows[name] = {"number": len(values), "mean": float(values.mean()), **named, "max": int(values.max())}
        return rows

    def draw(self, limits: Mapping[str, int | None], file: BinaryIO) -> None:
        """Write a PNG with a histogram for each series; a dashed line is the limit above which rows were dropped."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 2.3 * len(self._series)), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        panels = figure.subplots(len(self._series), 1, squeeze=False)[:, 0]
        for axes, colour, (name, series) in zip(panels, COLOURS, self._series.items(), strict=False):
            limit = limits.get(name)
            ends = "" if limit is None else f", limit {limit:,}"
            axes.set_title(f"{name}: {len(series):,} rows{ends}", loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
            if series:
                axes.hist(np.frombuffer(series, dtype=np.int32), bins=80, color=colour)
            # A limit far off would press the rest into a corner.
            if limit is not None and limit <= max(series, default=0):
                axes.axvline(limit, color="#333333", linestyle="--", linewidth=1)
            axes.set(xlabel=f"{self.unit}", ylabel="rows")
        canvas.print_png(file)
