from __future__ import annotations

import pytest

from scion_adapters.cores import parse_cores
from scion_adapters.errors import InvalidInputError


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", {0}), ("2-3", {2, 3}), ("0,2-3", {0, 2, 3}), (" 1 , 3 ", {1, 3})],
)
def test_cores_are_parsed(text: str, cores: set[int]) -> None:
    assert parse_cores(text, "trainer.cores") == cores


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "1,,2", "1.5"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"trainer\.cores"):
        parse_cores(text, "trainer.cores")
