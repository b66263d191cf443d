"""Refused requests as events: counted per reason, client and beginning of the path; a flood writes a line a minute.

Everything here runs on the event loop and keeps a bounded number of counts; writing them is the caller's work.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from scion_adapters.clock import Clock, now
from scion_adapters.database import Database
from scion_adapters.events import record
from vllm_scion.authority import Refusal

QUIET_S = 60.0
"""After an event of one kind, further refusals of that kind are only counted for so long."""
MAX_KINDS = 60
"""So that a flood from everywhere writes a line a second."""
_SEGMENT = re.compile(r"[A-Za-z0-9_.-]{1,32}")  # shorter than any key: one that strayed into a path is not written down

Kind = tuple[str, str, str]
CountedRefusal = tuple[Kind, Refusal, int]


@dataclass(slots=True)
class _Count:
    first: Refusal  # since the last event
    number: int
    silent_until: float


@dataclass(slots=True)
class Refusals:
    """Counts refusals and says when which are due to be written."""

    monotonic: Callable[[], float] = time.monotonic
    _counts: dict[Kind, _Count] = field(default_factory=dict)

    def add(self, refusal: Refusal) -> None:
        """Count one. Past `MAX_KINDS` kinds, the client and the path are not told apart any more."""
        kind = (refusal.reason, refusal.client, beginning(refusal.path))
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = (refusal.reason, "many", "many")
        count = self._counts.setdefault(kind, _Count(refusal, 0, 0.0))
        if count.number == 0:
            count.first = refusal
        count.number += 1

    def take_due(self) -> list[CountedRefusal]:
        """What is to be written now, with how often it happened. Kinds that fell silent are forgotten."""
        at, due = self.monotonic(), []
        for kind, count in list(self._counts.items()):
            if count.silent_until > at:
                continue
            if count.number:
                due.append((kind, count.first, count.number))
                count.number, count.silent_until = 0, at + QUIET_S
            else:
                del self._counts[kind]
        return due

    def take_all(self) -> list[CountedRefusal]:
        """What was counted and not written yet, due or not."""
        rest = [(kind, count.first, count.number) for kind, count in self._counts.items() if count.number]
        self._counts.clear()
        return rest


def beginning(path: str) -> str:
    """The first two parts of a path that a stranger sent, safe to show: `/v1/feedback/f1` is `/v1/feedback/…`."""
    parts = path.strip("/").split("/")
    shown = [part if _SEGMENT.fullmatch(part) else "*" for part in parts[:2]]
    return "/" + "/".join([*shown, *(["…"] if len(parts) > 2 else [])])


def write_refusals(database: Database, due: list[CountedRefusal], *, actor: str, clock: Clock = now) -> None:
    """One event each. What was presented is not in it, only the public part of something that looked like a key."""
    with database.write() as connection:
        for (reason, client, path), refusal, number in due:
            data = {"reason": reason, "client": client, "path": path, "key_id": refusal.key_id, "count": number}
            what = f"{number} request(s) to {path} from {client} refused: {reason}"
            record(connection, clock(), "access.refused", actor=actor, reason=what, data=data)
