"""Waiting for another process or thread: polled, bounded, and saying what did not happen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], what: str = "the condition", *, timeout_s: float = 30.0, poll_s: float = 0.01
) -> None:
    """Return once `condition` is true; AssertionError naming `what` after `timeout_s`."""
    tick, deadline = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        tick.wait(poll_s)
