"""A durable queue of lines on local disk, between the answers and the database. Knows nothing of what the lines mean.

Files of one writer: `<owner>.lock`, held with flock(2) while the process lives, and segments `<owner>.<number>.jsonl`.
A line is consumed only after its handler returned, so a line is delivered at least once; after a crash some come again.
Whoever gets the lock of a dead writer takes over its segments.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scion_adapters.errors import UnavailableError
from scion_adapters.files import fsync_path

_logger = logging.getLogger(__name__)
_LOCK_SUFFIX = ".lock"
_SEGMENT_SUFFIX = ".jsonl"
_READ_BYTES = 1 << 20


@dataclass(slots=True)
class _Segment:
    path: Path
    size: int  # bytes written, always whole lines except in a dead writer's last segment
    num_lines: int  # that wait
    offset: int = 0  # bytes consumed


@dataclass(slots=True)
class _Estate:
    """What a dead writer left. Its lock is held until the last segment is consumed."""

    lock: int
    lock_path: Path
    segments: set[Path]


class Journal:
    """The journal of one process. `append` is for one thread, `drain` and `adopt` for one other, at the same time."""

    def __init__(self, directory: Path, max_bytes: int, *, segment_bytes: int = 8 << 20, fsync: bool = True) -> None:
        """`max_bytes` bounds what waits. With `fsync`, lines survive a power cut; without, only a killed process."""
        self.directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._mutex = threading.Lock()
        self._segments: deque[_Segment] = deque()  # oldest first; the last one is being written if `_file` is open
        self._file: int | None = None
        self._num_segments = 0
        self._estates: list[_Estate] = []
        self._backlog = 0
        self._backlog_bytes = 0
        self._num_vanished = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._owner, self._lock = _take_new_lock(directory)
        except OSError as error:
            raise UnavailableError(
                f"the journal {directory} cannot be opened: {error}; correct capture.journal"
            ) from error
        _open_journals.add(self)

    @property
    def backlog(self) -> int:
        """Lines that wait, those of adopted journals included."""
        return self._backlog

    @property
    def backlog_bytes(self) -> int:
        return self._backlog_bytes

    @property
    def num_vanished(self) -> int:
        """Lines that waited in files which somebody else removed or cut."""
        return self._num_vanished

    def append(self, lines: Sequence[bytes]) -> int:
        """Write `lines` in one go; returns how many, from the front, fitted. Raises OSError: none was written."""
        with self._mutex:
            num_fitting, data = self._fitting(lines)
            if not num_fitting:
                return 0
            segment = self._writable_segment()
            assert self._file is not None
            try:
                _write_all(self._file, data)
                if self._fsync:
                    os.fsync(self._file)
            except OSError:
                self._undo(segment)
                raise
            segment.size += len(data)
            segment.num_lines += num_fitting
            self._backlog += num_fitting
            self._backlog_bytes += len(data)
            return num_fitting

    def drain(self, handler: Callable[[list[bytes]], None], *, batch_size: int = 100) -> int:
        """Hand all waiting lines, oldest first, to `handler`, at most `batch_size` at a time; returns how many.

        An exception of the handler ends it; that batch will come again. The torn last line of a killed writer is handed
        over like any other: the handler must cope with lines that it cannot read.
        """
        count = 0
        while (segment := self._oldest()) is not None:
            try:
                lines, num_bytes = _read(segment, batch_size)
            except (FileNotFoundError, EOFError) as error:
                self._write_off(segment, error)
                continue
            handler(lines)
            count += len(lines)
            self._consumed(segment, len(lines), num_bytes)
        return count

    def adopt(self) -> int:
        """Take over what dead processes left in this directory; returns the number of lines. Never a live one's."""
        count = 0
        for lock_path in sorted(self.directory.glob(f"*{_LOCK_SUFFIX}")):
            if lock_path.name == self._owner + _LOCK_SUFFIX:
                continue
            try:
                lock = _try_lock(lock_path)
            except OSError as error:  # of another account; must not keep our own answers waiting
                _logger.warning("the journal left in %s cannot be taken over: %s", lock_path, error)
                continue
            if lock is not None:
                count += self._take_over(lock, lock_path)
        if count:
            _logger.info("took over %d journaled answers of a process that is gone", count)
        return count

    def _take_over(self, lock: int, lock_path: Path) -> int:
        paths = sorted(self.directory.glob(f"{lock_path.name.removesuffix(_LOCK_SUFFIX)}.*{_SEGMENT_SUFFIX}"))
        segments = [_Segment(path, path.stat().st_size, _count_lines(path)) for path in paths]
        with self._mutex:
            self._estates.append(_Estate(lock, lock_path, set(paths)))
            self._segments.extendleft(reversed(segments))
            for segment in segments:
                self._backlog += segment.num_lines
                self._backlog_bytes += segment.size
                if segment.size == 0:
                    self._discard(segment)
            self._settle_estates()
        return sum(segment.num_lines for segment in segments)

    def close(self) -> None:
        """Release everything. What was not drained stays for the next process."""
        with self._mutex:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            if self._segments and self._segments[-1].size == 0:
                self._discard(self._segments[-1])
            if not any(segment.path.name.startswith(self._owner + ".") for segment in self._segments):
                (self.directory / (self._owner + _LOCK_SUFFIX)).unlink(missing_ok=True)
            for estate in self._estates:
                os.close(estate.lock)
            self._estates.clear()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
        _open_journals.discard(self)

    def _fitting(self, lines: Sequence[bytes]) -> tuple[int, bytes]:
        room = self._max_bytes - self._backlog_bytes
        fitting: list[bytes] = []
        for line in lines:
            room -= len(line) + 1
            if room < 0:
                break
            fitting.append(line)
            fitting.append(b"\n")
        return len(fitting) // 2, b"".join(fitting)

    def _writable_segment(self) -> _Segment:
        """The segment to append to: a new one when there is none or the present one is full."""
        if self._file is not None and self._segments[-1].size < self._segment_bytes:
            return self._segments[-1]
        if self._lock is None:
            raise OSError("the journal is closed")
        path = self.directory / f"{self._owner}.{self._num_segments:08d}{_SEGMENT_SUFFIX}"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        if self._file is not None:
            os.close(self._file)
        self._file = file
        self._num_segments += 1
        self._segments.append(_Segment(path, 0, 0))
        if self._fsync:
            fsync_path(self.directory)
        return self._segments[-1]

    def _undo(self, segment: _Segment) -> None:
        """Cut off a line that was written in part (disk full), or the next one would be glued to it."""
        assert self._file is not None
        try:
            os.ftruncate(self._file, segment.size)
        except OSError:
            os.close(self._file)  # leave the torn tail behind: the next append begins a new segment
            self._file = None
            if not segment.num_lines:
                self._discard(segment)

    def _oldest(self) -> _Segment | None:
        """The first segment with something to read, as it is now."""
        with self._mutex:
            return self._segments[0] if self._segments and self._segments[0].num_lines else None

    def _consumed(self, segment: _Segment, num_lines: int, num_bytes: int) -> None:
        with self._mutex:
            segment.offset += num_bytes
            segment.num_lines -= num_lines
            self._backlog -= num_lines
            self._backlog_bytes -= num_bytes
            if segment.offset < segment.size:
                return
            if self._file is not None and segment is self._segments[-1]:
                os.ftruncate(self._file, 0)  # stored text does not linger on disk
                segment.size = segment.offset = 0
            else:
                self._discard(segment)
                self._settle_estates()

    def _write_off(self, segment: _Segment, error: Exception) -> None:
        """Give up a segment that is gone from the disk, or nothing behind it would ever be delivered."""
        _logger.error("%d journaled answers are gone: %s", segment.num_lines, error or segment.path)
        with self._mutex:
            self._num_vanished += segment.num_lines
            self._backlog -= segment.num_lines
            self._backlog_bytes -= segment.size - segment.offset
            if self._file is not None and segment is self._segments[-1]:
                os.close(self._file)
                self._file = None
            self._discard(segment)
            self._settle_estates()

    def _discard(self, segment: _Segment) -> None:
        self._segments.remove(segment)
        segment.path.unlink(missing_ok=True)
        for estate in self._estates:
            estate.segments.discard(segment.path)

    def _settle_estates(self) -> None:
        for estate in [estate for estate in self._estates if not estate.segments]:
            estate.lock_path.unlink(missing_ok=True)
            os.close(estate.lock)
            self._estates.remove(estate)

    def _leave_to_parent(self) -> None:
        """In a forked child: drop the inherited locks, or the parent would look alive for as long as the child is."""
        for descriptor in (self._lock, self._file, *(estate.lock for estate in self._estates)):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._lock = self._file = None
        self._estates = []
        self._segments = deque()


_open_journals: weakref.WeakSet[Journal] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for journal in list(_open_journals):
        journal._leave_to_parent()
    _open_journals.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _take_new_lock(directory: Path) -> tuple[str, int | None]:
    """A lock under a name that nobody ever had. Returns the name and the descriptor that holds it."""
    while True:
        owner = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        path = directory / (owner + _LOCK_SUFFIX)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if (lock := _try_lock(path)) is not None:  # None: another process took the new file for a dead writer's
            return owner, lock


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, or None when its owner lives or the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _read(segment: _Segment, batch_size: int) -> tuple[list[bytes], int]:
    """The next lines of the segment, without their line ends, and their length on disk. EOFError: the file was cut."""
    lines: list[bytes] = []
    num_bytes = 0
    with segment.path.open("rb") as file:
        file.seek(segment.offset)
        room = segment.size - segment.offset
        while room and len(lines) < batch_size and num_bytes < _READ_BYTES:
            line = file.readline(room)
            if not line:
                raise EOFError(f"{segment.path} is shorter than what was written to it")
            room -= len(line)
            num_bytes += len(line)
            lines.append(line.removesuffix(b"\n"))
    return lines, num_bytes


def _count_lines(path: Path) -> int:
    """Lines of a dead writer's segment; a torn last one counts."""
    count = 0
    last = b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")
