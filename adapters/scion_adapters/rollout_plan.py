"""The plan of a rollout: its steps and how long each lasts, checked, and read from what a person types. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from scion_adapters.errors import InvalidInputError

MAX_STEPS = 100
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)")


def check_steps(steps: Sequence[float]) -> tuple[float, ...]:
    """The steps, or InvalidInputError: shares in (0, 1], ascending, the last one 1.0."""
    shown = ", ".join(f"{step:.4g}" for step in steps)
    expected = "expected shares of users in (0, 1], ascending, the last one 1.0 (100%), such as 10%,50%,100%"
    if not 1 <= len(steps) <= MAX_STEPS:
        raise InvalidInputError(f"steps: {len(steps)} given, 1 to {MAX_STEPS} allowed; {expected}", field="steps")
    for step in steps:
        if not (math.isfinite(step) and 0 < step <= 1):
            raise InvalidInputError(f"steps: {step:g} is not a share; {expected}", field="steps")
    if any(a >= b for a, b in pairwise(steps)):
        raise InvalidInputError(f"steps: {shown} does not ascend; {expected}", field="steps")
    if steps[-1] != 1.0:
        raise InvalidInputError(f"steps: {shown} does not end at 1.0; {expected}", field="steps")
    return tuple(float(step) for step in steps)


def check_duration(
    every_s: float | None, after_requests: int | None, default_every_s: float
) -> tuple[float | None, int | None]:
    """Exactly one of the two ways a step can end; the default time when neither is given."""
    if every_s is not None and after_requests is not None:
        raise InvalidInputError(
            "give either every_s or after_requests: a step ends by time or by answers", field="every_s"
        )
    if after_requests is not None:
        if after_requests < 1:
            raise InvalidInputError(
                f"after_requests: {after_requests} given, at least 1 needed", field="after_requests"
            )
        return None, after_requests
    every_s = default_every_s if every_s is None else every_s
    if not (math.isfinite(every_s) and every_s >= 0):
        raise InvalidInputError(f"every_s: {every_s:g} given, expected seconds, 0 or more", field="every_s")
    return every_s, None


def parse_steps(text: str) -> tuple[float, ...]:
    """`10%,50%,100%` or `0.1,0.5,1` -> shares. Raises InvalidInputError that names the part that is wrong."""
    steps = []
    for part in (part.strip() for part in text.split(",")):
        number, is_percent = (part[:-1], True) if part.endswith("%") else (part, False)
        try:
            share = float(number) / (100 if is_percent else 1)
        except ValueError:
            raise InvalidInputError(
                f"steps: {part!r} is not a share, expected a list such as 10%,50%,100% or 0.1,0.5,1", field="steps"
            ) from None
        if not is_percent and share > 1:
            raise InvalidInputError(f"steps: {part} is more than everybody; did you mean {part}%?", field="steps")
        steps.append(share)
    return check_steps(steps)


def parse_duration(text: str, *, field: str = "every") -> float:
    """`30s`, `5m`, `1h30m`, `500ms`, `2d`, `4w` -> seconds. A bare number but 0 is refused: its unit is a guess."""
    compact = text.strip().replace(" ", "")
    if compact == "0":
        return 0.0
    amounts = _AMOUNT.findall(compact)
    if not amounts or "".join(number + unit for number, unit in amounts) != compact:
        guess = f"; did you mean {compact}s or {compact}m?" if compact.isdigit() else ""
        raise InvalidInputError(
            f"{field}: {text!r} is not a duration, expected one such as 30s, 5m or 1h30m{guess}", field=field
        )
    return sum(float(number) * _UNITS_S[unit] for number, unit in amounts)


def format_duration(seconds: float) -> str:
    """Seconds as `1h30m`, `5m`, `0.25s`."""
    if seconds < 60 or seconds != int(seconds):
        return f"{seconds:.4g}s"
    parts, rest = [], int(seconds)
    for unit in ("d", "h", "m", "s"):
        count, rest = divmod(rest, int(_UNITS_S[unit]))
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def format_share(share: float) -> str:
    """0.1 as `10%`."""
    return f"{share * 100:.4g}%"
