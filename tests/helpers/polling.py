"""Waiting on the event loop: polled, bounded, without blocking what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def until(probe: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Wait until `probe` returns something true; that is returned. TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        while not (value := probe()):  # noqa: ASYNC110 - what is probed has no event to wait for
            await asyncio.sleep(0.01)
    return value
