"""What the commands print: tables for people, JSON (`--json`) for scripts. Errors and progress go to stderr."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Into a pipe or a file nothing needs to fit: a table that is cut to 80 columns helps no script.
_PIPED_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240
console = Console(soft_wrap=False, width=_PIPED_WIDTH)
error_console = Console(stderr=True, soft_wrap=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ReasonOption = Annotated[str, typer.Option("--reason", "-m", help="Why; kept with the event.")]


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, default=_plain) + "\n")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, title: str | None = None) -> None:
    """A table on stdout; None is shown as a dash."""
    table = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in row))  # Text: brackets are no markup here
    console.print(table)


def actor() -> str:
    """Who is typing: recorded with every change. $SCION_ACTOR overrides the login name."""
    if name := os.environ.get("SCION_ACTOR"):
        return name[:128]
    try:
        return f"cli:{getpass.getuser()}"[:128]
    except (KeyError, OSError):  # no passwd entry, as in some containers
        return f"cli:uid-{os.getuid()}"


def format_time(seconds: float | None) -> str | None:
    """A Unix time as local time, to the second."""
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def format_age(seconds: float) -> str:
    """A duration in its largest unit: 12 s, 5 min, 3 h, 2 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0.0):.0f} s"


def format_bytes(size_bytes: float) -> str:
    """A size with its unit: 1.4 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
