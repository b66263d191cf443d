"""Lists of processor cores as people write them."""

from __future__ import annotations

from scion_adapters.errors import InvalidInputError


def parse_cores(text: str, field: str) -> frozenset[int]:
    """`"0,2-3"` -> {0, 2, 3}. Raises InvalidInputError, which names the setting `field`, for anything else."""
    cores: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit() and (not dash or (last.isascii() and last.isdigit()))):
            raise InvalidInputError(f'{field} = {text!r}: expected core numbers such as "2-3" or "0,2"', field=field)
        cores.update(range(int(first), int(last if dash else first) + 1))
    if not cores:
        raise InvalidInputError(f'{field} = {text!r}: the range is empty; write it as "2-3"', field=field)
    return frozenset(cores)
