"""What every gate is: a measurement through the serving engine and a pure decision about it.

Owns the records that gates take and give. It knows no single gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from scion_adapters.fingerprint import BaseInfo
from scion_adapters.records import Version
from scion_adapters.sections.gates import GatesSection
from scion_adapters.settings import Settings
from scion_feedback.findings import Finding
from scion_feedback.selection import SnapshotRow
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.judges import Judge
from scion_trainer.server_client import Message, ModelServer

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, steps done, steps in all)."""


class Verdict(StrEnum):
    """`fail` rejects a candidate; `inconclusive` (too little evidence) and `unmeasurable` (none) are only told."""

    PASS = "pass"  # noqa: S105  # a verdict, not a password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    UNMEASURABLE = "unmeasurable"


@dataclass(frozen=True, slots=True)
class Bound:
    """A figure and the range in which it is allowed; None = open on that side."""

    figure: str
    low: float | None = None
    high: float | None = None

    def holds(self, value: float) -> bool:
        """NaN holds nowhere."""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high) and value == value

    def describe(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:.3g}" if self.low is not None else f"at most {self.high:.3g}"


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate's outcome. `details` holds JSON-able data for the report: distributions, samples, worst rows.

    `findings` are answers of the candidate that are at fault: an evaluation records them as feedback.
    """

    name: str
    verdict: Verdict
    reason: str
    figures: Mapping[str, float] = field(default_factory=dict)
    bounds: tuple[Bound, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict.value,
            "reason": self.reason,
            "figures": dict(self.figures),
            "bounds": [{"figure": b.figure, "low": b.low, "high": b.high} for b in self.bounds],
            "details": dict(self.details),
            "findings": [finding.to_json() for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class RetentionItem:
    """Something that must not be forgotten: `answer` should stay likely once the assistant has begun with `prefix`.

    Asked freely, the assistant should say any one of `said`; empty: the answer.
    """

    messages: tuple[Message, ...]
    prefix: str
    answer: str
    said: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Models:
    """The names under which the server knows the three models that are compared."""

    candidate: str
    parent: str
    base: str


@dataclass(frozen=True, slots=True)
class EarlierHoldout:
    """The held-out rows that an earlier version's snapshot brought in: no row is in two of them."""

    number: int
    rows: tuple[SnapshotRow, ...]


@dataclass(frozen=True, slots=True)
class GateContext:
    """All that a gate may look at. `rows` is the whole snapshot, empty when the version has none.

    `earlier` are the holdouts of earlier versions, oldest first; `run_directory` is that of the run that made the
    version, None when there is none here; `judge` opens who compares answers, None when there is nobody;
    `evaluation_keys` let programs other than `server` ask a model, by its name, without being recorded. `artifact`
    gives the stored directory (a remote store fetches it first), `verify_artifact` hashes it again.
    """

    settings: Settings
    version: Version
    artifact: Callable[[], Path]
    verify_artifact: Callable[[], None]
    base_info: BaseInfo
    models: Models
    server: ModelServer
    tokens: ChatTokens
    rows: Sequence[SnapshotRow] = ()
    retention: Sequence[RetentionItem] = ()
    max_length: int = 1024
    seed: int = 0
    progress: Progress = lambda what, done, total: None
    earlier: Sequence[EarlierHoldout] = ()
    run_directory: Path | None = None
    judge: Callable[[], Judge | None] = lambda: None
    evaluation_keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def bounds(self) -> GatesSection:
        return self.settings.gates

    @property
    def heldout(self) -> list[SnapshotRow]:
        """Ratings of users that no run learns from."""
        return [row for row in self.rows if row.split == "heldout"]

    @property
    def newest(self) -> list[SnapshotRow]:
        """The newest ratings of users that the run did learn from."""
        return [row for row in self.rows if row.split == "newest"]


class Gate(Protocol):
    """One file in this folder, one entry in GATES."""

    @property
    def name(self) -> str: ...

    @property
    def needs_server(self) -> bool:
        """Gates that do not are run first, and when one of them fails the version is never loaded."""
        ...

    def run(self, context: GateContext) -> GateResult:
        """Measure, then decide. Raises UnavailableError when the server is away."""
        ...


def judge_bounds(name: str, figures: Mapping[str, float], bounds: Sequence[Bound], **details: Any) -> GateResult:
    """Fail when any bound is broken; the reason names every broken one with its figure."""
    broken = [
        f"{bound.figure} {figures[bound.figure]:.3g} (allowed: {bound.describe()})"
        for bound in bounds
        if not bound.holds(figures[bound.figure])
    ]
    verdict = Verdict.FAIL if broken else Verdict.PASS
    return GateResult(name, verdict, "; ".join(broken) or "all figures within bounds", figures, tuple(bounds), details)
