"""kill -9 at the N-th side effect of whatever runs in this process. Knows nothing of what that is.

Side effects are found where they leave Python, so that no list of steps has to be kept: the interpreter's audit events
for files (open for writing, mkdir, rename, unlink…), SQLAlchemy's events for statements that write and for commits, and
`step`, which a fake engine calls. A kill before effect N is the same as one after effect N - 1, since nothing between
two effects is visible to others; only a file that was opened and not written yet is a state of its own, `torn`.
fsync is no effect here: the kernel outlives a killed process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

OPEN = "open"
_FILE_EVENTS = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime", "os.chmod"
}  # fmt: skip
_HAS_WRITTEN = "scion has written"
_READING = ("SELECT", "PRAGMA", "BEGIN", "SET", "WITH", "SHOW")


class KillPoints:
    """Counts side effects; kills the process at number `at` (from 1; 0: never). Only files below `home` count."""

    def __init__(self, at: int, *, torn: bool, home: Path, say: Callable[[str], None]) -> None:
        self.count = 0
        self._at = at
        self._torn = torn
        self._home = str(home)
        self._say = say
        self._mutex = threading.RLock()  # an effect of another thread must not slip in behind the last one

    def arm(self) -> None:
        """From here on, for good: audit hooks cannot be taken off."""
        sys.addaudithook(self._audit)
        sa.event.listen(sa.Engine, "before_cursor_execute", self._statement)
        sa.event.listen(sa.Engine, "commit", self._commit)
        sa.event.listen(sa.Engine, "rollback", lambda connection: connection.info.pop(_HAS_WRITTEN, None))

    def step(self, label: str, halfway: Callable[[], object] | None = None) -> None:
        """A side effect is about to happen; `halfway` does the first half of it."""
        with self._mutex:
            self.count += 1
            if self.count != self._at:
                return
            if self._torn and halfway is not None:
                halfway()
            self._say(label)
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_ours(path):
                self.step(f"{OPEN} {_short(path)}", lambda: os.close(os.open(path, flags)))
        elif event == "sqlite3.connect":
            if self._is_ours(arguments[0]) and not os.path.exists(arguments[0]):
                self.step(f"{event} {_short(arguments[0])}")
        elif event in _FILE_EVENTS and (self._is_ours(arguments[0]) or _is_relative_to_directory(event, arguments)):
            self.step(f"{event} {_short(arguments[0])}")

    def _statement(self, connection: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        text = statement.strip()
        if not text.upper().startswith(_READING):
            connection.info[_HAS_WRITTEN] = True
            self.step(" ".join(text.split()[:3]))

    def _commit(self, connection: sa.Connection) -> None:
        if connection.info.pop(_HAS_WRITTEN, False):  # the end of a reading transaction is no effect
            self.step("commit")

    def _is_ours(self, path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self._home)


def _is_relative_to_directory(event: str, arguments: tuple[Any, ...]) -> bool:
    """`shutil.rmtree` names files relative to an open directory."""
    return event in ("os.remove", "os.rmdir") and arguments[1] >= 0


def _short(path: Any) -> str:
    return Path(os.fsdecode(path)).name
