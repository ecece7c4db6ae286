"""One entry to every kind of data source: `load_problems` reads it, `check_data` looks at it before a model loads."""

import logging
from pathlib import Path

from fastreason.config import DataConfig
from fastreason.data import generated, tables
from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt

log = logging.getLogger(__name__)


def load_problems(config: DataConfig) -> list[Prompt]:
    """All problems of the source, in its order, at least one.

    reasoning_gym gives `num_prompts` (default 2000) problems of different text, fewer where the task has no more; a
    file or a hub data set gives its first `num_prompts` (default all) rows that have an answer.

    Raises `DataError` for data that is missing, empty, malformed or lacks a column, `ConfigError` for a key that
    cannot work.
    """
    _check_keys(config)
    if config.source == "reasoning_gym":
        return generated.generate_problems(config)
    problems, num_without_answer = _read_table(config)
    if num_without_answer:
        log.warning("data.path=%s: dropped %d row(s) marked answer_missing", config.path, num_without_answer)
    return problems


def check_data(config: DataConfig) -> list[str]:
    """Look at the source cheaply and without the network; returns a sentence for each thing that stays unchecked.

    A task must exist and generate a problem; a file must exist, and its first rows must have the columns. Raises as
    `load_problems` does.
    """
    _check_keys(config)
    if config.source == "reasoning_gym":
        generated.generate_problems(config.model_copy(update={"num_prompts": 1}))
        return []
    if config.source == "hub" and not Path(str(config.path)).is_dir():
        return [f"data.path={config.path!r}: a hub data set; that it exists and has the columns is unchecked"]
    if config.source == "hub":
        return [f"data.path={config.path!r}: a local folder; its rows are unchecked"]
    few = config.model_copy(update={"num_prompts": min(config.num_prompts or 8, 8)})
    _read_table(few)
    return []


def _check_keys(config: DataConfig) -> None:
    if config.system_prompt is not None and not config.chat_template:
        raise ConfigError(
            "data.system_prompt is set but data.chat_template=false: a raw prompt has no system message. Write it into "
            "data.user_template, or use the chat template."
        )


def _read_table(config: DataConfig) -> tuple[list[Prompt], int]:
    rows = tables.file_rows(Path(str(config.path))) if config.source == "file" else tables.hub_rows(config)
    problems, num_without_answer = tables.map_rows(rows, config)
    if not problems:
        dropped = f" ({num_without_answer} row(s) are marked answer_missing)" if num_without_answer else ""
        raise DataError(f"data.path={config.path!r} holds no problem{dropped}. Point it at data with at least one row.")
    return problems, num_without_answer
