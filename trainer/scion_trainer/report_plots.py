"""The plots of a report, as SVG text to be put into a page.

Owns how figures are drawn, and nothing else. Drawn without pyplot: no global state, no display.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from scion_trainer.gates.types import GateResult

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
CANDIDATE, PARENT, GOOD, BAD = "#2f6f4f", "#9aa5b1", "#2f6f4f", "#b4483a"
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "scion",  # the same figures give the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Segoe UI", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
}


def drawable(gate: GateResult) -> GateResult:
    """The gate without what is no number in its details: a plot cannot show it, and must not stop the report."""
    return replace(gate, details=_finite(gate.details))


def _finite(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items() if _is_finite(value)}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data if _is_finite(value)]
    return data


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def plot_lengths(gate: GateResult) -> str | None:
    """Answer lengths of parent and candidate, or None when they were not measured."""
    lengths = gate.details.get("lengths")
    if not lengths:
        return None
    longest = max(max(lengths["parent"]), max(lengths["candidate"]), 1)
    edges = _edges(longest)
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        styles = {"bins": edges, "alpha": 0.75}
        axes.hist(lengths["parent"], color=PARENT, label="parent", **styles)
        axes.hist(lengths["candidate"], color=CANDIDATE, label="candidate", **styles)
        axes.set_xlabel("tokens per answer")
        axes.set_ylabel("answers")
        axes.legend(frameon=False)
        return _svg(figure)


def plot_heldout(gate: GateResult) -> str | None:
    """Every held-out answer's shift, liked and disliked apart, with the two means."""
    liked, disliked = gate.details.get("liked_shifts"), gate.details.get("disliked_shifts")
    if not liked or not disliked:
        return None
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        for row, (values, colour) in enumerate(((disliked, BAD), (liked, GOOD))):
            heights = [row + 0.28 * _spread(index) for index in range(len(values))]
            axes.scatter(values, heights, s=16, color=colour, alpha=0.45, linewidths=0)
            mean = sum(values) / len(values)
            axes.plot([mean, mean], [row - 0.36, row + 0.36], color=colour, linewidth=2.5)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks([0, 1], ["disliked", "liked"])
        axes.set_ylim(-0.6, 1.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("likelier than under the parent (nats per token)")
        return _svg(figure)


def plot_retention(gate: GateResult) -> str | None:
    """The retention items' drops in order, with the bound on their mean."""
    drops = gate.details.get("drops_from_base")
    if not drops:
        return None
    ordered = sorted(drops)
    bound = next((b.high for b in gate.bounds if b.figure == "drop_from_base"), None)
    mean = sum(ordered) / len(ordered)
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.bar(
            range(len(ordered)), ordered, width=1.0, color=[BAD if drop > 0 else GOOD for drop in ordered], alpha=0.6
        )
        axes.axhline(mean, color=INK, linewidth=1.5, label=f"mean {mean:+.3f}")
        if bound is not None:
            axes.axhline(bound, color=BAD, linewidth=1.2, linestyle="--", label=f"bound on the mean {bound:g}")
            highest = max(ordered[-1], bound)
            axes.set_ylim(min(ordered[0], -0.1 * highest) * 1.1, highest * 1.15)
        axes.set_xticks([])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("known items, from least to most forgotten")
        axes.set_ylabel("nats per token less likely")
        axes.legend(frameon=False, loc="upper left")
        return _svg(figure)


def plot_forgetting(gate: GateResult) -> str | None:
    """The mean drop of general text and of every earlier version's liked answers, each with its bound."""
    drops = gate.details.get("drops")
    drops = {name: values for name, values in (drops or {}).items() if values}
    if not drops:
        return None
    bounds = {bound.figure.removesuffix("_drop"): bound.high for bound in gate.bounds}
    means = [sum(values) / len(values) for values in drops.values()]
    highs = [bounds.get(name) for name in drops]
    colours = [BAD if high is not None and mean > high else GOOD for mean, high in zip(means, highs, strict=True)]
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.barh(range(len(means)), means, height=0.6, color=colours, alpha=0.75)
        for row, high in enumerate(highs):
            if high is not None:
                axes.plot([high, high], [row - 0.4, row + 0.4], color=BAD, linewidth=1.5, linestyle="--")
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(means)), [name.replace("_", " ") for name in drops])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("nats per token less likely than under the champion")
        return _svg(figure)


def plot_parity(gate: GateResult) -> str | None:
    """How far server and trainer are apart, token by token, with the bound on the mean distance."""
    deltas = gate.details.get("deltas")
    if not deltas:
        return None
    bound = next((b.high for b in gate.bounds if b.figure == "mean_delta"), None)
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.hist(deltas, bins=31, color=CANDIDATE, alpha=0.75)
        for edge in (-bound, bound) if bound is not None else ():
            axes.axvline(edge, color=BAD, linewidth=1.2, linestyle="--")
        axes.set_xlabel("log-prob by the server less that by the trainer (nats)")
        axes.set_ylabel("tokens")
        return _svg(figure)


def plot_shares(gate: GateResult) -> str | None:
    """Shares of answers that refuse, ask back, agree or repeat, by model."""
    shares = gate.details.get("shares")
    if not shares:
        return None
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        for index, (model, colour) in enumerate((("base", GRID), ("parent", PARENT), ("candidate", CANDIDATE))):
            places = [row + (index - 1) * 0.27 for row in range(len(shares))]
            axes.barh(places, [values[index] for values in shares.values()], height=0.25, color=colour, label=model)
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_xlim(0, 1)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of answers")
        axes.legend(frameon=False)
        return _svg(figure)


def plot_baseline(gate: GateResult) -> str | None:
    """How far liked and disliked answers are apart with examples in the prompt, and after training."""
    separations = gate.details.get("separations")
    if not separations:
        return None
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.bar(range(len(separations)), list(separations.values()), width=0.5, color=[PARENT, CANDIDATE])
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_xticks(range(len(separations)), list(separations))
        axes.grid(axis="x", visible=False)
        axes.set_ylabel("liked less disliked, against the base (nats per token)")
        return _svg(figure)


def plot_wins(gate: GateResult) -> str | None:
    """The win rate with its interval, and the rate that is wanted."""
    if "win_rate" not in gate.figures:
        return None
    rate, low, high = (gate.figures[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
    wanted = next((b.low for b in gate.bounds if b.figure == "win_rate"), None)
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.errorbar([rate], [0], xerr=[[rate - low], [high - rate]], fmt="o", color=CANDIDATE, capsize=6, linewidth=2)
        if wanted is not None:
            axes.axvline(wanted, color=BAD, linewidth=1.2, linestyle="--", label=f"wanted: more than {wanted:.0%}")
            axes.legend(frameon=False)
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of comparisons with the champion that it wins")
        return _svg(figure)


def plot_curve(steps: Sequence[float], values: Sequence[float], unit: str) -> str:
    """What one figure of the training did, step by step; a single step is a point."""
    with matplotlib.rc_context(dict(_STYLE)):
        figure, axes = _canvas()
        axes.plot(steps, values, color=CANDIDATE, linewidth=1.8, marker="o" if len(values) < 3 else "")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        return _svg(figure)


def _canvas() -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    return figure, figure.subplots()


def _edges(longest: int) -> Sequence[float]:
    """At most 24 bins of whole tokens."""
    width = max(1, -(-longest // 24))
    return [edge - 0.5 for edge in range(0, longest + width + 1, width)]


def _spread(index: int) -> float:
    """-1..1, evenly and the same every time: the golden ratio's multiples never cluster."""
    return 2 * (index * 0.618033988749895 % 1) - 1


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r'\s(width|height)="[\d.]+pt"', "", text[text.index("<svg") :], count=2)
