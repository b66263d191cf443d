"""How a run is asked to stop: SIGTERM and SIGINT set a flag, and the run ends at the next step with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from scion_adapters.errors import ScionError


class RunInterruptedError(ScionError):
    """The run was asked to stop and can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: run the same thing again later


class StopRequest:
    """A flag that signals set."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def install(self) -> None:
        """Let SIGTERM and SIGINT set the flag instead of ending the process. Only in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._event.set()
