"""Who is asking, for sticky assignment: the subject of a request, from its JSON body and headers.

Order: the user, else the conversation, else the opening of the conversation, else the API key. The opening
(instructions and first user message) never changes while a conversation grows, so its later turns keep the version of
the first one. Knows nothing of routing: it only names the subject. A subject stays in memory; what is recorded of a
user is a keyed hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

CONVERSATION_HEADER = "x-conversation-id"
_OPENING_CHARS = 4096


def user_of(body: Mapping[str, Any]) -> str | None:
    """The user that the client names: `user`, `safety_identifier` (OpenAI), or `metadata.user_id` (Anthropic)."""
    for key in ("user", "safety_identifier"):
        if (value := _text(body.get(key))) is not None:
            return value
    metadata = body.get("metadata")
    return _text(metadata.get("user_id")) if isinstance(metadata, Mapping) else None


def conversation_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    """The conversation's id: `metadata.conversation_id`, the Responses API's `conversation`, or X-Conversation-Id."""
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping) and (value := _text(metadata.get("conversation_id"))) is not None:
        return value
    conversation = body.get("conversation")
    if isinstance(conversation, Mapping):
        conversation = conversation.get("id")
    return _text(conversation) or _text(headers.get(CONVERSATION_HEADER))


def subject_of(body: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The subject, with its kind as a prefix so that a user cannot collide with a conversation. Never empty."""
    if (user := user_of(body)) is not None:
        return f"user:{user}"
    if (conversation := conversation_of(body, headers)) is not None:
        return f"conversation:{conversation}"
    if (opening := _opening(body)) is not None:
        return f"opening:{_digest(opening)}"
    if (key := headers.get("authorization") or headers.get("x-api-key")) is not None:
        return f"key:{_digest(key)}"
    return "anonymous"


def _opening(body: Mapping[str, Any]) -> str | None:
    """The system prompt and the first user message of a chat, or the beginning of a prompt."""
    messages = body.get("messages", body.get("input", body.get("prompt")))
    leading = body.get("system", body.get("instructions"))
    if isinstance(messages, str):
        return f"{_content(leading)}\n{messages[:_OPENING_CHARS]}" if messages else None
    if not isinstance(messages, list) or not messages:
        return None
    parts = [_content(leading)] if leading is not None else []
    for message in messages[:8]:
        if not isinstance(message, Mapping):
            return _content(messages)
        parts.append(_content(message.get("content")))
        if message.get("role") == "user":
            break
    return "\n".join(parts)


def _content(content: Any) -> str:
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=str)
    return text[:_OPENING_CHARS]


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
