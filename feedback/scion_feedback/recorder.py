"""Recording off the request path: a bounded queue in memory, then the journal, then the database. Owns the two threads.

A request pays for one `submit`: no parsing, no lock, no disk. The writer thread builds the records and journals them in
batches; the storing thread moves the journal into the database, however long that is away. Whatever is lost is counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_feedback.captures import CompletionRecord, CompletionStore, InsertResult, decode, encode
from scion_feedback.journal import Journal

Build = Callable[[], CompletionRecord | None]
"""Makes the record of one answer, or None when there is nothing to record. Runs in the writer thread."""

# A thread that computes keeps the interpreter's lock from requests for up to 5 ms, so work and rest in small slices.
_SLICE_S = 0.0003
_REST_S = 0.0007
_BATCH_RECORDS = 500
_STORE_BATCH = 40
_ADOPT_INTERVAL_S = 15.0
_LOG_INTERVAL_S = 10.0

_logger = logging.getLogger(__name__)


class RecorderObserver(Protocol):
    """What metrics hear. `queued` and `journaled` are levels (what waits now), the others are increments."""

    def queued(self, n: int) -> None: ...
    def journaled(self, n: int) -> None: ...
    def stored(self, n: int) -> None: ...
    def lost(self, n: int, reason: str) -> None: ...
    def conflicting(self, n: int) -> None: ...


class Store(Protocol):
    """Where records end up; CompletionStore is one."""

    def insert(self, records: list[CompletionRecord]) -> InsertResult: ...


@dataclass(frozen=True, slots=True)
class RecorderStats:
    """What became of the answers of this process. `queued` and `journaled` wait now; the others add up since the start.

    `lost` by reason: queue_full, closed, unparsable (the answer made no record), journal_full, journal_error,
    corrupt_journal (a line torn by a crash), refused (the database can never take it).
    """

    queued: int
    journaled: int
    stored: int
    redelivered: int
    conflicting: int
    lost: Mapping[str, int] = field(default_factory=dict)


class Recorder:
    """Takes records without ever blocking and brings them to the database."""

    def __init__(
        self,
        store: Store,
        journal: Journal,
        *,
        queue_size: int,
        flush_interval_s: float,
        observer: RecorderObserver | None = None,
        max_backoff_s: float = 5.0,
    ) -> None:
        self._store = store
        self._journal = journal
        self._queue: deque[Build] = deque()
        self._queue_size = queue_size
        self._flush_interval_s = flush_interval_s
        self._observer = observer
        self._max_backoff_s = max_backoff_s
        self._accepting = True
        self._stop_writing = threading.Event()
        self._stop_storing = threading.Event()
        self._journaled = threading.Event()
        self._counts = threading.Lock()
        self._stored = self._redelivered = self._conflicting = 0
        self._lost: Counter[str] = Counter()
        self._logged_at: dict[str, float] = {}
        self._writer = threading.Thread(target=self._write_loop, name="scion-recorder-writer", daemon=True)
        self._storer = threading.Thread(target=self._store_loop, name="scion-recorder-storer", daemon=True)

    def start(self) -> None:
        self._writer.start()
        self._storer.start()

    def submit(self, build: Build) -> bool:
        """Queue one answer; returns at once. False: it was lost, and counted."""
        if not self._accepting:
            self._lose(1, "closed")
            return False
        if len(self._queue) >= self._queue_size:
            self._lose(1, "queue_full")
            return False
        self._queue.append(build)
        return True

    def flush(self) -> None:
        """Nothing to do: the writer thread takes what was submitted by itself."""

    def close(self, timeout_s: float = 10.0) -> bool:
        """Journal what is queued, then store what is journaled, within `timeout_s`. True: nothing waits any more.

        What the database did not take in time stays in the journal for the next process.
        """
        deadline = time.monotonic() + timeout_s
        self._accepting = False
        self._stop_writing.set()
        if self._writer.is_alive():
            self._writer.join(max(deadline - time.monotonic(), 0.0))
        if self._queue and not self._writer.is_alive():
            self._write_batch()  # an answer that slipped in while the writer said goodbye
        self._stop_storing.set()
        self._journaled.set()
        if self._storer.is_alive():
            self._storer.join(max(deadline - time.monotonic(), 0.0))
        if self._writer.is_alive() or self._storer.is_alive():
            return False  # they still use the journal; its lock falls with the process
        done = not self._queue and self._journal.backlog == 0
        self._journal.close()
        return done

    def stats(self) -> RecorderStats:
        with self._counts:
            return RecorderStats(
                queued=len(self._queue),
                journaled=self._journal.backlog,
                stored=self._stored,
                redelivered=self._redelivered,
                conflicting=self._conflicting,
                lost=dict(self._lost),
            )

    # --- queue -> journal --------------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop_writing.wait(self._flush_interval_s)
            try:
                while self._queue:
                    self._write_batch()
            except Exception:
                _logger.exception("recording stumbled; it goes on with the next batch")
            self._report_levels()

    def _write_batch(self) -> None:
        lines: list[bytes] = []
        started = time.perf_counter()
        while self._queue and len(lines) < _BATCH_RECORDS:
            build = self._queue.popleft()
            try:
                record = build()
                if record is not None:
                    lines.append(encode(record))
            except Exception as error:  # a thunk may fail in any way; the thread must outlive it
                self._lose(1, "unparsable", error)
            if time.perf_counter() - started > _SLICE_S:
                if len(self._queue) * 2 < self._queue_size:  # losing answers is worse than slowing them
                    time.sleep(_REST_S)
                started = time.perf_counter()
        if not lines:
            return
        try:
            written = self._journal.append(lines)
        except OSError as error:
            self._lose(len(lines), "journal_error", error)
            return
        if written < len(lines):
            self._lose(len(lines) - written, "journal_full")
        self._journaled.set()

    # --- journal -> database -----------------------------------------------------------------------------------------

    def _store_loop(self) -> None:
        backoff_s = 0.0
        next_adoption = 0.0
        num_vanished = 0
        while True:
            self._journaled.clear()  # before the look at the flag: close() sets the flag, then this
            stopping = self._stop_storing.is_set()
            try:
                if time.monotonic() >= next_adoption:
                    self._journal.adopt()
                    next_adoption = time.monotonic() + _ADOPT_INTERVAL_S
                self._journal.drain(self._store_lines, batch_size=_STORE_BATCH)
                if self._journal.num_vanished > num_vanished:
                    self._lose(self._journal.num_vanished - num_vanished, "journal_error")
                    num_vanished = self._journal.num_vanished
                backoff_s = 0.0
            except Exception as error:
                backoff_s = min(max(backoff_s * 2, 0.1), self._max_backoff_s)
                self._log("unstored", "answers wait in the journal: %s", error)
            self._report_levels()
            if stopping:
                return
            if backoff_s:
                self._stop_storing.wait(backoff_s)
            else:
                self._journaled.wait(_ADOPT_INTERVAL_S)

    def _store_lines(self, lines: list[bytes]) -> None:
        """Raises, with nothing counted, when the database should be asked again."""
        records: list[CompletionRecord] = []
        corrupt = 0
        for line in lines:
            try:
                records.append(decode(line))
            except InvalidInputError:
                corrupt += 1
        try:
            self._insert(records)
        except InvalidInputError:  # at least one can never be stored: find it
            refusals: list[InvalidInputError] = []
            for record in records:
                try:
                    self._insert([record])
                except InvalidInputError as error:
                    refusals.append(error)
            if refusals:
                self._lose(len(refusals), "refused", refusals[0])
        if corrupt:
            self._lose(corrupt, "corrupt_journal")
        time.sleep(_REST_S)

    def _insert(self, records: list[CompletionRecord]) -> None:
        result = self._store.insert(records)
        with self._counts:
            self._stored += result.new
            self._redelivered += result.redelivered
            self._conflicting += result.conflicting
        if self._observer is not None:
            if result.new:
                self._observer.stored(result.new)
            if result.conflicting:
                self._observer.conflicting(result.conflicting)
        if result.conflicting:
            self._log(
                "conflicting",
                "%s answers came under completion ids that are taken; they are not stored",
                result.conflicting,
            )

    # --- counting ----------------------------------------------------------------------------------------------------

    def _lose(self, n: int, reason: str, error: BaseException | None = None) -> None:
        with self._counts:
            self._lost[reason] += n
        if self._observer is not None:
            self._observer.lost(n, reason)
        self._log(reason, "answers were not recorded: " + reason + "%s", f" ({error!r})" if error else "")

    def _log(self, topic: str, message: str, value: object) -> None:
        """Warn, at most once in a while per topic: a full queue must not also flood the log."""
        now = time.monotonic()
        if now - self._logged_at.get(topic, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S:
            self._logged_at[topic] = now
            _logger.warning(message, value)

    def _report_levels(self) -> None:
        if self._observer is not None:
            self._observer.queued(len(self._queue))
            self._observer.journaled(self._journal.backlog)


def open_recorder(settings: Settings, database: Database, observer: RecorderObserver | None = None) -> Recorder:
    """The recorder as configured in `[capture]`, not started yet."""
    journal = Journal(settings.path(settings.capture.journal), settings.capture.journal_max_mib << 20)
    return Recorder(
        CompletionStore(database),
        journal,
        queue_size=settings.capture.queue_size,
        flush_interval_s=settings.capture.flush_interval_s,
        observer=observer,
    )
