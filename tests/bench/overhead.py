"""What the plugin costs: throughput on the real engine, and latency with generation stubbed out, against stock vLLM."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import overhead_engine, overhead_stub
from tests.bench.figures import Interval, percentile
from tests.bench.overhead_stub import CONTROL, OURS, SERVERS, STOCK, Series, StubOutcome
from tests.bench.report import Bar, Benchmark, Outcome

RATIO_BAR = 0.98
P50_BAR_MS = 0.3
P99_BAR_MS = 1.0
COLUMNS = ("milliseconds", "stock", "scion", "added", "median of pairs", "control added")


def run(output: Path, quick: bool) -> Outcome:
    """Both parts; `quick` leaves the real engine out."""
    with tempfile.TemporaryDirectory(prefix="scion-bench-") as directory:
        home = Path(directory)
        stub = overhead_stub.measure(home, overhead_stub.QUICK if quick else overhead_stub.Plan())
        plot(stub.series, output / "overhead.png")
        outcome = summarise(stub)
        if quick:
            return outcome
        (home / "engine").mkdir()
        return _with_engine(outcome, overhead_engine.measure(home / "engine", overhead_engine.Plan()))


def summarise(stub: StubOutcome) -> Outcome:
    """Figures, bars and table of the stubbed part. The bars hold at the highest rate of each kind of request."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    series_figures: list[dict[str, Any]] = []
    warnings: list[str] = []
    for series in stub.series:
        label = f"{series.kind} at {series.rate:.0f}/s ({series.share:.0%})"
        series_figures.append(_series_figures(series))
        rows += _rows(series, label)
        warnings += _warnings(series, label)
        if series.share == 1.0:
            measurable = not _warnings(series, label)
            for q, bound in ((50, P50_BAR_MS), (99, P99_BAR_MS)):
                name = f"added p{q}, {series.kind}, highest rate"
                bars.append(Bar(name, series.added(q).value, bound, unit="ms", is_measurable=measurable))
    failed = sum(sum(series.num_failed.values()) for series in (*stub.series, *stub.dropped))
    figures = {
        "stub": series_figures,
        "stub_not_sustained": [_series_figures(series) for series in stub.dropped],
        "stub_failed_requests": failed,
        "stub_answered": stub.num_sent,
        "stub_recorded": stub.num_recorded,
        "stub_lost": stub.num_lost,
        "recorder_has_core": stub.has_recorder_core,
        "plugin_event_loop_us_per_request": round(stub.own_overhead_us, 1),
    }
    notes = (
        f"recorded {stub.num_recorded} of {stub.num_sent} answers, lost {stub.num_lost}; {failed} requests failed",
        f"the plugin itself reports {stub.own_overhead_us:.0f} µs on the event loop per request, mean",
        "the recorder ran on a core of its own (capture.cores)"
        if stub.has_recorder_core
        else "the recorder ran on the server's cores: set capture.cores where there are more than three",
        "brackets: 95% bootstrap interval over blocks; control: a second stock server, whose added latency is noise",
        *(_not_sustained(series) for series in stub.dropped),
        *warnings,
    )
    return Outcome(figures, tuple(bars), COLUMNS, tuple(rows), notes)


def _not_sustained(series: Series) -> str:
    p99s = ", ".join(f"{name} {series.percentile(name, 99):.1f}" for name in SERVERS)
    apart = series.added(99, CONTROL)
    return (
        f"{series.kind} at {series.rate:.0f}/s: not sustained by the stock servers, so a lower rate followed "
        f"(p99 in ms: {p99s}; two stock servers apart by {apart}, added {series.added(99)})"
    )


def _warnings(series: Series, label: str) -> list[str]:
    """What makes a series worth less than it looks."""
    found = []
    if not series.is_held:
        bound = f"{overhead_stub.HOLD_P99_MS:g} ms"
        found.append(f"{label}: NOT HELD; not even this rate stays within {bound} at p99: measure on a quiet machine")
    if not series.is_steady():
        found.append(
            f"{label}: NOISE; two equal servers may differ by more than the bound at p99: measure on a quiet machine"
        )
    return found


def _rows(series: Series, label: str) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            f"{label}: p{q}",
            f"{series.percentile(STOCK, q):.3f}",
            f"{series.percentile(OURS, q):.3f}",
            str(series.added(q)),
            f"{series.paired(q).value:+.3f}",
            str(series.added(q, CONTROL)),
        )
        for q in (50, 99)
    ]
    cpu = {name: series.cpu_ms(name) for name in SERVERS}
    rows.append(
        (
            f"{label}: server CPU per request",
            f"{cpu[STOCK]:.3f}",
            f"{cpu[OURS]:.3f}",
            f"{cpu[OURS] - cpu[STOCK]:+.3f} (and {series.children_cpu_ms(OURS):.3f} in the recorder's process)",
            "",
            f"{cpu[CONTROL] - cpu[STOCK]:+.3f}",
        )
    )
    return rows


def _series_figures(series: Series) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "kind": series.kind,
        "rate_per_s": round(series.rate, 1),
        "share_of_highest_rate": series.share,
        "num_blocks": len(series.blocks[STOCK]),
        "num_requests": sum(map(len, series.blocks[OURS])),
        "failed": series.num_failed,
        "is_held": series.is_held,
        "generator_lag_p99_ms": round(series.lag_p99_ms, 3),
        "children_cpu_ms_per_request": {name: round(series.children_cpu_ms(name), 4) for name in SERVERS},
        "server_cpu_ms_per_request": {name: round(series.cpu_ms(name), 4) for name in SERVERS},
    }
    figures["block_p99_ms"] = {name: [round(percentile([b], 99), 2) for b in series.blocks[name]] for name in SERVERS}
    for q in (50, 90, 99, 99.9):
        figures[f"p{q:g}_ms"] = {name: round(series.percentile(name, q), 3) for name in SERVERS}
    for q in (50, 99):
        figures[f"added_p{q}_ms"] = _interval(series.added(q))
        figures[f"control_added_p{q}_ms"] = _interval(series.added(q, CONTROL))
        figures[f"added_p{q}_ms_median_of_pairs"] = _interval(series.paired(q))
        figures[f"added_first_byte_p{q}_ms"] = _interval(series.added_first_byte(q))
    return figures


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def _with_engine(stub: Outcome, engine: overhead_engine.EngineOutcome) -> Outcome:
    ratio, p50, p99 = engine.ratio, engine.added_ms(50), engine.added_ms(99)
    throughput = {name: sorted(values)[len(values) // 2] for name, values in engine.throughput.items()}
    figures = {
        "engine": {
            "throughput_ratio": _interval(ratio),
            "requests_per_s": {name: round(value, 2) for name, value in throughput.items()},
            "added_p50_ms": _interval(p50),
            "added_p99_ms": _interval(p99),
            "num_pairs": len(engine.throughput[STOCK]),
            "failed": engine.num_failed,
        },
        **stub.figures,
    }
    rows = (
        (
            "real engine: requests/s",
            f"{throughput[STOCK]:.2f}",
            f"{throughput[OURS]:.2f}",
            f"ratio {ratio.value:.3f} ({ratio.low:.3f} … {ratio.high:.3f})",
            "",
            "",
        ),
        (
            "real engine: p50",
            f"{engine.percentile(STOCK, 50):.1f}",
            f"{engine.percentile(OURS, 50):.1f}",
            str(p50),
            "",
            "",
        ),
        (
            "real engine: p99",
            f"{engine.percentile(STOCK, 99):.1f}",
            f"{engine.percentile(OURS, 99):.1f}",
            str(p99),
            "",
            "",
        ),
    )
    bar = Bar("throughput ratio, real engine", ratio.value, RATIO_BAR, at_least=True)
    clients, tokens = overhead_engine.NUM_CLIENTS, overhead_engine.MAX_TOKENS
    note = f"real engine: {clients} clients, {tokens} tokens per answer, median of block pairs"
    return Outcome(figures, (bar, *stub.bars), stub.columns, rows + stub.rows, (note, *stub.notes))


def plot(all_series: Sequence[Series], path: Path) -> None:
    """Latency distributions of the three servers, one panel per series; the last percent is what the eye should see."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(all_series), figsize=(4.2 * len(all_series), 3.8), squeeze=False)
    for axis, series in zip(axes[0], all_series, strict=True):
        for name, style in ((CONTROL, "0.7"), (STOCK, "tab:blue"), (OURS, "tab:orange")):
            values = np.sort(np.concatenate([np.asarray(block) for block in series.blocks[name]]))
            above = 1 - np.arange(len(values)) / len(values)  # the share that takes longer
            axis.loglog(
                values, above, color=style, label={OURS: "vllm-scion", CONTROL: "stock, again"}.get(name, "stock vLLM")
            )
        axis.set_title(f"{series.kind}, {series.rate:.0f} requests/s", fontsize=10)
        axis.set_xlabel("latency (ms)")
        axis.grid(visible=True, which="both", alpha=0.2)
    axes[0][0].set_ylabel("share of requests that take longer")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


BENCHMARK = Benchmark("overhead", "vLLM with the plugin against stock vLLM, measured side by side", run)
