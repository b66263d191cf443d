"""The report of an evaluation: what was found about a version, kept beside it as JSON and as a page for people.

Owns the record, the overall verdict and the files. It knows nothing of how anything was measured.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scion_adapters.errors import RejectedError, UnavailableError
from scion_adapters.records import VersionRef
from scion_trainer.gates.types import GateResult, Verdict

JSON_FILE = "report.json"
HTML_FILE = "report.html"
SAY_NOTHING_OF_ANSWERS = frozenset({"artifact", "kl", "parity"})
"""Gates that look at a version from outside: passing these alone, it has not answered anything yet."""
_EXIT_CODES = {Verdict.FAIL: RejectedError.exit_code, Verdict.UNMEASURABLE: UnavailableError.exit_code}


@dataclass(frozen=True, slots=True)
class Report:
    """`verdict` is pass, fail or unmeasurable. `lineage` is what is told about the version's origin."""

    ref: VersionRef
    verdict: Verdict
    reason: str
    gates: tuple[GateResult, ...]
    created_at: float
    seconds: float
    lineage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """Every finite figure as `<gate>.<figure>`."""
        return {
            f"{gate.name}.{name}": value
            for gate in self.gates
            for name, value in gate.figures.items()
            if math.isfinite(value)
        }

    @property
    def exit_code(self) -> int:
        """What a command that evaluated should exit with: 0, or that of a refusal or of an absent server."""
        return _EXIT_CODES.get(self.verdict, 0)

    def gate(self, name: str) -> GateResult | None:
        return next((gate for gate in self.gates if gate.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: a figure that is not finite becomes null."""
        document = {
            "version": str(self.ref),
            "verdict": self.verdict.value,
            "reason": self.reason,
            "created_at": self.created_at,
            "seconds": self.seconds,
            "lineage": dict(self.lineage),
            "gates": [gate.to_json() for gate in self.gates],
            "figures": self.figures,
        }
        return {key: _finite(value) for key, value in document.items()}


def overall(results: Sequence[GateResult], *, away: str | None = None) -> tuple[Verdict, str]:
    """Pure. One failed gate fails the version, with every failed gate's figures in the reason.

    `away` says why the serving engine could not be asked; without it nothing can be accepted. A gate that is
    inconclusive or unmeasurable by itself does not reject: users decide then, in a rollout's first step.
    """
    failed = [result for result in results if result.verdict is Verdict.FAIL]
    if failed:
        return Verdict.FAIL, "; ".join(f"{result.name}: {result.reason}" for result in failed)
    if away is not None:
        return Verdict.UNMEASURABLE, away
    passed = [result.name for result in results if result.verdict is Verdict.PASS]
    if not set(passed) - SAY_NOTHING_OF_ANSWERS:
        return Verdict.UNMEASURABLE, "no gate could measure anything: " + "; ".join(
            f"{r.name}: {r.reason}" for r in results
        )
    open_ones = [f"{r.name} {r.verdict.value}: {r.reason}" for r in results if r.verdict is not Verdict.PASS]
    return Verdict.PASS, "; ".join([f"passed {', '.join(passed)}", *open_ones])


def write_report(report: Report, directory: Path) -> Path:
    """Both files, each replaced at once; the JSON last, so that it stands for a complete report. Returns its path."""
    from scion_trainer.report_html import render_html  # matplotlib takes a second to import

    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / HTML_FILE, render_html(report))
    path = directory / JSON_FILE
    _replace(path, json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
