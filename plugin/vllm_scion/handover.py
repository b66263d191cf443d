"""Answers on their way to the recorder, gathered for some milliseconds.

What is done for one answer between two requests runs through cold caches and costs several times what it costs in a
row, and the next request waits for it. Runs on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

GATHER_S = 0.05
AT_ONCE = 8
"""Answers handed over before requests get their turn again: some tenths of a millisecond."""

Build = Callable[[], Any]
"""Makes the record of one answer; can be pickled. A Capture is one."""
Submit = Callable[[Build], bool]
"""scion_feedback.recorder.Recorder.submit: never blocks; false means lost, and counted there."""


class Handover:
    """Hands to `submit` what was added, soon and in order."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._waiting: deque[Callable[[], Build]] = deque()
        self._is_due = False

    def add(self, keep: Callable[[], Build]) -> None:
        """`keep` is called when its turn comes, and what it returns is submitted."""
        self._waiting.append(keep)
        if self._is_due:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a stream that is thrown away after the loop has ended
            self.flush()
            return
        self._is_due = True
        loop.call_later(GATHER_S, self._turn, loop)

    def flush(self) -> None:
        """Hand over all that waits, now."""
        while self._waiting:
            self._next()

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(AT_ONCE, len(self._waiting))):
            self._next()
        self._is_due = bool(self._waiting)
        if self._is_due:
            loop.call_soon(self._turn, loop)

    def _next(self) -> None:
        try:
            build = self._waiting.popleft()()
        except Exception as error:
            build = partial(_fail, repr(error))  # the recorder counts it
        self._submit(build)


def _fail(message: str) -> None:
    raise ValueError(message)
