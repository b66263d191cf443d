"""What the demo shows in the end: a table, a plot, and the figures as JSON.

Owns the presentation and the judgement against the bars. It plays nothing.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BAR_THUMBS_UP = 0.80
BAR_ACCURACY_DROP = 0.03


@dataclass(frozen=True, slots=True)
class Round:
    """What users said of one champion. Shares are in 0..1."""

    version: str
    thumbs_up_share: float
    liked_share: float
    accuracy: float
    votes: int
    turns: int
    trained_s: float | None
    """Seconds from the start of training to promotion of the version, None for the base."""


@dataclass(frozen=True, slots=True)
class Incident:
    """An attempt to break the service, and how it ended."""

    name: str
    version: str
    outcome: str
    detail: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Result:
    """Everything that the demo measured."""

    prefer: str
    seed: int
    rounds: tuple[Round, ...]
    incidents: tuple[Incident, ...]
    requests: int
    failed_requests: int
    errors: tuple[str, ...]
    seconds: float

    def bars(self) -> dict[str, bool]:
        """Each promise of the demo, and whether it was kept."""
        first, last = self.rounds[0], self.rounds[-1]
        return {
            f"thumbs-up share at least {BAR_THUMBS_UP:.2f}": last.thumbs_up_share >= BAR_THUMBS_UP,
            f"accuracy at most {BAR_ACCURACY_DROP * 100:.0f} points lower": last.accuracy
            >= first.accuracy - BAR_ACCURACY_DROP,
            "no failed request": self.failed_requests == 0,
            "every bad version was stopped": all(incident.stopped for incident in self.incidents),
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bars": self.bars(), "met": all(self.bars().values())}


def write_json(result: Result, file: Path) -> None:
    """Write the figures; the folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")


def show(result: Result, console: Console) -> None:
    """Print the tables and what was promised."""
    table = Table(title=f"Users who prefer {result.prefer}, seed {result.seed}", title_justify="left")
    for column in ("round", "champion", "thumbs up", "liked (truth)", "fact accuracy", "votes", "trained to promoted"):
        table.add_column(column, justify="left" if column == "champion" else "right")
    for number, round_ in enumerate(result.rounds):
        table.add_row(
            str(number),
            round_.version,
            f"{round_.thumbs_up_share:.0%}",
            f"{round_.liked_share:.0%}",
            f"{round_.accuracy:.1%}",
            str(round_.votes),
            "-" if round_.trained_s is None else f"{round_.trained_s:.0f} s",
        )
    console.print(table)
    for incident in result.incidents:
        mark = "[green]stopped[/]" if incident.stopped else "[red]NOT STOPPED[/]"
        console.print(f"{mark}  {incident.name} ({incident.version}): {incident.outcome}. {incident.detail}")
    console.print(
        f"{result.requests} requests, {result.failed_requests} failed, {result.seconds:.0f} s in all", highlight=False
    )
    for promise, kept in result.bars().items():
        console.print(f"  {'[green]met[/]    ' if kept else '[red]MISSED[/] '} {promise}", highlight=False)
    for error in result.errors[:5]:
        console.print(f"  [red]failed request:[/] {error}", markup=True, highlight=False)


def plot(
    result: Result, windows: Sequence[tuple[float, float]], marks: Sequence[tuple[float, str]], file: Path
) -> None:
    """Draw the rounds, and the whole demo as time went by.

    `windows` are (minute, share of thumbs up) of consecutive votes; `marks` are (minute, what happened).
    """
    import matplotlib as mpl  # slow to import, and only needed here

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), gridspec_kw={"width_ratios": [1, 1.7]})
    numbers = range(len(result.rounds))
    left.plot(numbers, [r.thumbs_up_share for r in result.rounds], "o-", color="tab:green", label="thumbs-up share")
    left.plot(numbers, [r.accuracy for r in result.rounds], "s--", color="tab:blue", label="fact accuracy")
    left.axhline(BAR_THUMBS_UP, color="tab:green", linewidth=0.8, linestyle=":")
    left.set_xticks(list(numbers), [f"round {n}\n{r.version}" for n, r in enumerate(result.rounds)])
    left.set_ylim(0, 1.02)
    left.set_title(f"Users who prefer {result.prefer}")
    left.legend(loc="lower right")
    right.plot([minute for minute, _ in windows], [share for _, share in windows], color="tab:green", linewidth=1.4)
    for minute, text in marks:
        right.axvline(minute, color="0.6", linewidth=0.8)
        right.text(minute, 0.02, f" {text}", rotation=90, va="bottom", ha="right", fontsize=7, color="0.3")
    right.set_ylim(0, 1.02)
    right.set_xlabel("minutes")
    right.set_title(
        f"Share of thumbs up among the last votes ({result.requests} requests, {result.failed_requests} failed)"
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)
