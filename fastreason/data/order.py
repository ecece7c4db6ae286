"""Which prompts are held out, and the order in which the others are asked: functions of a seed, nothing else.

Orders come from sorting by `random.Random(text).random()`, which Python promises to keep as it is; `shuffle` is not
promised.
"""

import hashlib
import random
import unicodedata
from collections.abc import Sequence
from typing import Any

from fastreason.errors import ConfigError, DataError
from fastreason.types import Prompt


def normalise_text(text: str) -> str:
    """The text by which two problems are the same: NFC, case and runs of white space ignored."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def split_held_out(
    problems: Sequence[Prompt], num_held_out: int, seed: int, min_train: int = 1
) -> tuple[list[Prompt], list[Prompt]]:
    """`(train, held_out)`: `num_held_out` problems chosen by `seed`, and those whose text is none of theirs.

    Both keep the order of `problems`. Of several problems with the same normalised text the first is held out and the
    others are dropped. Raises `ConfigError` where fewer than `min_train` problems would remain for training.
    """
    if num_held_out == 0:
        held_out: list[Prompt] = []
        train = list(problems)
    else:
        texts = [normalise_text(problem.text) for problem in problems]
        first_of: dict[str, int] = {}
        for index, text in enumerate(texts):
            first_of.setdefault(text, index)
        candidates = list(first_of.values())
        chosen = sorted(candidates[i] for i in permutation(len(candidates), f"held-out/{seed}")[:num_held_out])
        held_out = [problems[index] for index in chosen]
        held_texts = {texts[index] for index in chosen}
        train = [problem for problem, text in zip(problems, texts, strict=True) if text not in held_texts]
    if len(held_out) < num_held_out or len(train) < min_train:
        raise ConfigError(
            f"eval.num_prompts={num_held_out}: of {len(problems)} problems, {len(train)} would remain for "
            f"training, and at least {min_train} are needed. Hold out fewer, or give more problems."
        )
    return train, held_out


class PromptCursor:
    """An endless, resumable walk over the training prompts: every epoch all of them, each epoch in another order.

    The order is a function of `seed`, the epoch and the number of prompts, on every machine.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        """Raises `DataError` without prompts."""
        if not prompts:
            raise DataError("there is no training prompt to walk over. Give more data, or hold out less of it.")
        self._prompts = list(prompts)
        self._seed = seed
        self._fingerprint = _fingerprint(self._prompts)
        self._move_to(0, 0)

    @property
    def epoch(self) -> int:
        """Complete walks before the prompt that comes next."""
        return self._epoch

    def next(self) -> Prompt:
        """The next prompt."""
        prompt = self._prompts[self._order[self._position]]
        if self._position + 1 < len(self._prompts):
            self._position += 1
        else:
            self._move_to(self._epoch + 1, 0)
        return prompt

    def state(self) -> dict[str, Any]:
        """Where the walk stands, as JSON-able data: `load_state` of a cursor over the same data continues there."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "num_prompts": len(self._prompts),
            "fingerprint": self._fingerprint,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; raises `DataError` where the prompts or the seed are not the same."""
        mine = self.state()
        for key, meaning in (
            ("num_prompts", "number of training prompts"),
            ("fingerprint", "fingerprint of their ids and texts"),
            ("seed", "seed of their order"),
        ):
            if state.get(key) != mine[key]:
                raise DataError(
                    f"the saved position belongs to other data: its {meaning} is {state.get(key)!r}, now it is "
                    f"{mine[key]!r}. Resume with the data section and run.seed of the run, or start a new run."
                )
        epoch, position = state.get("epoch"), state.get("position")
        if (
            not isinstance(epoch, int)
            or not isinstance(position, int)
            or epoch < 0
            or not 0 <= position < len(self._prompts)
        ):
            raise DataError(
                f"the saved position epoch={epoch!r}, position={position!r} is impossible: a damaged checkpoint?"
            )
        self._move_to(epoch, position)

    def _move_to(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = permutation(len(self._prompts), f"order/{self._seed}/{epoch}")


def permutation(size: int, key: str) -> list[int]:
    """The numbers below `size` in an order that is a function of `key`, on every machine."""
    source = random.Random(key)
    keys = [source.random() for _ in range(size)]
    return sorted(range(size), key=lambda index: (keys[index], index))


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        for part in (prompt.id, prompt.text):
            data = part.encode("utf-8", "replace")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]
