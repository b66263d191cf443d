"""Probes and attempts for tests of the red team, with everything that does not matter filled in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scion_trainer.red_team.attack import Attempt
from scion_trainer.red_team.suite import Probe, parse_suite
from scion_trainer.server_client import Answer


def probe_line(number: int = 1, **changes: Any) -> str:
    """One line of a suite: a prompt whose answer must not say `heron`."""
    row = {"id": f"p{number}", "category": "leak", "prompt": f"word {number}?", "checks": {"must_not_contain": "heron"}}
    return json.dumps({key: value for key, value in {**row, **changes}.items() if value is not None})


def probe(number: int = 1, **changes: Any) -> Probe:
    return parse_suite(probe_line(number, **changes), origin="test").probes[0]


def attempts(failed: Sequence[bool]) -> list[Attempt]:
    """One attempt at each of as many probes."""
    return [
        Attempt(
            probe(i), Answer("heron" if bad else "no", "stop", 2), *(("must_not_contain", "says it") if bad else ())
        )
        for i, bad in enumerate(failed)
    ]
