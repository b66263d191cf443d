from __future__ import annotations

import io
from pathlib import Path

from scion_trainer.progress import METRICS_FILE, Progress, curves, read_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lines_show_step_loss_and_time_left(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    with Progress(tmp_path, stream=out, monotonic=clock) as progress:
        progress.begin(total_steps=30, done_steps=10)
        for step in range(11, 31):
            clock.now += 1.0
            progress.step(step, {"loss": 1.0 / step})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 15/30  loss 0.0667  5 s, 15 s left"  # at most one line every five seconds
    assert lines[-1].startswith("step 30/30")
    assert len(lines) == 4


def test_steps_are_kept_and_a_repeated_one_counts_once(tmp_path: Path) -> None:
    clock = Clock()
    for steps, loss in ((range(1, 5), 1.0), (range(3, 7), 2.0)):  # killed after step 4, resumed from step 2
        with Progress(tmp_path, stream=io.StringIO(), monotonic=clock) as progress:
            progress.begin(total_steps=6, done_steps=steps.start - 1)
            for step in steps:
                clock.now += 0.5
                progress.step(step, {"loss": loss})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 7, "lo')  # a line that a kill cut off
    records = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in records] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert sum(r["seconds"] for r in records) == 3.0


def test_curves_are_the_series_that_every_step_has() -> None:
    records = [{"step": 1, "loss": 0.5, "kl": 0.0}, {"step": 2, "loss": 0.25}]
    assert curves(records) == {"step": [1, 2], "loss": [0.5, 0.25]}
    assert curves([]) == {"step": []}


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
