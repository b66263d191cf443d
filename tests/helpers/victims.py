"""Programs that a test kills: `python -m tests.helpers.victims votes|records URL [JOURNAL]`.

Each prints the ids of what it has made safe, one per line, until somebody kills it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from scion_adapters.database import Database
from scion_feedback.captures import CompletionStore, decode
from scion_feedback.feedback import FeedbackStore, parse_feedback
from scion_feedback.journal import Journal
from scion_feedback.recorder import Recorder
from tests.helpers.feedback import HASHER, record


class Victim:
    """A running program of this module."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.helpers.victims", *arguments]
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)

    def kill_after(self, num_ids: int) -> list[str]:
        """Read that many ids, kill the program with SIGKILL, and return all that it had printed."""
        assert self.process.stdout is not None
        ids = list(itertools.islice(self.process.stdout, num_ids))
        assert len(ids) == num_ids, "the program ended by itself"
        self.process.kill()
        ids += self.process.stdout.readlines()
        self.process.wait()
        self.process.stdout.close()
        return [line.strip() for line in ids if line.endswith("\n")]


class _PrintingJournal(Journal):
    def append(self, lines: Sequence[bytes]) -> int:
        written = super().append(lines)
        print(*(decode(line).id for line in lines[:written]), sep="\n", flush=True)
        return written


def _votes(url: str) -> None:
    store = FeedbackStore(Database(url), HASHER)
    for number in itertools.count():
        result = store.add(parse_feedback({"completion_id": f"c{number}", "value": 1, "user": "alice"}))
        print(result.row.id, flush=True)


def _records(url: str, journal: str) -> None:
    recorder = Recorder(
        CompletionStore(Database(url)), _PrintingJournal(Path(journal), 1 << 30), queue_size=100, flush_interval_s=0.005
    )
    recorder.start()
    pause = threading.Event()
    for number in itertools.count():
        while not recorder.submit(lambda number=number: record(f"c{number}")):  # type: ignore[misc]
            pause.wait(0.001)


if __name__ == "__main__":
    if sys.argv[1] == "votes":
        _votes(sys.argv[2])
    else:
        _records(sys.argv[2], sys.argv[3])
