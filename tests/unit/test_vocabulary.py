"""Whether two models speak the same tokens, by their tokenizers on disk."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastreason.errors import ConfigError
from fastreason.vocabulary import check_same_vocabulary

WORDS = ["<pad>", "<s>", "</s>", "<end>", "one", "two", "three"]


def save(folder, words=WORDS, ends=None, **special):
    """A model's folder without a model: a tokenizer, and where a generation ends."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=None))
    tokens = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "<pad>"} | special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(words)}))
    if ends is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model")


def test_the_same_vocabulary_passes_whatever_the_padding(tmp_path, model):
    teacher = save(tmp_path / "teacher", pad_token="three")
    (teacher / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128}))
    assert check_same_vocabulary(model, teacher) == frozenset()
    assert check_same_vocabulary(model, model) == frozenset()


def test_another_vocabulary_is_refused_by_its_first_differences(tmp_path, model):
    other = [*WORDS[:4], "two", "one", "three", "four"]
    with pytest.raises(
        ConfigError, match=r"teacher\.path: .*'one' is 4 here, 5 there; 'two' is 5 here, 4 there; 'four' is"
    ):
        check_same_vocabulary(model, save(tmp_path / "teacher", other))


def test_another_beginning_is_refused(tmp_path, model):
    with pytest.raises(ConfigError, match="bos_token_id is 1 here, 3 there"):
        check_same_vocabulary(model, save(tmp_path / "teacher", bos_token="<end>"))


@pytest.mark.parametrize(
    ("ours", "theirs", "differ"),
    [
        ({}, {"eos_token": "<end>"}, {2, 3}),
        ({"ends": [2, 3]}, {"eos_token": "<end>", "ends": [2, 3]}, set()),
        ({"ends": 2}, {"ends": [3, 2]}, {3}),
    ],
)
def test_ends_of_one_model_alone_are_named(tmp_path, ours, theirs, differ):
    assert check_same_vocabulary(save(tmp_path / "a", **ours), save(tmp_path / "b", **theirs)) == differ


def test_a_teacher_without_a_tokenizer_names_the_key(tmp_path, model):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"teacher\.path: the tokenizers cannot be compared"):
        check_same_vocabulary(model, tmp_path / "empty")
