"""The recorder in a process of its own, behind the same interface: what a server uses.

Parsing, journaling and storing an answer takes a fifth of the time that the API server itself spends on a request, and
a thread that computes keeps the interpreter's lock from requests. Here a request pays for one `submit`, which pickles
what it left behind, and now and then for a `flush`, which puts what has come together into the child's socket. A thread
sends only what the socket had no room for: one that sent everything would take the lock at each turn, and every request
in between wait for it twice.
Frames stay in memory until the child reports them journaled: a child that dies is replaced and gets them again. When
the server dies, the child records what it was handed, and ends.
"""

from __future__ import annotations

import json
import logging
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

from scion_adapters.cores import parse_cores
from scion_adapters.settings import Settings
from scion_feedback.recorder import Build, RecorderObserver, RecorderStats

_logger = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
_SEND_BUFFER_BYTES = 1 << 20  # what the kernel allows of it
_LOOK_INTERVAL_S = 1.0  # for a child that ended by itself
_RESTART_PAUSE_S = 1.0
CHILD_MODULE = "scion_feedback.recorder_child"


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """What the child needs to know. It travels over the socket: a database URL holds a password."""

    database_url: str
    journal: str
    journal_max_bytes: int
    queue_size: int
    flush_interval_s: float
    queue_max_bytes: int = 256 << 20
    close_timeout_s: float = 10.0
    cores: tuple[int, ...] = ()  # the only ones that the child may use; empty = the server's


@dataclass(frozen=True, slots=True)
class ChildReport:
    """What the child says from time to time; all but `journaled` add up. `settled`: journaled, or counted as lost."""

    settled: int = 0
    journaled: int = 0
    stored: int = 0
    redelivered: int = 0
    conflicting: int = 0
    lost: dict[str, int] | None = None


class _Child:
    """One child process and the socket to it."""

    def __init__(self, config: ChildConfig) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", CHILD_MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the server: the child ends when the socket does
            )
        self.socket = ours
        self.report = ChildReport()
        self.send(frame(asdict(config)))

    def send(self, data: bytes) -> None:
        """Blocks while the child has enough to do; raises OSError when it is gone."""
        self.socket.sendall(data)

    def send_now(self, data: bytes) -> int:
        """Send what there is room for; returns the number of bytes. Of a child that is gone, `send` will tell."""
        try:
            return self.socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return 0


class RecorderProcess:
    """Recorder's interface; the work is done in a child process. Thunks must be picklable."""

    def __init__(self, config: ChildConfig, observer: RecorderObserver | None = None) -> None:
        self._config = config
        self._observer = observer
        self._unsettled: deque[bytes] = deque()  # frames that were not reported yet, oldest first
        self._unsettled_bytes = 0
        self._unsent: deque[bytes] = deque()  # the end of them, which the child's socket has not taken yet
        self._is_behind = True  # the thread is sending, or there is nobody to send to: `flush` leaves it to the thread
        self._accepting = True
        self._stopping = False
        self._wake = threading.Event()
        self._mutex = threading.Lock()
        self._child: _Child | None = None
        self._past = ChildReport()  # sums of the children that are gone
        self._lost_here: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="scion-recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, build: Build) -> bool:
        """Take one answer; returns at once. It leaves with the next `flush`, or within a second.

        False: it was lost, and counted.
        """
        if not self._accepting:
            self._lose("closed")
            return False
        if len(self._unsettled) >= self._config.queue_size:
            self._lose("queue_full")
            return False
        try:
            data = frame(build)
        except Exception as error:  # a thunk may fail in any way; the request must not
            self._lose("unparsable", error)
            return False
        if self._unsettled_bytes + len(data) > self._config.queue_max_bytes:
            self._lose("queue_full")
            return False
        with self._mutex:
            self._unsettled.append(data)
            self._unsettled_bytes += len(data)
            self._unsent.append(data)
        return True

    def flush(self) -> None:
        """Send what was submitted, without waiting; what there is no room for is left to the thread."""
        with self._mutex:
            if self._is_behind or self._child is None or not self._unsent:
                return
            data = b"".join(self._unsent)
            self._unsent.clear()
            num_sent = self._child.send_now(data)
            if num_sent < len(data):
                self._is_behind = True
                self._unsent.append(data[num_sent:])
                self._wake.set()

    def close(self, timeout_s: float = 10.0) -> bool:
        """Hand over what is queued and wait until it is stored. True: nothing waits any more.

        What was not done in time is done by the child, or is in the journal for the next server.
        """
        deadline = time.monotonic() + timeout_s
        self._accepting = False
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        child = self._child
        if child is None or self._thread.is_alive():
            return not self._unsettled
        try:
            child.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            return False
        child.socket.close()
        stats = self.stats()
        return not stats.queued and not stats.journaled

    def stats(self) -> RecorderStats:
        with self._mutex:
            now = self._child.report if self._child is not None else ChildReport()
            lost = self._lost_here + Counter(self._past.lost) + Counter(now.lost)
            return RecorderStats(
                queued=len(self._unsettled),
                journaled=now.journaled,
                stored=self._past.stored + now.stored,
                redelivered=self._past.redelivered + now.redelivered,
                conflicting=self._past.conflicting + now.conflicting,
                lost=dict(lost),
            )

    # --- the thread that looks after the child ------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            reader: threading.Thread | None = None
            try:
                child = _Child(self._config)
                with self._mutex:
                    self._child = child
                    self._unsent = deque(self._unsettled)
                reader = threading.Thread(target=self._read, args=(child,), name="scion-recorder-reports", daemon=True)
                reader.start()
                self._look_after(child)
                child.socket.shutdown(socket.SHUT_WR)  # the child finishes what it has, reports, and ends
                reader.join(self._config.close_timeout_s)
                return
            except OSError as error:
                with self._mutex:
                    self._is_behind = True
                _logger.warning(
                    "the recorder's process is gone (%s); %d answers wait for the next", error, len(self._unsettled)
                )
            if reader is not None:
                reader.join()
                self._bury()
            if self._pause(_RESTART_PAUSE_S) and not self._unsettled:
                return

    def _look_after(self, child: _Child) -> None:
        """Until stopped: send what `flush` could not, or was not told to. Raises OSError when the child is gone."""
        while True:
            self._wake.clear()
            is_last = self._stopping
            self._catch_up(child)
            if child.process.poll() is not None:
                raise ConnectionResetError(f"it ended with status {child.process.returncode}")
            if self._observer is not None:
                self._observer.queued(len(self._unsettled))
            if is_last:
                return
            self._wake.wait(_LOOK_INTERVAL_S)

    def _catch_up(self, child: _Child) -> None:
        while True:
            with self._mutex:
                if not self._unsent:
                    self._is_behind = False
                    return
                self._is_behind = True
                data = b"".join(self._unsent)
                self._unsent.clear()
            child.send(data)

    def _pause(self, seconds: float) -> bool:
        """Wait; at once over when stopped. Returns whether it is."""
        deadline = time.monotonic() + seconds
        while True:
            self._wake.clear()
            rest = deadline - time.monotonic()
            if self._stopping or rest <= 0:
                return self._stopping
            self._wake.wait(rest)

    def _bury(self) -> None:
        """Count the dead child's work as past; what it had not reported is sent again."""
        with self._mutex:
            child, self._child = self._child, None
            if child is not None:
                then, now = self._past, child.report
                self._past = ChildReport(
                    stored=then.stored + now.stored,
                    redelivered=then.redelivered + now.redelivered,
                    conflicting=then.conflicting + now.conflicting,
                    lost=dict(Counter(then.lost) + Counter(now.lost)),
                )
        if child is not None:
            child.socket.close()
            child.process.wait()

    # --- the thread that listens --------------------------------------------------------------------------------------

    def _read(self, child: _Child) -> None:
        """Take the child's reports until it ends."""
        try:
            with child.socket.makefile("rb") as lines:
                for line in lines:
                    self._take(child, ChildReport(**json.loads(line)))
        except OSError:
            pass  # the sending thread hears of it too
        finally:
            self._wake.set()

    def _take(self, child: _Child, report: ChildReport) -> None:
        with self._mutex:
            before, child.report = child.report, report
            for _ in range(report.settled - before.settled):
                self._unsettled_bytes -= len(self._unsettled.popleft())
        if self._observer is None:
            return
        self._observer.journaled(report.journaled)
        if report.stored > before.stored:
            self._observer.stored(report.stored - before.stored)
        if report.conflicting > before.conflicting:
            self._observer.conflicting(report.conflicting - before.conflicting)
        for reason, count in (Counter(report.lost) - Counter(before.lost)).items():
            self._observer.lost(count, reason)

    def _lose(self, reason: str, error: BaseException | None = None) -> None:
        with self._mutex:
            self._lost_here[reason] += 1
            first = self._lost_here[reason] == 1
        if self._observer is not None:
            self._observer.lost(1, reason)
        if first:
            _logger.warning("answers are not recorded: %s%s", reason, f" ({error!r})" if error else "")


def frame(value: Any) -> bytes:
    """One message to the child."""
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(data)) + data


def split(buffer: bytearray) -> list[bytes]:
    """Take the complete messages out of `buffer`, still pickled."""
    found = []
    position = 0
    while len(buffer) - position >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer, position)
        end = position + _LENGTH.size + length
        if end > len(buffer):
            break
        found.append(bytes(buffer[position + _LENGTH.size : end]))
        position = end
    del buffer[:position]
    return found


def open_recorder_process(settings: Settings, observer: RecorderObserver | None = None) -> RecorderProcess:
    """The recorder as configured in `[capture]`, not started yet."""
    capture = settings.capture
    config = ChildConfig(
        database_url=settings.database_url,
        journal=str(settings.path(capture.journal)),
        journal_max_bytes=capture.journal_max_mib << 20,
        queue_size=capture.queue_size,
        queue_max_bytes=capture.queue_max_mib << 20,
        flush_interval_s=capture.flush_interval_s,
        cores=tuple(sorted(parse_cores(capture.cores, "capture.cores"))) if capture.cores is not None else (),
    )
    return RecorderProcess(config, observer)
