"""Time and identity, injected wherever a decision depends on them. All times are Unix seconds, UTC."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

Clock = Callable[[], float]

now: Clock = time.time


def new_id(prefix: str) -> str:
    """A unique, sortable id such as `run-019a…`: the first 12 hex digits are the time in milliseconds."""
    return f"{prefix}-{int(time.time() * 1000):012x}{os.urandom(6).hex()}"
