"""Makes completion records and votes for tests, with everything that does not matter filled in."""

from __future__ import annotations

from typing import Any

from scion_adapters.database import Database
from scion_feedback.captures import CompletionRecord, CompletionStore
from scion_feedback.feedback import FeedbackRow, FeedbackStore, parse_feedback
from scion_feedback.privacy import UserHasher

KEY = b"a key of at least sixteen bytes"
HASHER = UserHasher(KEY)


def record(completion_id: str, **fields: Any) -> CompletionRecord:
    """A completion of `chat:1` to a one-message conversation."""
    defaults: dict[str, Any] = {
        "adapter": "chat",
        "number": 1,
        "probability": 1.0,
        "requested_model": "chat",
        "route": "chat",
        "request": {"messages": [{"role": "user", "content": f"question of {completion_id}"}]},
        "choices": [choice(f"answer of {completion_id}")],
        "latency_ms": 12.5,
        "created_at": 1000.0,
        "record_id": f"record-{completion_id}",
    }
    return CompletionRecord(id=completion_id, **{**defaults, **fields})


def choice(text: str | None, *, index: int = 0, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    content = {"role": "assistant", "content": text, **message}
    return {"index": index, "message": content, "finish_reason": finish_reason}


class Votes:
    """Votes in a database, with a clock that moves one second per vote, from 2000."""

    def __init__(self, database: Database) -> None:
        self.now = 2000.0
        self.store = FeedbackStore(database, HASHER, self._tick)
        self.completions = CompletionStore(database)

    def _tick(self) -> float:
        self.now += 1.0
        return self.now

    def vote(self, completion_id: str, **body: Any) -> FeedbackRow:
        return self.store.add(parse_feedback({"completion_id": completion_id, **body})).row
