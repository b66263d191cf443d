"""Waiting for what gives no sign: asked again and again, bounded, and saying what did not happen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(probe: Callable[[], T], what: str = "", *, timeout_s: float = 30.0, poll_s: float = 0.02) -> T:
    """Ask `probe` until it returns something true; that is returned. AssertionError naming `what` after `timeout_s`."""
    tick, deadline = threading.Event(), time.monotonic() + timeout_s
    while not (value := probe()):
        assert time.monotonic() < deadline, _late(probe, what, timeout_s, value)
        tick.wait(poll_s)
    return value


async def until(probe: Callable[[], T], what: str = "", *, timeout_s: float = 30.0, poll_s: float = 0.01) -> T:
    """`wait_for` on the event loop, without blocking what is waited for."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        assert time.monotonic() < deadline, _late(probe, what, timeout_s, value)
        await asyncio.sleep(poll_s)
    return value


def _late(probe: Callable[[], object], what: str, timeout_s: float, value: object) -> str:
    return f"not within {timeout_s:g} s: {what or probe!r} (last: {value!r})"
