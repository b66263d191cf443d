"""Steps and durations: what is accepted, and what the refusal says."""

from __future__ import annotations

import math

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.rollout_plan import (
    MAX_STEPS,
    check_duration,
    check_steps,
    format_duration,
    format_share,
    parse_duration,
    parse_steps,
)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10%,50%,100%", (0.1, 0.5, 1.0)),
        ("0.1,0.5,1", (0.1, 0.5, 1.0)),
        (" 1% , 100% ", (0.01, 1.0)),
        ("100%", (1.0,)),
        ("1", (1.0,)),  # everybody, not one percent
        ("0.5%,1", (0.005, 1.0)),
    ],
)
def test_steps_are_read(text: str, steps: tuple[float, ...]) -> None:
    assert parse_steps(text) == pytest.approx(steps)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10,50,100", "did you mean 10%"),  # the unit is missing
        ("10%,50%", "does not end at 1.0"),
        ("50%,10%,100%", "does not ascend"),
        ("50%,50%,100%", "does not ascend"),
        ("0%,100%", "0 is not a share"),
        ("-10%,100%", "-0.1 is not a share"),
        ("10%,150%", "1.5 is not a share"),
        ("nan,1", "nan is not a share"),
        ("", "'' is not a share"),
        ("10%,,100%", "'' is not a share"),
        ("ten,100%", "'ten' is not a share"),
        ("10% 50% 100%", "is not a share"),
    ],
)
def test_steps_are_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as caught:
        parse_steps(text)
    assert caught.value.field == "steps"


def test_steps_are_bounded() -> None:
    with pytest.raises(InvalidInputError, match="0 given"):
        check_steps([])
    with pytest.raises(InvalidInputError, match=f"{MAX_STEPS + 1} given"):
        check_steps([n / (MAX_STEPS + 1) for n in range(1, MAX_STEPS + 2)])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1.5h", 5400.0),
        ("250ms", 0.25),
        ("2d", 172_800.0),
        ("4w", 2_419_200.0),
        ("0", 0.0),
        ("0s", 0.0),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("90", "did you mean 90s or 90m"),  # a unit would be a guess
        ("", "not a duration"),
        ("5 minutes", "not a duration"),
        ("-5m", "not a duration"),
        ("5m!", "not a duration"),
        ("m", "not a duration"),
        ("1e3s", "not a duration"),
        ("inf", "not a duration"),
    ],
)
def test_durations_are_refused_with_the_reason(text: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says) as caught:
        parse_duration(text)
    assert caught.value.field == "every"


@pytest.mark.parametrize("seconds", [0.25, 0.5, 7, 30, 60, 90, 300, 3600, 5400, 86_400, 90_061])
def test_a_duration_can_be_read_back(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


def test_a_step_ends_by_time_or_by_answers() -> None:
    assert check_duration(None, None, 300.0) == (300.0, None)  # nothing said: the configured time
    assert check_duration(0.0, None, 300.0) == (0.0, None)
    assert check_duration(None, 20, 300.0) == (None, 20)
    with pytest.raises(InvalidInputError, match="either every_s or after_requests"):
        check_duration(30.0, 20, 300.0)
    for every_s in (-1.0, math.inf, math.nan):
        with pytest.raises(InvalidInputError, match="every_s"):
            check_duration(every_s, None, 300.0)
    with pytest.raises(InvalidInputError, match="at least 1"):
        check_duration(None, 0, 300.0)


def test_shares_are_shown_as_percent() -> None:
    assert [format_share(share) for share in (0.1, 0.005, 0.333333, 1.0)] == ["10%", "0.5%", "33.33%", "100%"]
