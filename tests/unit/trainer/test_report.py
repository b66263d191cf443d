"""The report: its verdict, its strict JSON, and a page that shows what was found and trusts nobody's text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scion_adapters.records import VersionRef
from scion_adapters.settings import Settings
from scion_feedback.findings import Finding
from scion_trainer.gates import baseline, drift, forgetting, parity, winrate
from scion_trainer.gates.baseline import Compared
from scion_trainer.gates.drift import Manner
from scion_trainer.gates.forgetting import Likelihood
from scion_trainer.gates.types import Bound, GateResult, Verdict
from scion_trainer.gates.winrate import Comparison
from scion_trainer.report import HTML_FILE, JSON_FILE, Report, overall, write_report
from scion_trainer.report_html import render_html

PASSED = GateResult("retention", Verdict.PASS, "all figures within bounds")
ARTIFACT = GateResult("artifact", Verdict.PASS, "fits")


def result(name: str, verdict: Verdict) -> GateResult:
    return GateResult(name, verdict, f"{name} figure 0.5 (allowed: at most 0.1)")


@pytest.mark.parametrize(
    ("results", "away", "verdict", "says"),
    [
        ([ARTIFACT, PASSED], None, Verdict.PASS, ["passed artifact, retention"]),
        ([ARTIFACT, PASSED, result("heldout", Verdict.FAIL)], None, Verdict.FAIL, ["heldout figure 0.5"]),
        (
            [result("retention", Verdict.FAIL), result("behaviour", Verdict.FAIL)],
            None,
            Verdict.FAIL,
            ["retention figure", "behaviour figure"],  # every reason, not the first
        ),
        # No snapshot, as after an import: told, and no reason to reject.
        ([PASSED, result("heldout", Verdict.UNMEASURABLE)], None, Verdict.PASS, ["heldout unmeasurable"]),
        ([PASSED, result("heldout", Verdict.INCONCLUSIVE)], None, Verdict.PASS, ["heldout inconclusive"]),
        # The server is away: nothing is accepted, whatever was measured before.
        ([ARTIFACT, PASSED], "start `scion serve`", Verdict.UNMEASURABLE, ["start `scion serve`"]),
        # It failed before the server went away: that stands.
        ([ARTIFACT, result("retention", Verdict.FAIL)], "away", Verdict.FAIL, ["retention figure"]),
        # Only the files could be checked: that is not enough to meet users.
        ([ARTIFACT, result("behaviour", Verdict.UNMEASURABLE)], None, Verdict.UNMEASURABLE, ["no gate could measure"]),
    ],
)
def test_the_overall_verdict(results: list[GateResult], away: str | None, verdict: Verdict, says: list[str]) -> None:
    found, reason = overall(results, away=away)
    assert found is verdict
    assert all(text in reason for text in says), reason


def full_report() -> Report:
    heldout = GateResult(
        "heldout",
        Verdict.INCONCLUSIVE,
        "separates <a little>",
        {"separation": 0.1, "separation_low": -math.inf, "users": 3.0},
        (Bound("separation", low=0.0),),
        {"liked_shifts": [0.3, -0.1], "disliked_shifts": [-0.2, 0.1]},
    )
    worst = {"question": "q & a?", "prefix": "It is", "answer": " <b>", "base": -0.1, "candidate": -2.0, "drop": 1.9}
    unsaid = {"question": "why?", "answer": " so", "base": 0, "candidate": 2, "said": "<i>who knows</i>"}
    retention = GateResult(
        "retention",
        Verdict.FAIL,
        "drop_from_base 0.5 (allowed: at most 0.12)",
        {"drop_from_base": 0.5},
        (Bound("drop_from_base", high=0.12),),
        {"drops_from_base": [0.1, 0.9], "worst": [worst], "free_samples": 2, "free_worst": [unsaid]},
    )
    sample = {"prompt": "<script>alert(1)</script>", "base": "x", "parent": "", "candidate": "a & b"}
    lengths = {"parent": [3, 4, 40], "candidate": [5, 6, 7]}
    behaviour = GateResult("behaviour", Verdict.PASS, "fine", {}, (), {"samples": [sample], "lengths": lengths})
    lineage = {"parent": "chat:7", "recipe": None, "config": {"learning_rate": 5e-4, "target_modules": ["q_proj"]}}
    gates = (ARTIFACT, retention, heldout, behaviour)
    return Report(VersionRef("chat", 8), Verdict.FAIL, "retention: <drop>", gates, 1_700_000_000.0, 12.3, lineage)


def test_the_json_is_strict_and_complete(tmp_path: Path) -> None:
    path = write_report(full_report(), tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    document = json.loads(path.read_text(), parse_constant=refuse)
    assert (document["version"], document["verdict"]) == ("chat:8", "fail")
    assert document["figures"]["retention.drop_from_base"] == 0.5
    assert "heldout.separation_low" not in document["figures"]
    assert document["gates"][2]["figures"]["separation_low"] is None
    assert document["gates"][1]["bounds"] == [{"figure": "drop_from_base", "low": None, "high": 0.12}]
    assert {file.name for file in tmp_path.iterdir()} == {JSON_FILE, HTML_FILE}  # no temporary file is left


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and whether every element is closed."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "line", "circle", "stop"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.active: list[str] = []
        self.num_svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.num_svgs += tag == "svg"
        if tag in ("script", "link", "iframe", "object", "img"):
            self.active.append(tag)
        self.active += [f"{name}={value}" for name, value in attrs if name in ("src", "onload", "onclick")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_what_the_red_team_found_is_shown_as_text() -> None:
    said = "<script>alert(1)</script>"
    finding = Finding("sha256:s", "p1", "leak", "must_not_contain", "says 'x'", ({"content": said},), said, "stop", 3)
    gate = GateResult("red_team", Verdict.PASS, "no worse", findings=(finding,))
    report = replace(full_report(), gates=(gate,))
    page = Page()
    page.feed(render_html(report))
    assert (page.open, page.active) == ([], [])
    assert "Findings of the red team" in render_html(report)
    assert "Findings of the red team" not in render_html(full_report())
    assert report.to_json()["gates"][0]["findings"][0]["answer"] == said


def test_the_page_is_whole_self_contained_and_trusts_no_text() -> None:
    text = render_html(full_report())
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.active == []
    assert page.num_svgs == 3
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for shown in ("chat:8", "rejected", "drop from base", "at most 0.12", "outside", "q &amp; a?", "chat:7", "(empty)"):
        assert shown in text
    assert "No longer said" in text
    assert "&lt;i&gt;who knows&lt;/i&gt;" in text


def test_what_is_no_number_is_not_drawn_and_stops_nothing(tmp_path: Path) -> None:
    nan = math.nan
    details = {"drops_from_base": [0.1, nan, 0.9]}
    retention = GateResult("retention", Verdict.FAIL, "nan", {}, (Bound("drop_from_base", high=0.12),), details)
    parity = GateResult("parity", Verdict.FAIL, "nan", {"mean_delta": nan}, (), {"deltas": [nan, nan]})
    report = replace(full_report(), gates=(retention, parity))
    write_report(report, tmp_path)
    assert render_html(report).count("<svg") == 1  # of parity nothing is left


def test_the_same_report_gives_the_same_page() -> None:
    assert render_html(full_report()) == render_html(full_report())


def test_a_report_without_measurements_has_no_plots() -> None:
    away = GateResult("behaviour", Verdict.UNMEASURABLE, "the serving engine could not be asked")
    report = Report(VersionRef("chat", 8), Verdict.UNMEASURABLE, "away", (ARTIFACT, away), 0.0, 0.1)
    assert "<svg" not in render_html(report)


@pytest.mark.parametrize(("verdict", "exit_code"), [(Verdict.PASS, 0), (Verdict.FAIL, 5), (Verdict.UNMEASURABLE, 6)])
def test_scripts_can_use_the_exit_code(verdict: Verdict, exit_code: int) -> None:
    assert Report(VersionRef("chat", 8), verdict, "", (), 0.0, 0.0).exit_code == exit_code


SERVED = [-1.0, -2.004] * 20
MANNER = Manner(refusals=0.1, questions=0.4, agreement=0.2, repeated=0.0)
DRAWN = [
    (parity.decide([(SERVED, [value + 0.003 for value in SERVED])], max_delta=0.01), "by the server"),
    (forgetting.decide([Likelihood(-1.0, -1.5)] * 8, {2: [Likelihood(-1, -1)] * 30}, num_general=8, max_drop=0.2), "2"),
    (baseline.decide([Compared(-2, -1.9, -1.5, n % 2 == 0, str(n)) for n in range(12)], margin=None), "examples"),
    (drift.decide(MANNER, MANNER, MANNER, 80, Settings().gates), "refusals"),
    (winrate.decide([Comparison(1.0, 0.0)] * 20, wanted=0.6), "wanted: more than 60%"),
]


@pytest.mark.parametrize(("gate", "says"), DRAWN, ids=lambda value: getattr(value, "name", ""))
def test_what_a_gate_measured_is_drawn(gate: GateResult, says: str) -> None:
    text = render_html(Report(VersionRef("chat", 8), Verdict.PASS, "", (gate,), 0.0, 0.0))
    drawing = text[text.index("<svg") : text.index("</svg>")]
    assert says in drawing
    nothing = GateResult(gate.name, Verdict.UNMEASURABLE, "not measured")
    assert "<svg" not in render_html(Report(VersionRef("chat", 8), Verdict.PASS, "", (nothing,), 0.0, 0.0))


def test_a_runs_curves_are_drawn_and_not_listed() -> None:
    curves = {
        "step": [1, 2, 3],
        "reward": [0.1, 0.5, 1.25],
        "kl_to_base": [0.0, 0.02, 0.0471],
        "learning_rate": [1, 1, 1],
    }
    lineage = {"recipe": "ppo", "metrics": {"seconds": 12.5, "curves": curves}}
    text = render_html(Report(VersionRef("chat", 8), Verdict.PASS, "", (), 0.0, 0.0, lineage))
    assert text.count("<svg") == 2
    assert "score of the reward model" in text
    assert "nats per token" in text
    assert "0.0471" not in text
    assert "seconds 12.5" in text
    without = render_html(Report(VersionRef("chat", 8), Verdict.PASS, "", (), 0.0, 0.0, {"metrics": {"curves": {}}}))
    assert "Training" not in without
