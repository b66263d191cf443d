"""The recorder's process, with a real child and a real SQLite database: nothing is lost when either side is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.tables import completions
from scion_feedback import recorder_process
from scion_feedback.captures import CompletionRecord
from scion_feedback.recorder_process import ChildConfig, RecorderProcess, frame, split
from tests.helpers.databases import sqlite_database
from tests.helpers.feedback import record
from tests.helpers.waiting import wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the child unpickles functions of these tests' helpers


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


@pytest.fixture
def config(database: Database, tmp_path: Path) -> ChildConfig:
    return ChildConfig(database.url, str(tmp_path / "journal"), 1 << 24, queue_size=10_000, flush_interval_s=0.01)


def _build(number: int) -> Callable[[], CompletionRecord]:
    return partial(record, f"c{number}")


def _stored(database: Database) -> list[str]:
    with database.read() as connection:
        return sorted(connection.execute(sa.select(completions.c.id)).scalars(), key=lambda name: int(name[1:]))


def _running(config: ChildConfig) -> RecorderProcess:
    """With a child that takes what is flushed."""
    recorder = RecorderProcess(config)
    recorder.start()
    wait_for(lambda: not recorder._is_behind)
    return recorder


def _child_pid(recorder: RecorderProcess) -> int | None:
    return recorder._child.process.pid if recorder._child is not None else None


class Observer:
    def __init__(self) -> None:
        self.levels: dict[str, int] = {}
        self.totals: dict[str, int] = {}

    def queued(self, n: int) -> None:
        self.levels["queued"] = n

    def journaled(self, n: int) -> None:
        self.levels["journaled"] = n

    def stored(self, n: int) -> None:
        self.totals["stored"] = self.totals.get("stored", 0) + n

    def lost(self, n: int, reason: str) -> None:
        self.totals[reason] = self.totals.get(reason, 0) + n

    def conflicting(self, n: int) -> None:
        self.totals["conflicting"] = self.totals.get("conflicting", 0) + n


def test_all_records_arrive_and_are_counted(config: ChildConfig, database: Database) -> None:
    observer = Observer()
    recorder = RecorderProcess(config, observer)
    recorder.start()
    assert all(recorder.submit(_build(n)) for n in range(300))
    assert recorder.close(30.0)
    assert _stored(database) == [f"c{n}" for n in range(300)]
    assert observer.totals == {"stored": 300}
    stats = recorder.stats()
    assert (stats.queued, stats.journaled, stats.stored, dict(stats.lost)) == (0, 0, 300, {})
    assert not list(Path(config.journal).iterdir())


def test_a_killed_child_is_replaced_and_nothing_is_lost(
    config: ChildConfig, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_process, "_RESTART_PAUSE_S", 0.01)
    recorder = RecorderProcess(config)
    recorder.start()
    for number in range(200):
        recorder.submit(_build(number))
    wait_for(lambda: recorder.stats().stored > 0)
    first = _child_pid(recorder)
    assert first is not None
    for number in range(200, 400):
        recorder.submit(_build(number))
    os.kill(first, signal.SIGKILL)
    for number in range(400, 600):
        recorder.submit(_build(number))
    wait_for(lambda: _child_pid(recorder) not in (None, first))
    assert recorder.close(30.0)
    assert _stored(database) == [f"c{n}" for n in range(600)]
    assert recorder.stats().conflicting == 0  # what came twice was recognised
    assert not recorder.stats().lost


_PARENT = """
import os, sys
from functools import partial
from scion_feedback.recorder_process import ChildConfig, RecorderProcess
from tests.helpers.feedback import record
recorder = RecorderProcess(ChildConfig(sys.argv[1], sys.argv[2], 1 << 24, 10_000, 0.005))
recorder.start()
for number in range(100):
    recorder.submit(partial(record, f"c{number}"))
while recorder._is_behind or recorder._unsent:
    recorder.flush()
print(recorder._child.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_server_loses_nothing_that_was_handed_over(config: ChildConfig, database: Database) -> None:
    command = [sys.executable, "-c", _PARENT, config.database_url, config.journal]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    wait_for(lambda: len(_stored(database)) == 100)
    wait_for(lambda: not _is_running(child))  # and it does not stay behind


def _is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_what_cannot_be_handed_over_is_counted(config: ChildConfig, database: Database) -> None:
    recorder = RecorderProcess(config)
    recorder.start()
    recorder.submit(lambda: record("c1"))  # not picklable
    recorder.submit(_build(2))
    assert recorder.close(30.0)
    assert _stored(database) == ["c2"]
    assert recorder.stats().lost == {"unparsable": 1}


def test_what_makes_no_record_is_counted_by_the_child(config: ChildConfig, database: Database) -> None:
    observer = Observer()
    recorder = RecorderProcess(config, observer)
    recorder.start()
    recorder.submit(partial(int, "no number"))  # type: ignore[arg-type]
    recorder.submit(_build(2))
    assert recorder.close(30.0)
    assert _stored(database) == ["c2"]
    assert observer.totals == {"stored": 1, "unparsable": 1}


def test_a_full_queue_and_a_closed_recorder_are_counted(config: ChildConfig) -> None:
    recorder = RecorderProcess(replace(config, queue_size=2))  # not started: nothing leaves the queue
    assert [recorder.submit(_build(n)) for n in range(4)] == [True, True, False, False]
    assert not recorder.close(0.1)
    assert not recorder.submit(_build(5))
    assert recorder.stats().lost == {"queue_full": 2, "closed": 1}


def test_large_answers_fill_the_queue_by_their_size(config: ChildConfig, database: Database) -> None:
    image = {"prompt": "x" * 1000}
    recorder = RecorderProcess(replace(config, queue_max_bytes=3000))
    assert [recorder.submit(partial(record, f"c{n}", request=image)) for n in range(3)] == [True, True, False]
    recorder.start()
    wait_for(lambda: recorder.stats().queued == 0)
    assert recorder.submit(partial(record, "c3", request=image)), "there is room again"
    assert recorder.close(30.0)
    assert _stored(database) == ["c0", "c1", "c3"]
    assert recorder.stats().lost == {"queue_full": 1}


def test_with_the_database_gone_answers_wait_in_the_journal(config: ChildConfig, tmp_path: Path) -> None:
    gone = replace(config, database_url=f"sqlite:///{tmp_path}/gone/scion.db", close_timeout_s=0.5)
    recorder = RecorderProcess(gone)
    recorder.start()
    for number in range(10):
        recorder.submit(_build(number))
    wait_for(lambda: recorder.stats().journaled == 10)
    assert not recorder.close(10.0)
    assert recorder.stats().queued == 0  # they are safe, and not counted as lost
    assert not recorder.stats().lost


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no processes to cores")
def test_the_child_goes_to_cores_of_its_own(config: ChildConfig) -> None:
    core = max(os.sched_getaffinity(0))
    recorder = RecorderProcess(replace(config, cores=(core,)))
    recorder.start()
    wait_for(lambda: (pid := _child_pid(recorder)) is not None and os.sched_getaffinity(pid) == {core})
    assert recorder.close(30.0)


def test_without_the_wished_cores_it_records_all_the_same(config: ChildConfig, database: Database) -> None:
    recorder = RecorderProcess(replace(config, cores=(4000,)))
    recorder.start()
    recorder.submit(_build(1))
    assert recorder.close(30.0)
    assert _stored(database) == ["c1"]


def test_submit_waits_for_nobody(config: ChildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(recorder_process._Child, "send", lambda self, data: stuck.wait(20))
    recorder = RecorderProcess(replace(config, queue_size=50))
    recorder.start()
    accepted = [recorder.submit(_build(n)) for n in range(100)]
    assert accepted == [True] * 50 + [False] * 50
    stuck.set()
    recorder.close(30.0)


def test_a_flush_does_not_break_into_what_the_thread_sends(
    config: ChildConfig, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_process, "_LOOK_INTERVAL_S", 0.01)
    recorder = _running(config)
    begun, go_on = threading.Event(), threading.Event()
    send = recorder_process._Child.send

    def slow(child: recorder_process._Child, data: bytes) -> None:
        child.socket.sendall(data[:10])
        begun.set()
        assert go_on.wait(20)
        send(child, data[10:])

    monkeypatch.setattr(recorder_process._Child, "send", slow)
    recorder.submit(_build(1))
    assert begun.wait(20)
    monkeypatch.setattr(recorder_process._Child, "send", send)
    recorder.submit(_build(2))
    recorder.flush()
    go_on.set()
    assert recorder.close(30.0)
    assert _stored(database) == ["c1", "c2"]


def test_what_the_socket_has_no_room_for_follows(
    config: ChildConfig, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_process, "_SEND_BUFFER_BYTES", 4096)
    recorder = _running(config)
    for number in range(500):
        assert recorder.submit(partial(record, f"c{number}", request={"prompt": "x" * 3000}))
        if number % 5 == 0:
            recorder.flush()
    assert recorder.close(30.0)
    assert _stored(database) == [f"c{n}" for n in range(500)]
    assert recorder.stats().conflicting == 0


def test_without_a_flush_answers_leave_within_a_second(config: ChildConfig, database: Database) -> None:
    recorder = _running(config)
    recorder.submit(_build(1))
    wait_for(lambda: _stored(database) == ["c1"])
    assert recorder.close(30.0)


@pytest.mark.parametrize(
    ("cut", "complete"),
    [
        (0, 0),  # nothing came
        (3, 0),  # half a length
        (10, 0),  # half a message
        (None, 2),  # both
    ],
)
def test_messages_are_found_in_the_stream(cut: int | None, complete: int) -> None:
    data = frame("one") + frame("two")
    buffer = bytearray(data[:cut])
    assert len(split(buffer)) == complete
    assert bytes(buffer) == (b"" if cut is None else data[:cut])
