"""Whether two models mean the same by the same token id: what a comparison of their probabilities rests on.

It owns the check and the list of ends of a response that only one of them writes. It reads tokenizers and small files, and
refuses to load or fetch a model.
"""

import json
from pathlib import Path
from typing import Any

from fastreason.errors import ConfigError

# Ids that may stand in a sequence. Padding is never scored, ends of a response may differ.
SPECIAL = ("bos_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
SHOWN = 3


def check_same_vocabulary(
    model_dir: Path, teacher_dir: Path, *, trust_code: bool = False, trust_teacher_code: bool = False
) -> frozenset[int]:
    """Token ids that end a response for one of the two models alone; raises ConfigError where their vocabularies differ.

    A vocabulary padded to another size is the same; another id of an end of response is allowed.
    """
    from transformers import AutoTokenizer

    if model_dir.resolve() == teacher_dir.resolve():
        return frozenset()
    try:
        ours = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_code)
        theirs = AutoTokenizer.from_pretrained(teacher_dir, trust_remote_code=trust_teacher_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"teacher.path: the tokenizers cannot be compared: {error}") from error
    found = differences(ours, theirs)
    if found:
        more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ConfigError(
            f"teacher.path: {teacher_dir} has another tokenizer than model.path {model_dir}: {'; '.join(found[:SHOWN])}{more}. "
            "Probabilities can be compared token by token only within one vocabulary: use a teacher of the same family."
        )
    return end_ids(model_dir, ours) ^ end_ids(teacher_dir, theirs)


def differences(ours: Any, theirs: Any) -> list[str]:
    """What two tokenizers disagree on, in words."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    found = [
        f"{token!r} is {mine.get(token, 'missing')} here, {other.get(token, 'missing')} there"
        for token in sorted(mine.keys() | other.keys(), key=lambda token: mine.get(token, other.get(token, 0)))
        if mine.get(token) != other.get(token)
    ]
    for name in SPECIAL:
        ids = getattr(ours, name, None), getattr(theirs, name, None)
        if None not in ids and ids[0] != ids[1]:
            found.append(f"{name} is {ids[0]} here, {ids[1]} there")
    return found


def end_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The ids at which generation ends: the tokenizer's, and those of generation_config.json (else config.json)."""
    found = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return frozenset(found | set(ids if isinstance(ids, list) else [ids]))
    return frozenset(found)
