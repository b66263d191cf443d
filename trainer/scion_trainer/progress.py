"""How a run shows what it does: a bar (or plain lines) on stderr, and `metrics.jsonl` in its directory.

Owns both, and the curves that are read back from the file. It knows nothing of torch or of what is trained.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

METRICS_FILE = "metrics.jsonl"
CURVES = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "grad_norm", "learning_rate"),
    *("reward", "kl_to_base", "kl_coefficient", "clip_fraction", "entropy", "answer_tokens", "mismatch"),
)
LINE_INTERVAL_S = 5.0


class Progress:
    """Reports one run. Use it as a context manager, so that the terminal is left as it was."""

    def __init__(
        self, directory: Path, *, stream: TextIO | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = directory / METRICS_FILE
        self._console = Console(file=stream or sys.stderr, soft_wrap=True)
        self._monotonic = monotonic
        self._bar: RichProgress | None = None
        self._task: Any = None
        self._total = 0
        self._first_step = 0
        self._began = self._previous = self._last_line = monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """One line about what happens."""
        self._console.print(text, highlight=False, markup=False)

    def begin(self, *, total_steps: int, done_steps: int) -> None:
        """Training starts, or goes on, at step `done_steps`."""
        self._total, self._first_step = total_steps, done_steps
        self._began = self._previous = self._last_line = self._monotonic()
        if self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=total_steps, completed=done_steps, loss="")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` is done; `values` are its metrics."""
        now = self._monotonic()
        record = {"step": step, "seconds": round(now - self._previous, 4), **values}
        self._previous = now
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        loss = f"loss {values.get('loss', float('nan')):.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss)
        elif now - self._last_line >= LINE_INTERVAL_S or step == self._total:
            self._last_line = now
            per_step_s = (now - self._began) / max(1, step - self._first_step)
            left_s = per_step_s * (self._total - step)
            self.say(f"step {step}/{self._total}  {loss}  {now - self._began:.0f} s, {left_s:.0f} s left")


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The steps of a run in order. Where a resumed run did a step again, the last time counts."""
    by_step: dict[int, dict[str, Any]] = {}
    path = directory / METRICS_FILE
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def curves(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The series worth a plot: "step" and those of CURVES that every record has."""
    found = {"step": [record["step"] for record in records]}
    for name in CURVES:
        if records and all(name in record for record in records):
            found[name] = [round(float(record[name]), 6) for record in records]
    return found
