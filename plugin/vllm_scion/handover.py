"""Answers on their way to the recorder, sent on some milliseconds later and many at a time.

What an answer leaves behind is taken at once, while it is warm in the processor's caches; a system call for each would
cost more than that. Runs on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

GATHER_S = 0.05

Build = Callable[[], Any]
"""Makes the record of one answer; can be pickled. A Capture is one."""


class Sink(Protocol):
    """Takes answers: scion_feedback's recorder. Neither blocks."""

    def submit(self, build: Build) -> bool:
        """False: the answer is lost, and counted there."""
        ...

    def flush(self) -> None:
        """Send on what was submitted."""
        ...


class Handover:
    """Submits what was added, in order, and flushes soon."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._is_due = False

    def add(self, keep: Callable[[], Build]) -> None:
        """Submit what `keep` returns. Raises nothing: what cannot be kept is counted by the recorder."""
        try:
            build = keep()
        except Exception as error:
            build = partial(_fail, repr(error))
        self._sink.submit(build)
        if self._is_due:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a stream that is thrown away after the loop has ended
            self._sink.flush()
            return
        self._is_due = True
        loop.call_later(GATHER_S, self._flush)

    def _flush(self) -> None:
        self._is_due = False
        self._sink.flush()


def _fail(message: str) -> None:
    raise ValueError(message)
