"""What was answered, out of the bytes that left: the four routes' bodies and event streams, read into one form.

Runs in the recorder, never on the event loop. An answer is a list of choices in the chat form,
`{"index", "message" | "text", "finish_reason"}`, whatever the route. Knows nothing of vLLM's classes: it reads the
wire.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CANCELLED = "cancelled"
ERROR = "error"
_STOP_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete or broken-off answer. Token counts are None where the wire did not carry them."""

    id: str
    choices: list[dict[str, Any]]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0]["finish_reason"] if self.choices else None


def read_answer(route: str, parts: bytes | Sequence[str | bytes], *, stream: bool) -> Answer | None:
    """The answer of `route`: its body, or the chunks of its event stream. None when it broke off before it had an id.

    A choice that was broken off has the finish reason "cancelled"; one that failed in mid-stream, "error".
    """
    if not stream:
        body = json.loads(parts if isinstance(parts, bytes) else b"".join(_bytes(parts)))
        return _BODIES[route](body)
    return _STREAMS[route](list(_events(parts if not isinstance(parts, bytes) else [parts])))


def _events(chunks: Sequence[str | bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of every `data:` line. Lines may be split over chunks and hold U+2028: only \\n ends one."""
    for line in b"".join(_bytes(chunks)).split(b"\n"):
        if line.startswith(b"data:") and (data := line[5:].strip()) and data != b"[DONE]":
            event = json.loads(data)
            if isinstance(event, dict):
                yield event


def _bytes(chunks: Iterable[str | bytes]) -> Iterator[bytes]:
    return (chunk.encode() if isinstance(chunk, str) else bytes(chunk) for chunk in chunks)


# --- chat completions -------------------------------------------------------------------------------------------------


def _chat_body(body: Mapping[str, Any]) -> Answer:
    choices = [
        {"index": c["index"], "message": _present(c["message"]), "finish_reason": c.get("finish_reason")}
        for c in body["choices"]
    ]
    return Answer(body["id"], choices, *_usage(body.get("usage"), "prompt_tokens", "completion_tokens"))


def _chat_stream(events: Sequence[Mapping[str, Any]]) -> Answer | None:
    id_, usage, failed = _common(events)
    choices: dict[int, dict[str, Any]] = {}
    texts: dict[int, dict[str, list[str]]] = {}
    calls: dict[int, dict[int, dict[str, Any]]] = {}
    for event in events:
        for part in event.get("choices") or ():
            index = part["index"]
            choice = choices.setdefault(
                index, {"index": index, "message": {"role": "assistant"}, "finish_reason": None}
            )
            delta = part.get("delta") or {}
            for key in ("content", "reasoning", "refusal"):
                if delta.get(key):
                    texts.setdefault(index, {}).setdefault(key, []).append(delta[key])
            for call in delta.get("tool_calls") or ():
                _merge_call(calls.setdefault(index, {}), call)
            if part.get("finish_reason"):
                choice["finish_reason"] = part["finish_reason"]
    for index, choice in choices.items():
        choice["message"]["content"] = None if index in calls else ""
        choice["message"].update({key: "".join(parts) for key, parts in texts.get(index, {}).items()})
        if index in calls:
            choice["message"]["tool_calls"] = [call for _, call in sorted(calls[index].items())]
    return _finish(id_, choices, usage, failed)


def _merge_call(calls: dict[int, dict[str, Any]], delta: Mapping[str, Any]) -> None:
    new = {"id": None, "type": "function", "function": {"name": "", "arguments": ""}}
    call = calls.setdefault(delta.get("index", len(calls)), new)
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


# --- completions ------------------------------------------------------------------------------------------------------


def _text_body(body: Mapping[str, Any]) -> Answer:
    choices = [
        {"index": c["index"], "text": c["text"], "finish_reason": c.get("finish_reason")} for c in body["choices"]
    ]
    return Answer(body["id"], choices, *_usage(body.get("usage"), "prompt_tokens", "completion_tokens"))


def _text_stream(events: Sequence[Mapping[str, Any]]) -> Answer | None:
    id_, usage, failed = _common(events)
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event.get("choices") or ():
            choice = choices.setdefault(part["index"], {"index": part["index"], "text": "", "finish_reason": None})
            choice["text"] += part.get("text") or ""
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
    return _finish(id_, choices, usage, failed)


# --- responses --------------------------------------------------------------------------------------------------------


def _response_body(body: Mapping[str, Any]) -> Answer:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for item in body.get("output") or ():
        if item.get("type") == "message":
            texts += [part["text"] for part in item.get("content") or () if part.get("type") == "output_text"]
        elif item.get("type") == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
    reason = {"completed": "tool_calls" if calls else "stop", "incomplete": "length", "cancelled": CANCELLED}
    choice = _choice("".join(texts), calls, reason.get(body.get("status") or "", ERROR))
    return Answer(body["id"], [choice], *_usage(body.get("usage"), "input_tokens", "output_tokens"))


def _response_stream(events: Sequence[Mapping[str, Any]]) -> Answer | None:
    id_: str | None = None
    texts: list[str] = []
    failed = False
    for event in events:
        kind = event.get("type")
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            return _response_body(event["response"])
        if kind == "response.created":
            id_ = event["response"]["id"]
        elif kind == "response.output_text.delta":
            texts.append(event.get("delta") or "")
        elif kind == "error" or "error" in event:
            failed = True
    return Answer(id_, [_choice("".join(texts), [], ERROR if failed else CANCELLED)]) if id_ else None


# --- messages ---------------------------------------------------------------------------------------------------------


def _message_body(body: Mapping[str, Any]) -> Answer:
    blocks = body.get("content") or ()
    texts = [b.get("text") or "" for b in blocks if b.get("type") == "text"]
    calls = [_tool_use(b, json.dumps(b.get("input") or {})) for b in blocks if b.get("type") == "tool_use"]
    stop = body.get("stop_reason") or ""
    choice = _choice("".join(texts), calls, _STOP_REASONS.get(stop, stop or None))
    return Answer(body["id"], [choice], *_usage(body.get("usage"), "input_tokens", "output_tokens"))


def _message_stream(events: Sequence[Mapping[str, Any]]) -> Answer | None:
    id_: str | None = None
    usage: dict[str, Any] = {}
    blocks: dict[int, tuple[Mapping[str, Any], list[str]]] = {}
    reason: str | None = CANCELLED
    for event in events:
        match event.get("type"):
            case "message_start":
                id_ = event["message"]["id"]
                usage |= event["message"].get("usage") or {}
            case "content_block_start":
                blocks[event["index"]] = (event["content_block"], [])
            case "content_block_delta" if event.get("index") in blocks:
                delta = event["delta"]
                blocks[event["index"]][1].append(delta.get("text") or delta.get("partial_json") or "")
            case "message_delta":
                stop = event["delta"].get("stop_reason") or ""
                reason = _STOP_REASONS.get(stop, stop or None)
                usage |= event.get("usage") or {}
            case "error":
                reason = ERROR
    if id_ is None:
        return None
    ordered = [blocks[i] for i in sorted(blocks)]
    text = "".join("".join(parts) for block, parts in ordered if block.get("type") == "text")
    calls = [_tool_use(block, "".join(parts)) for block, parts in ordered if block.get("type") == "tool_use"]
    return Answer(id_, [_choice(text, calls, reason)], *_usage(usage, "input_tokens", "output_tokens"))


def _tool_use(block: Mapping[str, Any], arguments: str) -> dict[str, Any]:
    return {"id": block.get("id"), "type": "function", "function": {"name": block.get("name"), "arguments": arguments}}


# --- shared -----------------------------------------------------------------------------------------------------------


def _common(events: Sequence[Mapping[str, Any]]) -> tuple[str | None, Mapping[str, Any] | None, bool]:
    id_ = next((e["id"] for e in events if e.get("id")), None)
    usage = next((e["usage"] for e in reversed(events) if e.get("usage")), None)
    return id_, usage, any("error" in e for e in events)


def _finish(
    id_: str | None, choices: Mapping[int, dict[str, Any]], usage: Mapping[str, Any] | None, failed: bool
) -> Answer | None:
    if id_ is None:
        return None
    for choice in choices.values():
        choice["finish_reason"] = choice["finish_reason"] or (ERROR if failed else CANCELLED)
    ordered = [choices[i] for i in sorted(choices)]
    return Answer(id_, ordered, *_usage(usage, "prompt_tokens", "completion_tokens"))


def _choice(text: str, calls: list[dict[str, Any]], reason: str | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if calls:
        message["tool_calls"] = calls
    return {"index": 0, "message": message, "finish_reason": reason}


def _present(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without the fields that vLLM fills with null or nothing; `content` always stays."""
    return {k: v for k, v in message.items() if k == "content" or v not in (None, [], {})}


def _usage(usage: Mapping[str, Any] | None, prompt: str, completion: str) -> tuple[int | None, int | None]:
    return (None, None) if usage is None else (usage.get(prompt), usage.get(completion))


_BODIES = {"chat": _chat_body, "completions": _text_body, "responses": _response_body, "messages": _message_body}
_STREAMS = {
    "chat": _chat_stream,
    "completions": _text_stream,
    "responses": _response_stream,
    "messages": _message_stream,
}
