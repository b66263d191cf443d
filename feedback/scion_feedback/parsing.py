"""The body of a vote: what `POST /v1/feedback` takes, checked field by field. Pure; knows no HTTP and no database."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scion_adapters.errors import InvalidInputError

DEFAULT_NAME = "rating"
MAX_TEXT_CHARS = 16_384
MAX_METADATA_BYTES = 16_384
MAX_CHOICE_INDEX = 1023
KNOWN_FIELDS = (
    "completion_id", "choice_index", "name", "value", "comment", "correction", "user", "metadata", "id",
)  # fmt: skip

_MAX_ID_CHARS = 255
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,254}")
_WORDS = {"up": 1.0, "down": 0.0}


@dataclass(frozen=True, slots=True)
class FeedbackInput:
    """A checked vote. `value` is 0 (down) to 1 (up), None when only a comment or a correction was given."""

    completion_id: str
    choice_index: int = 0
    name: str = DEFAULT_NAME
    value: float | None = None
    comment: str | None = None
    correction: str | None = None
    user: str | None = field(default=None, repr=False)  # in the clear: never into a log
    metadata: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None
    idempotency_key: str | None = None


def parse_feedback(body: Any, *, idempotency_key: str | None = None) -> FeedbackInput:
    """The vote in a JSON body. JSON null means absent. Raises InvalidInputError that names the field."""
    if not isinstance(body, Mapping):
        raise InvalidInputError(f"the body must be a JSON object, got {_kind(body)}")
    for key in body:
        if key not in KNOWN_FIELDS:
            shown = str(key)[:80].encode("utf-8", "replace").decode()
            raise InvalidInputError(
                f"unknown field {shown!r}; known fields are: {', '.join(KNOWN_FIELDS)}", field=shown
            )
    completion_id = _text(body, "completion_id", _MAX_ID_CHARS)
    if completion_id is None:
        raise InvalidInputError(
            "completion_id is missing: send the `id` of the answer that is rated", field="completion_id"
        )
    parsed = FeedbackInput(
        completion_id=completion_id,
        choice_index=_choice_index(body.get("choice_index")),
        name=_matching(body, "name", _NAME, "1 to 64 letters, digits, `.`, `_`, `-`") or DEFAULT_NAME,
        value=_value(body.get("value")),
        comment=_text(body, "comment", MAX_TEXT_CHARS, blank_is_absent=True),
        correction=_text(body, "correction", MAX_TEXT_CHARS, blank_is_absent=True),
        user=_text(body, "user", _MAX_ID_CHARS, blank_is_absent=True),
        metadata=_metadata(body.get("metadata")),
        id=_matching(body, "id", _ID, "1 to 255 letters, digits, `.`, `_`, `:`, `~`, `-`"),
        idempotency_key=_key(idempotency_key),
    )
    if parsed.value is None and parsed.comment is None and parsed.correction is None:
        raise InvalidInputError("nothing was said: give at least one of value, comment, correction", field="value")
    return parsed


def _value(value: Any) -> float | None:
    """true, 1, "up" -> 1; false, 0, -1, "down" -> 0; a number between 0 and 1 -> itself."""
    if value is None:
        return None
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (word := _WORDS.get(value.lower())) is not None:
        return word
    if isinstance(value, int | float):
        if value == -1:
            return 0.0
        if 0 <= value <= 1:  # false for NaN
            return float(value)
    shown = repr(value)[:40] if isinstance(value, int | float | str) else _kind(value)
    raise InvalidInputError(
        f'value {shown}: expected true or false, 1 or -1, "up" or "down", or a number from 0 to 1', field="value"
    )


def _text(body: Mapping[Any, Any], name: str, max_chars: int, *, blank_is_absent: bool = False) -> str | None:
    """A non-empty text of at most `max_chars`, or None when it is absent. Forms send "" for a field left empty."""
    text = body.get(name)
    if text is None:
        return None
    if not isinstance(text, str):
        raise InvalidInputError(f"{name}: expected a string, got {_kind(text)}", field=name)
    if not text.strip():
        if blank_is_absent:
            return None
        raise InvalidInputError(f"{name} is empty: leave it out or give it text", field=name)
    if len(text) > max_chars:
        raise InvalidInputError(f"{name} has {len(text)} characters; at most {max_chars} are taken", field=name)
    _check_storable(text, name)
    return text


def _matching(body: Mapping[Any, Any], name: str, pattern: re.Pattern[str], expected: str) -> str | None:
    text = _text(body, name, _MAX_ID_CHARS)
    if text is not None and not pattern.fullmatch(text):
        raise InvalidInputError(
            f"{name} {text[:80]!r}: expected {expected}, beginning with a letter or digit", field=name
        )
    return text


def _choice_index(value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_CHOICE_INDEX:
        raise InvalidInputError(
            f"choice_index: expected the index of the rated choice, 0 to {MAX_CHOICE_INDEX}", field="choice_index"
        )
    return value


def _metadata(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidInputError(f"metadata: expected an object, got {_kind(value)}", field="metadata")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInputError(f"metadata is not plain JSON: {error}", field="metadata") from error
    _check_storable(text, "metadata")
    if len(text.encode()) > MAX_METADATA_BYTES:
        raise InvalidInputError(
            f"metadata has {len(text.encode())} bytes as JSON; at most {MAX_METADATA_BYTES} are taken", field="metadata"
        )
    return dict(value)


def _key(key: str | None) -> str | None:
    if key is None:
        return None
    if not 1 <= len(key) <= _MAX_ID_CHARS or not key.isascii() or not key.isprintable():
        raise InvalidInputError(
            f"Idempotency-Key: expected 1 to {_MAX_ID_CHARS} printable ASCII characters", field="Idempotency-Key"
        )
    return key


def _check_storable(text: str, name: str) -> None:
    """Refuse what a database cannot hold: NUL (PostgreSQL) and halves of surrogate pairs (both)."""
    if "\0" in text:
        raise InvalidInputError(f"{name} contains a NUL character; remove it", field=name)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"{name} is not valid Unicode: half of a surrogate pair", field=name) from error


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, Mapping) else "an array"
