"""One answer to be recorded: references to what the request left behind, turned into a record by the recorder.

On the event loop a `Capture` costs an object; parsing, hashing and normalising happen when it is called, off the
request path. It can be pickled, and calling it needs nothing of vLLM or FastAPI: the recorder may live in a process of
its own. Recorded requests have one form for all routes: `messages` in the chat form or a `prompt`, and the other
parameters as sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from scion_adapters.records import VersionRef
from scion_adapters.routing import Assignment
from scion_feedback.captures import CompletionRecord
from scion_feedback.privacy import UserHasher
from vllm_scion.answers import CANCELLED, read_answer
from vllm_scion.subject import CONVERSATION_HEADER, conversation_of, user_of

_NOT_RECORDED = frozenset(
    {
        "model",
        "user",
        "safety_identifier",
        "stream",
        "stream_options",
        "store",
        "messages",
        "system",
        "input",
        "instructions",
    }
)
_LONG_DATA_URL = 256


@dataclass(slots=True)
class Capture:
    """What is kept of an answer until it is recorded.

    `body`: the request's, as it was sent; `parts`: the answer's, or the list of chunks that were sent. `token_counts`:
    (prompt, completion) as vLLM counted, for streams that do not carry them. `conversation`: what the header says.
    `hash_key`: of the keyed hash that stands for a user. `record_id` is kept when an answer is handed over again.
    """

    route: str
    assignment: Assignment
    requested_model: str
    body: bytes
    conversation: str | None
    token_counts: tuple[int | None, int | None]
    parts: bytes | Sequence[str | bytes]
    stream: bool
    created_at: float
    latency_ms: float
    first_token_ms: float | None
    hash_key: bytes = field(repr=False)
    record_id: str

    def __reduce__(self) -> tuple[Any, ...]:
        """A flat tuple of plain values: pickled on the event loop, where each object costs as much as all of these."""
        ref, assignment = self.assignment.ref, self.assignment
        return _unpickled, (
            (ref.adapter, ref.number, assignment.lora_id, assignment.probability, assignment.rollout_id),
            (
                self.requested_model,
                self.body,
                self.conversation,
                self.token_counts,
                self.parts,
                self.stream,
                self.created_at,
                self.latency_ms,
                self.first_token_ms,
                self.hash_key,
                self.record_id,
            ),
            self.route,
        )

    def __call__(self) -> CompletionRecord | None:
        """The record, or None when the client left before the answer had an id: then there is nothing to rate."""
        answer = read_answer(self.route, self.parts, stream=self.stream)
        if answer is None:
            return None
        prompt_tokens, completion_tokens = self.token_counts
        body: dict[str, Any] = json.loads(self.body)
        user = user_of(body)
        conversation = conversation_of(body, {CONVERSATION_HEADER: self.conversation or ""})
        return CompletionRecord(
            id=answer.id[:255],
            record_id=self.record_id,
            adapter=self.assignment.ref.adapter,
            number=self.assignment.ref.number,
            probability=self.assignment.probability,
            rollout_id=self.assignment.rollout_id,
            requested_model=self.requested_model[:255],
            route=self.route,
            user_hash=UserHasher(self.hash_key).hash(user) if user else None,
            conversation=conversation[:255] if conversation else None,
            request=normal_request(self.route, body),
            choices=answer.choices,
            prompt_tokens=_first(answer.prompt_tokens, prompt_tokens),
            completion_tokens=_first(answer.completion_tokens, completion_tokens),
            finish_reason=(answer.finish_reason or CANCELLED)[:32],
            latency_ms=self.latency_ms,
            first_token_ms=self.first_token_ms,
            stream=self.stream,
            created_at=self.created_at,
        )


def _unpickled(assignment: tuple[Any, ...], rest: tuple[Any, ...], route: str) -> Capture:
    adapter, number, *others = assignment
    return Capture(route, Assignment(VersionRef(adapter, number), *others), *rest)


def normal_request(route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The request as it is recorded. Names of users are left out; long data URLs are replaced by their digest."""
    rest = {key: value for key, value in body.items() if key not in _NOT_RECORDED and value is not None}
    metadata = rest.get("metadata")
    if isinstance(metadata, Mapping):
        rest["metadata"] = {key: value for key, value in metadata.items() if key != "user_id"}
    match route:
        case "chat":
            messages = list(body.get("messages") or ())
        case "messages":
            messages = _leading(body.get("system")) + [_flat(m) for m in body.get("messages") or ()]
        case "responses":
            asked = body.get("input")
            turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked or ())
            messages = _leading(body.get("instructions")) + [_flat(m) for m in turns]
        case _:
            return rest
    return {"messages": _without_data_urls(messages), **rest}


def _leading(text: Any) -> list[dict[str, Any]]:
    return [_flat({"role": "system", "content": text})] if text else []


def _flat(message: Any) -> Any:
    """A message whose content is a list of text parts, as one string; anything else stays as it is."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    texts = [part.get("text") for part in message["content"] if isinstance(part, Mapping)]
    if len(texts) != len(message["content"]) or not all(isinstance(text, str) for text in texts):
        return message
    kept = {key: value for key, value in message.items() if key in ("role", "name")}
    return {**kept, "content": "".join(t for t in texts if isinstance(t, str))}


def _without_data_urls(value: Any) -> Any:
    if isinstance(value, str):
        if len(value) > _LONG_DATA_URL and value.startswith("data:"):
            return f"{value.partition(',')[0]},sha256={sha256(value.encode()).hexdigest()}"
        return value
    if isinstance(value, Mapping):
        return {key: _without_data_urls(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_data_urls(item) for item in value]
    return value


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
