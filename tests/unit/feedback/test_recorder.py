"""The recorder against a hand-written store: never blocks, never loses in silence, survives every kind of failure."""

from __future__ import annotations

import errno
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_feedback.captures import CompletionRecord, InsertResult
from scion_feedback.journal import Journal
from scion_feedback.recorder import Recorder
from tests.helpers.feedback import record
from tests.helpers.waiting import wait_for


class FakeStore:
    """Keeps records by id, as the table does; can be gone, be slow, or find single records unstorable."""

    def __init__(self) -> None:
        self.records: dict[str, CompletionRecord] = {}
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.entered = threading.Event()
        self.failures: list[Exception] = []
        self.unstorable: set[str] = set()

    def insert(self, records: list[CompletionRecord]) -> InsertResult:
        self.entered.set()
        assert self.may_go_on.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        if any(r.id in self.unstorable for r in records):
            raise InvalidInputError("cannot be stored")
        new = redelivered = conflicting = 0
        for r in records:
            stored = self.records.setdefault(r.id, r)
            if stored is r:
                new += 1
            elif stored.record_id == r.record_id:
                redelivered += 1
            else:
                conflicting += 1
        return InsertResult(new, redelivered, conflicting)


class Observer:
    def __init__(self) -> None:
        self.levels: dict[str, int] = {}
        self.highest: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()

    def _level(self, name: str, n: int) -> None:
        self.levels[name] = n
        self.highest[name] = max(self.highest[name], n)

    def queued(self, n: int) -> None:
        self._level("queued", n)

    def journaled(self, n: int) -> None:
        self._level("journaled", n)

    def stored(self, n: int) -> None:
        self.totals["stored"] += n

    def lost(self, n: int, reason: str) -> None:
        self.totals[reason] += n

    def conflicting(self, n: int) -> None:
        self.totals["conflicting"] += n


class Setup:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = FakeStore()
        self.observer = Observer()

    @contextmanager
    def recorder(self, *, queue_size: int = 10_000, max_bytes: int = 1 << 20) -> Iterator[Recorder]:
        recorder = Recorder(
            self.store,
            Journal(self.directory, max_bytes, fsync=False),
            queue_size=queue_size,
            flush_interval_s=0.01,
            observer=self.observer,
            max_backoff_s=0.02,
        )
        recorder.start()
        try:
            yield recorder
        finally:
            self.store.may_go_on.set()
            recorder.close()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def _build(completion_id: str) -> Callable[[], CompletionRecord]:
    return lambda: record(completion_id)


def test_all_records_arrive(setup: Setup) -> None:
    with setup.recorder() as recorder:
        assert all(recorder.submit(_build(f"c{n}")) for n in range(1200))
        assert recorder.close()
    assert list(setup.store.records) == [f"c{n}" for n in range(1200)]  # in order
    assert setup.store.records["c7"] == record("c7")
    assert setup.observer.totals == {"stored": 1200}
    assert setup.observer.levels == {"queued": 0, "journaled": 0}
    assert list(setup.directory.iterdir()) == []


def test_slow_database_blocks_nobody(setup: Setup) -> None:
    setup.store.may_go_on.clear()
    with setup.recorder() as recorder:
        recorder.submit(_build("first"))
        assert setup.store.entered.wait(20)  # the storing thread hangs in the database from here on
        for n in range(500):
            assert recorder.submit(_build(f"c{n}"))
        wait_for(lambda: recorder.stats().journaled == 501, what="the backlog")
        assert recorder.stats().queued == 0
        assert recorder.stats().stored == 0
        setup.store.may_go_on.set()
        wait_for(lambda: recorder.stats().stored == 501, what="the catching up")
        assert recorder.stats().lost == {}
    assert setup.observer.highest["journaled"] == 501
    assert len(setup.store.records) == 501


def test_database_gone_for_a_while(setup: Setup) -> None:
    setup.store.failures = [UnavailableError("gone")] * 5
    with setup.recorder() as recorder:
        for n in range(100):
            recorder.submit(_build(f"c{n}"))
        wait_for(lambda: recorder.stats().stored == 100)
    assert list(setup.store.records) == [f"c{n}" for n in range(100)]
    assert setup.observer.totals == {"stored": 100}  # each counted once, however often it was tried


def test_unexpected_database_error_loses_nothing(setup: Setup) -> None:
    setup.store.failures = [RuntimeError("a defect")]
    with setup.recorder() as recorder:
        recorder.submit(_build("c"))
        wait_for(lambda: recorder.stats().stored == 1)


def test_close_with_the_database_away_leaves_all_in_the_journal(setup: Setup) -> None:
    setup.store.failures = [UnavailableError("gone")] * 1000
    with setup.recorder() as recorder:
        for n in range(10):
            recorder.submit(_build(f"c{n}"))
        assert not recorder.close()
    setup.store.failures = []
    with setup.recorder() as recorder:  # the next process
        wait_for(lambda: recorder.stats().stored == 10)


def test_close_does_not_wait_for_a_hanging_database(setup: Setup) -> None:
    setup.store.may_go_on.clear()
    with setup.recorder() as recorder:
        recorder.submit(_build("c"))
        assert setup.store.entered.wait(20)
        assert not recorder.close(timeout_s=0.05)


def test_full_queue_is_counted(setup: Setup) -> None:
    building, go_on = threading.Event(), threading.Event()

    def slow() -> CompletionRecord:
        building.set()
        assert go_on.wait(20)
        return record("slow")

    with setup.recorder(queue_size=3) as recorder:
        recorder.submit(slow)
        assert building.wait(20)
        assert [recorder.submit(_build(f"c{n}")) for n in range(5)] == [True, True, True, False, False]
        assert recorder.stats().queued == 3
        go_on.set()
        wait_for(lambda: recorder.stats().stored == 4)
        assert recorder.stats().lost == {"queue_full": 2}
    assert setup.observer.totals["queue_full"] == 2


def test_full_journal_is_counted(setup: Setup) -> None:
    setup.store.failures = [UnavailableError("gone")] * 100_000
    with setup.recorder(max_bytes=2000) as recorder:
        for n in range(50):
            recorder.submit(_build(f"c{n}"))
        wait_for(lambda: recorder.stats().lost.get("journal_full", 0) + recorder.stats().journaled == 50)
        kept = recorder.stats().journaled
        assert 0 < kept < 50
        setup.store.failures = []
        wait_for(lambda: recorder.stats().stored == kept)


def test_answers_that_make_no_record(setup: Setup) -> None:
    def unparsable() -> CompletionRecord:
        raise KeyError("choices")

    with setup.recorder() as recorder:
        recorder.submit(unparsable)
        recorder.submit(lambda: None)  # the user asked not to be recorded: not a loss
        recorder.submit(lambda: record("odd", choices=[{"text": object()}]))  # nothing that JSON can hold
        recorder.submit(lambda: record("nan", latency_ms=float("nan")))
        recorder.submit(_build("good"))
        wait_for(lambda: recorder.stats().stored == 1)
    assert list(setup.store.records) == ["good"]
    assert setup.observer.totals == {"unparsable": 3, "stored": 1}


def test_one_unstorable_record_does_not_stop_the_others(setup: Setup) -> None:
    setup.store.unstorable = {"c3"}
    setup.store.may_go_on.clear()
    with setup.recorder() as recorder:
        for n in range(6):
            recorder.submit(_build(f"c{n}"))
        setup.store.may_go_on.set()
        wait_for(lambda: recorder.stats().stored == 5)
        assert recorder.stats().lost == {"refused": 1}
    assert "c3" not in setup.store.records


def test_reused_completion_id_is_reported(setup: Setup) -> None:
    with setup.recorder() as recorder:
        recorder.submit(_build("c"))
        recorder.submit(lambda: record("c", record_id="another"))
        wait_for(lambda: recorder.stats().conflicting == 1)
    assert setup.observer.totals == {"stored": 1, "conflicting": 1}


def test_damaged_journal_lines_are_counted_and_skipped(setup: Setup) -> None:
    left = Journal(setup.directory, 1 << 20)
    left.append([b"{torn", b"[]", b'{"id": "c"}', b"\0\0\0"])
    left.close()
    with setup.recorder() as recorder:
        wait_for(lambda: recorder.stats().lost.get("corrupt_journal") == 4)
        recorder.submit(_build("c"))
        wait_for(lambda: recorder.stats().stored == 1)


def test_record_of_a_newer_program_is_taken(setup: Setup) -> None:
    left = Journal(setup.directory, 1 << 20)
    data = {**record("c").to_json(), "colour": "a field of tomorrow"}
    left.append([json.dumps(data).encode()])
    left.close()
    with setup.recorder() as recorder:
        wait_for(lambda: recorder.stats().stored == 1)


def test_disk_error_is_counted_and_survived(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    with setup.recorder() as recorder:
        with monkeypatch.context() as patch:

            def full(*_: object) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(Journal, "append", full)
            recorder.submit(_build("lost"))
            wait_for(lambda: recorder.stats().lost == {"journal_error": 1})
        recorder.submit(_build("c"))
        wait_for(lambda: recorder.stats().stored == 1)


def test_after_close_answers_are_counted_as_lost(setup: Setup) -> None:
    with setup.recorder() as recorder:
        recorder.close()
        assert not recorder.submit(_build("late"))
        assert recorder.stats().lost == {"closed": 1}


def test_many_threads_submit(setup: Setup) -> None:
    with setup.recorder() as recorder:
        threads = [
            threading.Thread(target=lambda t=t: [recorder.submit(_build(f"{t}-{n}")) for n in range(200)])
            for t in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recorder.close()
    assert len(setup.store.records) == 1600
