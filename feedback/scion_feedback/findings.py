"""What a red team found about a version, kept as feedback: the answer as a completion, its fault as a thumb down.

Both carry the source `red_team`, so that no statistic takes them for users' votes; snapshots take a bounded share of
them (snapshots.py). Recording the same finding again changes nothing. Knows nothing of how probes are asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scion_adapters import clock as clocks
from scion_adapters.clock import Clock
from scion_adapters.database import Database
from scion_adapters.records import RED_TEAM, VersionRef
from scion_feedback.captures import CompletionRecord, CompletionStore
from scion_feedback.feedback import FeedbackStore
from scion_feedback.parsing import parse_feedback


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer that failed a check. `suite` is the digest of the suite that holds `probe`."""

    suite: str
    probe: str
    category: str
    check: str
    fault: str
    messages: tuple[Mapping[str, Any], ...]
    answer: str
    finish_reason: str
    num_tokens: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "messages": [dict(message) for message in self.messages]}


def record_findings(
    database: Database, ref: VersionRef, findings: Sequence[Finding], clock: Clock = clocks.now
) -> list[str]:
    """Store `findings` about `ref` durably; the ids of their votes, in order. Raises UnavailableError."""
    at = clock()
    records = [_completion(ref, finding, at) for finding in findings]
    CompletionStore(database).insert(records)
    votes = FeedbackStore(database, None, clock)
    ids = []
    for record, finding in zip(records, findings, strict=True):
        vote = parse_feedback(
            {
                "id": f"fb-{record.id}",
                "completion_id": record.id,
                "name": RED_TEAM,
                "value": 0,
                "metadata": {
                    "suite": finding.suite,
                    "probe": finding.probe,
                    "category": finding.category,
                    "check": finding.check,
                    "fault": finding.fault,
                },
            }
        )
        ids.append(votes.add(vote, source=RED_TEAM).row.id)
    return ids


def _completion(ref: VersionRef, finding: Finding, at: float) -> CompletionRecord:
    """Its ids follow from version, suite, probe and answer, and so does its `record_id`: a repetition is a delivery."""
    told = json.dumps([str(ref), finding.suite, finding.probe, finding.check, finding.answer])
    digest = hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    message = {"role": "assistant", "content": finding.answer}
    return CompletionRecord(
        id=f"redteam-{digest}",
        record_id=f"rec-redteam-{digest}",
        adapter=ref.adapter,
        number=ref.number,
        probability=1.0,
        requested_model=str(ref),
        route=RED_TEAM,
        request={"messages": [dict(message) for message in finding.messages]},
        choices=[{"index": 0, "message": message, "finish_reason": finding.finish_reason}],
        completion_tokens=finding.num_tokens,
        finish_reason=finding.finish_reason or None,
        latency_ms=0.0,
        created_at=at,
    )
