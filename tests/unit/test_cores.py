"""Lists of CPU cores as people write them."""

import pytest

from fastreason.cores import available_cores, parse_cores, require_cores
from fastreason.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("2,0", [0, 2]), ("0-1, 1-2 ,7", [0, 1, 2, 7]), ("5-5", [5])],
)
def test_parse_cores(text, cores):
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "0-", "-1", "1-0", "0,,1", "0:3", "1.5", "٣", "0-99999999999"])
def test_what_is_no_list_of_cores_names_the_key_and_the_value(text):
    with pytest.raises(ConfigError, match=r"train\.cores=") as caught:
        parse_cores(text, "train.cores")
    assert repr(text) in str(caught.value)


def test_require_cores_wants_them_to_exist():
    there = available_cores()
    assert require_cores(f"{there[0]}") == [there[0]]
    missing = max(there) + 1
    with pytest.raises(ConfigError, match=rf"\[{missing}\] are not available"):
        require_cores(f"{there[0]},{missing}")
