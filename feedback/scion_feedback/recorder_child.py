"""The recorder's own process: `python -m scion_feedback.recorder_child FD`, started by recorder_process.

Takes pickled thunks from the socket FD, lets a Recorder build, journal and store them, and reports what became of them.
Ends when the other side of the socket is gone, after it has recorded what it was handed. Trusts its socket: only the
server has the other side.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

from scion_adapters.database import Database
from scion_feedback.captures import CompletionRecord, CompletionStore
from scion_feedback.journal import Journal
from scion_feedback.recorder import Recorder
from scion_feedback.recorder_process import ChildConfig, ChildReport, split

_REPORT_INTERVAL_S = 0.25
_GATHER_S = 0.02
"""A pause between two readings: waking for each answer would cost the server that sends it, too."""
_READ_BYTES = 1 << 18
_NICENESS = 19


class _Settlement:
    """Counts the thunks that the recorder is done with: built, and what came of it journaled or counted as lost.

    The recorder builds a batch and then appends it: at the end of an append, all that was built is settled.
    """

    def __init__(self) -> None:
        self.built = 0
        self.settled = 0

    def build(self, pickled: bytes) -> CompletionRecord | None:
        self.built += 1
        record: CompletionRecord | None = pickle.loads(pickled)()  # noqa: S301 - from the server that started us
        return record


class _SettlingJournal(Journal):
    """A journal that says when a batch is safe."""

    def __init__(self, directory: Path, max_bytes: int, settlement: _Settlement) -> None:
        super().__init__(directory, max_bytes)
        self._settlement = settlement

    def append(self, lines: Sequence[bytes]) -> int:
        try:
            return super().append(lines)
        finally:
            self._settlement.settled = self._settlement.built


def run(connection: socket.socket) -> None:
    """Serve one parent until it is gone."""
    buffer = bytearray()
    messages: list[bytes] = []
    while not messages:
        if not (data := connection.recv(_READ_BYTES)):
            return
        buffer += data
        messages = split(buffer)
    config = ChildConfig(**pickle.loads(messages.pop(0)))  # noqa: S301 - from the server that started us
    _move(config.cores)
    settlement = _Settlement()
    database = Database(config.database_url)
    recorder = Recorder(
        CompletionStore(database),
        _SettlingJournal(Path(config.journal), config.journal_max_bytes, settlement),
        queue_size=sys.maxsize,  # the parent bounds what is under way
        flush_interval_s=config.flush_interval_s,
    )
    recorder.start()
    reported = ChildReport()
    report_due = 0.0
    while True:
        for message in messages:
            recorder.submit(partial(settlement.build, message))
        if time.monotonic() >= report_due:
            reported = _report(connection, recorder, settlement.settled, reported)
            report_due = time.monotonic() + _REPORT_INTERVAL_S
        if not select.select([connection], [], [], _REPORT_INTERVAL_S)[0]:
            messages = []
            continue
        data = b""
        with suppress(ConnectionError):
            data = connection.recv(_READ_BYTES)
        if not data:
            break
        buffer += data
        messages = split(buffer)
        if len(data) < _READ_BYTES:
            time.sleep(_GATHER_S)
    finished = threading.Event()
    threading.Thread(target=_close, args=(recorder, config.close_timeout_s, finished), daemon=True).start()
    while not finished.wait(_REPORT_INTERVAL_S):
        reported = _report(connection, recorder, settlement.settled, reported)
    _report(connection, recorder, settlement.built, reported)
    database.dispose()


def _close(recorder: Recorder, timeout_s: float, finished: threading.Event) -> None:
    recorder.close(timeout_s)
    finished.set()


def _report(connection: socket.socket, recorder: Recorder, settled: int, before: ChildReport) -> ChildReport:
    """Tell the parent, if there is news. A parent that is gone does not listen."""
    stats = recorder.stats()
    report = ChildReport(
        settled=settled,
        journaled=stats.journaled,
        stored=stats.stored,
        redelivered=stats.redelivered,
        conflicting=stats.conflicting,
        lost=dict(stats.lost),
    )
    if report != before:
        with suppress(OSError):
            connection.sendall(json.dumps(asdict(report)).encode() + b"\n")
    return report


def _give_way() -> None:
    """Answering comes before recording: run where and when nothing else wants to, on the server's cores too."""
    with suppress(OSError):
        os.nice(_NICENESS)
        if hasattr(os, "SCHED_IDLE"):  # niceness alone still takes whole slices from a request that waits
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _move(cores: Sequence[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            logging.warning("capture.cores = %s: %s; recording goes on where the server runs", list(cores), error)


def main() -> None:
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a service manager signals everybody; the socket says when it is over
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s vllm-scion recorder: %(message)s")
    _give_way()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        run(connection)


if __name__ == "__main__":
    main()
