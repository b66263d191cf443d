"""A report as one self-contained page: no script, no request to anywhere, readable in ten years.

Owns the page's text and looks; the plots are drawn in report_plots.py. All text from users or models is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from scion_trainer.gates.types import Bound, GateResult, Verdict
from scion_trainer.report import Report
from scion_trainer.report_plots import (
    drawable,
    plot_baseline,
    plot_curve,
    plot_forgetting,
    plot_heldout,
    plot_lengths,
    plot_parity,
    plot_retention,
    plot_shares,
    plot_wins,
)

_VERDICTS: Mapping[Verdict, str] = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "rejected",
    Verdict.INCONCLUSIVE: "inconclusive",
    Verdict.UNMEASURABLE: "could not be measured",
}
_PLOTS: Sequence[tuple[str, str, Callable[[GateResult], str | None]]] = (
    ("heldout", "Held-out ratings: what became likelier", plot_heldout),
    ("retention", "Retention: what became less likely", plot_retention),
    ("forgetting", "Forgetting: general text, and what users liked before", plot_forgetting),
    ("baseline", "Training beside examples in the prompt", plot_baseline),
    ("behaviour", "Length of the answers", plot_lengths),
    ("drift", "Manner of the answers", plot_shares),
    ("winrate", "Comparisons with the champion", plot_wins),
    ("parity", "Server and trainer: the same log-probs", plot_parity),
)
_CURVES: Mapping[str, tuple[str, str]] = {
    "reward": ("Reward of the answers sampled", "score of the reward model"),
    "loss": ("Loss", "loss"),
    "rewards/margins": ("Liked over disliked answers", "implicit reward"),
    "kl": ("Divergence from the parent", "nats per answer"),
    "kl_to_base": ("Divergence from the base", "nats per token"),
    "answer_tokens": ("Length of the answers sampled", "tokens"),
    "entropy": ("Entropy of the policy", "nats per token"),
    "clip_fraction": ("Tokens whose ratio was clipped", "share"),
    "mismatch": ("Sampler and trainer apart", "nats per token"),
}
"""What is drawn of a run's curves: caption and unit. Which of them are there depends on the recipe."""

_CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --paper: #fff; --ground: #f5f7f6;
  --pass: #2f6f4f; --fail: #b4483a; --inconclusive: #a56a00; --unmeasurable: #52606d; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.55 Inter, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p.when { color: var(--muted); margin: 0 0 20px; }
section.verdict { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid var(--tone);
  border-radius: 8px; padding: 16px 20px; }
section.verdict strong { color: var(--tone); font-size: 20px; }
section.verdict p { margin: 4px 0 0; overflow-wrap: anywhere; }
.pass { --tone: var(--pass); } .fail { --tone: var(--fail); }
.inconclusive { --tone: var(--inconclusive); } .unmeasurable { --tone: var(--unmeasurable); }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 14px; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-size: 12px; font-weight: 600; text-transform: uppercase;
  letter-spacing: .04em; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.broken { color: var(--fail); font-weight: 600; }
tr.gate td { background: #fafbfb; }
tr.gate strong { font-size: 15px; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; color: #fff; background: var(--tone);
  font-size: 12px; font-weight: 600; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { width: 100%; height: auto; display: block; }
td.said { width: 26%; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 24px; margin: 0; padding: 16px 20px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.muted { color: var(--muted); }
"""


def render_html(report: Report) -> str:
    """The whole page."""
    when = datetime.fromtimestamp(report.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{report.ref}: {_VERDICTS[report.verdict]}"
    body = [
        f"<h1>{escape(str(report.ref))}</h1>",
        f'<p class="when">Evaluated {when}, in {report.seconds:.1f} s</p>',
        f'<section class="verdict {report.verdict.value}"><strong>{escape(_VERDICTS[report.verdict])}</strong>'
        f"<p>{escape(report.reason)}</p></section>",
        "<h2>Gates</h2>",
        _gate_table(report.gates),
        _plots(report),
        _training(report.lineage),
        _samples(report.gate("behaviour")),
        _worst(report.gate("retention")),
        _unsaid(report.gate("retention")),
        _findings(report.gates),
        "<h2>Where it comes from</h2>",
        _lineage(report.lineage),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _gate_table(gates: Sequence[GateResult]) -> str:
    rows = []
    for gate in gates:
        badge = f'<span class="badge {gate.verdict.value}">{escape(gate.verdict.value)}</span>'
        rows.append(
            f'<tr class="gate"><td><strong>{escape(gate.name)}</strong></td><td colspan="2">{escape(gate.reason)}</td>'
            f"<td>{badge}</td></tr>"
        )
        rows += [
            _figure_row(bound, gate.figures[bound.figure]) for bound in gate.bounds if bound.figure in gate.figures
        ]
        judged = {bound.figure for bound in gate.bounds}
        others = [f"{_label(name)} {_number(value)}" for name, value in gate.figures.items() if name not in judged]
        if others:
            rows.append(f'<tr><td></td><td colspan="3" class="muted">{escape(" · ".join(others))}</td></tr>')
    head = "<thead><tr><th>Gate</th><th>Figure</th><th>Bound</th><th>Verdict</th></tr></thead>"
    return f'<div class="card"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _figure_row(bound: Bound, value: float) -> str:
    holds = bound.holds(value)
    return (
        f'<tr><td class="muted">{escape(_label(bound.figure))}</td>'
        f'<td class="number{"" if holds else " broken"}">{_number(value)}</td>'
        f'<td class="muted">{escape(bound.describe())}</td>'
        f'<td class="{"muted" if holds else "broken"}">{"within" if holds else "outside"}</td></tr>'
    )


def _plots(report: Report) -> str:
    cards = []
    for name, caption, draw in _PLOTS:
        gate = report.gate(name)
        svg = draw(drawable(gate)) if gate else None
        if svg:
            cards.append(f'<figure class="card"><figcaption>{escape(caption)}</figcaption>{svg}</figure>')
    return f'<h2>Plots</h2><div class="plots">{"".join(cards)}</div>' if cards else ""


def _training(lineage: Mapping[str, Any]) -> str:
    """The curves of the run, in the order of _CURVES; none for a version that no run made."""
    curves = _curves(lineage)
    cards = []
    for name, (caption, unit) in _CURVES.items():
        if curves.get(name):
            svg = plot_curve(curves["step"], curves[name], unit)
            cards.append(f'<figure class="card"><figcaption>{escape(caption)}</figcaption>{svg}</figure>')
    return f'<h2>Training</h2><div class="plots">{"".join(cards)}</div>' if cards else ""


def _curves(lineage: Mapping[str, Any]) -> Mapping[str, Any]:
    return (lineage.get("metrics") or {}).get("curves") or {}


def _samples(gate: GateResult | None) -> str:
    samples = gate.details.get("samples") if gate else None
    if not samples:
        return ""
    rows = "".join(
        f"<tr><td>{escape(sample['prompt'])}</td>"
        + "".join(f'<td class="said">{escape(sample[model]) or "<em>(empty)</em>"}</td>' for model in _MODELS)
        + "</tr>"
        for sample in samples
    )
    head = "<thead><tr><th>Prompt</th>" + "".join(f"<th>{model}</th>" for model in _MODELS) + "</tr></thead>"
    return f'<h2>Answers, greedy</h2><div class="card"><table>{head}<tbody>{rows}</tbody></table></div>'


def _worst(gate: GateResult | None) -> str:
    worst = gate.details.get("worst") if gate else None
    if not worst:
        return ""
    rows = "".join(
        f"<tr><td>{escape(item['question'])}</td>"
        f'<td><span class="muted">{escape(item["prefix"])}</span>{escape(item["answer"])}</td>'
        f'<td class="number">{item["base"]:.3f}</td><td class="number">{item["candidate"]:.3f}</td>'
        f'<td class="number">{item["drop"]:+.3f}</td></tr>'
        for item in worst
    )
    head = "<thead><tr><th>Question</th><th>Answer</th><th>Base</th><th>Candidate</th><th>Drop</th></tr></thead>"
    return (
        "<h2>Most forgotten items</h2><p class='muted'>Mean log-prob per token of the answer, once the assistant has "
        f'begun with the grey part.</p><div class="card"><table>{head}<tbody>{rows}</tbody></table></div>'
    )


def _unsaid(gate: GateResult | None) -> str:
    worst = gate.details.get("free_worst") if gate else None
    if gate is None or not worst:
        return ""
    rows = "".join(
        f"<tr><td>{escape(item['question'])}</td><td>{escape(item['answer'])}</td>"
        f'<td class="number">{item["base"]}</td><td class="number">{item["candidate"]}</td>'
        f'<td class="said">{escape(item["said"]) or "<em>(empty)</em>"}</td></tr>'
        for item in worst
    )
    head = "<thead><tr><th>Question</th><th>Expected</th><th>Base</th><th>Candidate</th><th>It says</th></tr></thead>"
    return (
        "<h2>No longer said</h2><p class='muted'>Asked freely: in how many of "
        f"{gate.details['free_samples']} answers each model left the expected words out.</p>"
        f'<div class="card"><table>{head}<tbody>{rows}</tbody></table></div>'
    )


def _findings(gates: Sequence[GateResult]) -> str:
    rows = "".join(
        f"<tr><td>{escape(finding.category)}</td><td>{escape(str(finding.messages[-1].get('content', '')))}</td>"
        f'<td class="said">{escape(finding.answer) or "<em>(empty)</em>"}</td><td>{escape(finding.fault)}</td></tr>'
        for gate in gates
        for finding in gate.findings
    )
    if not rows:
        return ""
    head = "<thead><tr><th>Category</th><th>Prompt</th><th>Answer</th><th>What is wrong</th></tr></thead>"
    return (
        "<h2>Findings of the red team</h2><p class='muted'>Kept as feedback for the next run.</p>"
        f'<div class="card"><table>{head}<tbody>{rows}</tbody></table></div>'
    )


def _lineage(lineage: Mapping[str, Any]) -> str:
    if _curves(lineage):  # they are drawn above
        others = {name: value for name, value in lineage["metrics"].items() if name != "curves"}
        lineage = {**lineage, "metrics": others}
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_shown(value))}</dd>"
        for name, value in lineage.items()
        if value is not None
    )
    return f'<div class="card"><dl>{items}</dl></div>'


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return " · ".join(f"{key} {_shown(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return _number(value) if isinstance(value, float) else str(value)


def _label(figure: str) -> str:
    return figure.replace("_", " ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"


_MODELS = ("base", "parent", "candidate")
