"""Runs operations in children that are killed at their N-th side effect: `python -m tests.helpers.deathrow`.

A child starts by fork from a process that has imported everything and opened nothing, which takes milliseconds.
The parent's side is `DeathRow`; what is run stands in killed_operations.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

MAX_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Outcome:
    """`killed` before the effect `label`, or it ended by itself after `steps` effects."""

    killed: bool
    label: str
    steps: int
    torn: bool = False

    def __str__(self) -> str:
        how = "half of" if self.torn else "before"
        return f"killed {how} effect {self.steps}, {self.label}" if self.killed else f"ended after {self.steps} effects"


class DeathRow:
    """The process that forks; use it as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.deathrow"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    def __enter__(self) -> DeathRow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()  # end of input ends it

    def run(self, operation: str, home: Path, at: int = 0, *, torn: bool = False) -> Outcome:
        """Do `operation` in `home`, in a child that dies at effect `at`; 0 lets it live. AssertionError if it fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"operation": operation, "home": str(home), "at": at, "torn": torn}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return Outcome(answer["killed"], answer["label"], answer["steps"], torn)

    def deaths(self, operation: str, homes: Iterator[Path]) -> Iterator[tuple[Path, Outcome]]:
        """Kill `operation` at each of its effects in turn, each time in the next of `homes`; the last one lives."""
        torn: list[int] = []
        for at in range(1, MAX_STEPS):
            home = next(homes)
            outcome = self.run(operation, home, at)
            yield home, outcome
            if not outcome.killed:
                break
            if outcome.label.startswith("open "):
                torn.append(at)
        for at in torn:
            home = next(homes)
            yield home, self.run(operation, home, at, torn=True)


def _serve() -> None:
    from tests.helpers.killed_operations import OPERATIONS, OTHERS
    from tests.helpers.killed_server import SERVERS

    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(_in_child(OPERATIONS | SERVERS | OTHERS, job)), flush=True)


def _in_child(operations: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _live_and_die(operations, job, writer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = json.loads(pipe.read() or '{"error": "the child said nothing"}')
    os.waitpid(child, 0)
    return dict(answer)


def _live_and_die(operations: dict[str, Any], job: dict[str, Any], writer: int) -> None:
    from tests.helpers.kill_points import KillPoints

    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)  # standard output belongs to the answers

    def say(**answer: Any) -> None:
        os.write(writer, json.dumps(answer).encode())

    home = Path(job["home"])
    points = KillPoints(
        job["at"],
        torn=job["torn"],
        home=home,
        say=lambda label: say(killed=True, label=label, steps=job["at"]),
    )
    try:
        points.arm()
        operations[job["operation"]].run(home, points.step)
    except BaseException:
        say(error=traceback.format_exc())
    else:
        say(killed=False, label="", steps=points.count)


if __name__ == "__main__":
    _serve()
