"""The swap benchmark's results as figures, bars and a table. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.bench.report import Bar, Outcome
from tests.bench.storm import KINDS, Findings, percentile
from tests.bench.swap_replicas import Latencies
from tests.bench.swap_stock import StockStorm

OPERATIONS_BAR = 1000.0
SERVABLE_BAR_S = 1.0
ROLLBACK_BAR_S = 0.1
REPLICAS_ROLLBACK_BAR_S = 1.0
GAP_RATIO_BAR = 1.10
SPLIT_BAR_POINTS = 1.0
COLUMNS = ("server", "swaps", "answers", *KINDS, "slots leaked", "died")


@dataclass
class Storm:
    """What the storm on one server gave. Gaps are seconds between two chunks of an answer."""

    findings: Findings
    operations: dict[str, int]
    seconds: float
    quiet_gaps: list[float] = field(default_factory=list)
    storm_gaps: list[float] = field(default_factory=list)
    rollback_s: list[float] = field(default_factory=list)
    leaked_slots: int = 0
    engine_deaths: int = 0
    split_points: float = float("nan")

    @property
    def num_operations(self) -> int:
        return sum(count for kind, count in self.operations.items() if kind not in ("start", "step"))


def summarise(storm: Storm, replicas: Latencies | None, stock: StockStorm | None) -> Outcome:
    """Figures, bars and the side-by-side table."""
    gap_quiet, gap_storm = percentile(storm.quiet_gaps, 99), percentile(storm.storm_gaps, 99)
    counts = {kind: storm.findings.counts[kind] for kind in KINDS}
    figures: dict[str, Any] = {
        "operations": storm.operations,
        "num_operations": storm.num_operations,
        "answers": storm.findings.num_answers,
        "pairs_of_a_user": storm.findings.num_pairs,
        "seconds": round(storm.seconds, 1),
        **counts,
        "examples": dict(storm.findings.examples),
        "leaked_slots": storm.leaked_slots,
        "engine_deaths": storm.engine_deaths,
        "gap_ms": {
            name: {"p50": percentile(gaps, 50) * 1e3, "p99": percentile(gaps, 99) * 1e3, "num": len(gaps)}
            for name, gaps in (("quiet", storm.quiet_gaps), ("storm", storm.storm_gaps))
        },
        "rollback_ms": [round(seconds * 1e3, 1) for seconds in storm.rollback_s],
        "split_off_points": storm.split_points,
    }
    bars = [Bar("operations", float(storm.num_operations), OPERATIONS_BAR, at_least=True)]
    bars += [Bar(f"{kind} answers", float(count), 0.0) for kind, count in counts.items()]
    bars += [
        Bar("leaked slots", float(storm.leaked_slots), 0.0),
        Bar("engine deaths", float(storm.engine_deaths), 0.0),
        Bar(
            "rollback to last request on the bad version", max(storm.rollback_s, default=0.0), ROLLBACK_BAR_S, unit="s"
        ),
        Bar("p99 gap between tokens, storm over quiet", gap_storm / gap_quiet, GAP_RATIO_BAR),
        Bar("split, off the weight", storm.split_points, SPLIT_BAR_POINTS, unit="points"),
    ]
    if replicas is not None:
        figures["replicas"] = replicas.to_json()
        bars += [
            Bar("publish to servable on two replicas, median", replicas.servable_median, SERVABLE_BAR_S, unit="s"),
            Bar("rollback on two replicas, worst", replicas.rollback_worst, REPLICAS_ROLLBACK_BAR_S, unit="s"),
        ]
    shown = [storm.num_operations, storm.findings.num_answers, *counts.values(), storm.leaked_slots]
    rows = [("scion", *map(str, shown), "yes" if storm.engine_deaths else "no")]
    if stock is not None:
        figures["stock"] = stock.to_json()
        rows += stock.rows()
    return Outcome(figures, tuple(bars), COLUMNS, tuple(rows))
