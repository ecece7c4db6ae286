"""Verdicts on groups and the overshoot of responses, by hand."""

import pytest

from fastreason.filtering import FILTERS, overshoot, verdict
from fastreason.types import Grade, Group, Prompt, Sample


def sample(reward, correct, length=3, finish="stop"):
    return Sample(
        token_ids=[1] * length,
        sampler_logp=[-1.0] * length,
        token_versions=[0] * length,
        text="",
        finish_reason=finish,
        grade=Grade(reward=reward, correct=correct),
    )


def group(*answers):
    samples = [sample(reward, correct) for reward, correct in answers]
    prompt = Prompt(id="", text="")
    return Group(ticket=0, prompt=prompt, prompt_token_ids=[1], samples=samples, version_issued=0)


GROUPS = {
    "all right": group((1.0, True), (1.0, True)),
    "all wrong": group((0.0, False), (0.0, False)),
    "mixed": group((1.0, True), (0.0, False)),
    # With a format reward rewards differ where grades do not, and the other way round.
    "all right, unequal": group((1.0, True), (1.2, True)),
    "all wrong, unequal": group((0.0, False), (0.2, False)),
    "mixed, equal": group((0.5, True), (0.5, False)),
}
VERDICTS = {
    "none": {},
    "constant": {"all right": "constant", "all wrong": "constant", "mixed, equal": "constant"},
    "all_right": {"all right": "all_right", "all right, unequal": "all_right"},
    "all_wrong": {"all wrong": "all_wrong", "all wrong, unequal": "all_wrong"},
    "both": {
        "all right": "all_right",
        "all right, unequal": "all_right",
        "all wrong": "all_wrong",
        "all wrong, unequal": "all_wrong",
    },
}


@pytest.mark.parametrize("filter", VERDICTS)
def test_the_verdict_on_every_kind_of_group(filter):
    found = {name: verdict(each, filter) for name, each in GROUPS.items()}
    assert found == {name: VERDICTS[filter].get(name) for name in GROUPS}


def test_every_filter_is_tested_and_another_is_refused():
    assert set(VERDICTS) == set(FILTERS)
    with pytest.raises(ValueError, match=r"filter: got 'right', allowed: none \| constant"):
        verdict(GROUPS["mixed"], "right")


@pytest.mark.parametrize(
    ("length", "finish", "buffer", "share"),
    [
        (16, "length", 0, 1.0),
        (16, "stop", 0, 0.0),
        (3, "length", 0, 1.0),  # cut off at the model's own limit
        (3, "length", 4, 1.0),
        (12, "stop", 4, 0.0),
        (13, "stop", 4, 0.25),
        (15, "stop", 4, 0.75),
        (16, "stop", 4, 1.0),
        (2, "stop", 16, 0.125),
        (0, "stop", 16, 0.0),
    ],
)
def test_overshoot_by_hand(length, finish, buffer, share):
    assert overshoot(length, finish == "length", 16, buffer) == share
