"""The body of a vote: every accepted form of a value, every refusal with its field, and arbitrary JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scion_adapters.errors import InvalidInputError
from scion_feedback.parsing import (
    KNOWN_FIELDS,
    MAX_METADATA_BYTES,
    MAX_TEXT_CHARS,
    FeedbackInput,
    parse_feedback,
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),  # JSON true
        (False, 0.0),  # JSON false
        (1, 1.0),  # an integer, not true
        (-1, 0.0),  # the down of up/down
        (-1.0, 0.0),  # the same from a language without integers
        (0, 0.0),  # a number in 0..1
        (1.0, 1.0),
        (0.5, 0.5),  # neutral is a value
        (0.25, 0.25),
        (5e-324, 5e-324),  # the smallest number above 0
        ("up", 1.0),
        ("DOWN", 0.0),  # case does not matter
        ("Up", 1.0),
    ],
)
def test_value_forms(value: Any, expected: float) -> None:
    parsed = parse_feedback({"completion_id": "c", "value": value})
    assert parsed.value == expected
    assert type(parsed.value) is float


_NESTED: dict[str, Any] = {}
_deepest = _NESTED
for _ in range(100_000):
    _deepest["a"] = {}
    _deepest = _deepest["a"]


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"value": 1.01}, "value", "1.01"),  # just above
        ({"value": -0.01}, "value", "-0.01"),  # just below; only exactly -1 is a down
        ({"value": 2}, "value", "number from 0 to 1"),
        ({"value": -2}, "value", "number from 0 to 1"),
        ({"value": 10**400}, "value", "number from 0 to 1"),  # no float can hold it
        ({"value": float("nan")}, "value", "nan"),  # Python's JSON reader takes NaN
        ({"value": float("inf")}, "value", "inf"),
        ({"value": float("-inf")}, "value", "-inf"),
        ({"value": "0.5"}, "value", "'0.5'"),  # a number as text
        ({"value": "true"}, "value", "'true'"),
        ({"value": ""}, "value", "''"),
        ({"value": "up "}, "value", "'up '"),  # not trimmed
        ({"value": [1]}, "value", "an array"),
        ({"value": {"up": True}}, "value", "an object"),
        ({"value": None}, "value", "at least one of value, comment, correction"),  # null means absent
        ({"value": None, "comment": "  "}, "value", "at least one"),  # so does a blank form field
        ({"completion_id": None}, "completion_id", "missing"),
        ({"completion_id": ""}, "completion_id", "empty"),
        ({"completion_id": "  "}, "completion_id", "empty"),
        ({"completion_id": 7}, "completion_id", "expected a string, got a number"),
        ({"completion_id": True}, "completion_id", "got a boolean"),
        ({"completion_id": "c" * 256}, "completion_id", "256 characters; at most 255"),
        ({"completion_id": "a\0b"}, "completion_id", "NUL"),  # PostgreSQL cannot hold it
        ({"completion_id": "\ud83d"}, "completion_id", "surrogate"),  # neither database can
        ({"name": ""}, "name", "empty"),
        ({"name": "-x"}, "name", "beginning with a letter or digit"),
        ({"name": "a b"}, "name", "'a b'"),
        ({"name": "n" * 65}, "name", "1 to 64"),
        ({"name": ["rating"]}, "name", "an array"),
        ({"comment": 1}, "comment", "expected a string"),
        ({"comment": "x" * (MAX_TEXT_CHARS + 1)}, "comment", "at most 16384"),
        ({"comment": "a\0"}, "comment", "NUL"),
        ({"correction": "x" * (MAX_TEXT_CHARS + 1)}, "correction", "at most 16384"),
        ({"correction": {"text": "x"}}, "correction", "an object"),
        ({"user": 7}, "user", "expected a string"),
        ({"user": "u" * 256}, "user", "at most 255"),
        ({"choice_index": -1}, "choice_index", "0 to 1023"),
        ({"choice_index": True}, "choice_index", "0 to 1023"),  # a boolean is no index
        ({"choice_index": 0.0}, "choice_index", "0 to 1023"),
        ({"choice_index": 1024}, "choice_index", "0 to 1023"),
        ({"metadata": []}, "metadata", "expected an object, got an array"),
        ({"metadata": "x"}, "metadata", "got a string"),
        ({"metadata": {"x": float("nan")}}, "metadata", "plain JSON"),  # not JSON, and PostgreSQL refuses it
        ({"metadata": {"x": "\udc00"}}, "metadata", "surrogate"),
        ({"metadata": {"x": "y" * MAX_METADATA_BYTES}}, "metadata", "at most 16384"),
        ({"metadata": {"x": "é" * (MAX_METADATA_BYTES // 2)}}, "metadata", "at most 16384"),  # bytes, not characters
        ({"metadata": _NESTED}, "metadata", "plain JSON"),  # deeper than the writer can go
        ({"id": ""}, "id", "empty"),
        ({"id": "a/b"}, "id", "'a/b'"),  # it becomes part of a URL
        ({"id": "../x"}, "id", "beginning with a letter or digit"),
        ({"id": "i" * 256}, "id", "at most 255"),
        ({"valeu": 1}, "valeu", "known fields are: completion_id"),  # a typing error must not lose the vote silently
        ({"counts": True}, "counts", "unknown field"),  # a column, not a field
        ({"source": "import"}, "source", "unknown field"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], field: str, says: str) -> None:
    body = {"completion_id": "c", "value": 1, **changes}
    with pytest.raises(InvalidInputError) as caught:
        parse_feedback(body)
    assert caught.value.field == field
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("k", True),
        ("9f2c-…"[:5], True),
        ("k" * 255, True),
        ("k" * 256, False),  # longer than the column
        ("", False),
        ("a\nb", False),  # header injection
        ("schlüssel", False),  # headers are ASCII
    ],
)
def test_idempotency_key(key: str, good: bool) -> None:
    body = {"completion_id": "c", "value": 1}
    if good:
        assert parse_feedback(body, idempotency_key=key).idempotency_key == key
        return
    with pytest.raises(InvalidInputError) as caught:
        parse_feedback(body, idempotency_key=key)
    assert caught.value.field == "Idempotency-Key"


@pytest.mark.parametrize("body", [None, [], "up", 1, True])
def test_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(InvalidInputError, match="must be a JSON object"):
        parse_feedback(body)


def test_all_fields() -> None:
    parsed = parse_feedback(
        {
            "completion_id": "chatcmpl-1",
            "choice_index": 2,
            "name": "helpfulness",
            "value": 0.75,
            "comment": "good",
            "correction": "better",
            "user": "alice",
            "metadata": {"page": 3},
            "id": "fb-1",
        }
    )
    assert parsed == FeedbackInput(
        "chatcmpl-1", 2, "helpfulness", 0.75, "good", "better", "alice", {"page": 3}, "fb-1", None
    )
    assert "alice" not in repr(parsed)  # user names must not reach a log


def test_absent_null_and_blank_are_the_same() -> None:
    bare = parse_feedback({"completion_id": "c", "value": 1})
    nulls = dict.fromkeys(KNOWN_FIELDS)
    assert parse_feedback({**nulls, "completion_id": "c", "value": 1}) == bare
    assert parse_feedback({"completion_id": "c", "value": 1, "comment": "", "correction": " ", "user": ""}) == bare
    assert bare.name == "rating"


@pytest.mark.parametrize("said", [{"comment": "x"}, {"correction": "x"}])
def test_a_value_is_not_needed(said: dict[str, str]) -> None:
    assert parse_feedback({"completion_id": "c", **said}).value is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_bodies = _json | st.fixed_dictionaries(
    {"completion_id": st.text(max_size=300) | _json}, optional=dict.fromkeys(KNOWN_FIELDS[1:], _json)
)


@settings(max_examples=150, deadline=None, database=None)
@given(body=_bodies, key=st.none() | st.text(max_size=300))
@example(body={"completion_id": "c", "value": 1e400}, key=None)
def test_any_json_is_parsed_or_refused(body: Any, key: str | None) -> None:
    parsed = refused = None
    try:
        parsed = parse_feedback(body, idempotency_key=key)
    except InvalidInputError as error:
        refused = error
    if parsed is None:
        assert refused is not None
        json.dumps([str(refused), refused.field], ensure_ascii=False).encode()  # it must survive the trip to the client
        return
    assert parsed.value is None or 0.0 <= parsed.value <= 1.0
    json.dumps(dict(parsed.metadata), allow_nan=False, ensure_ascii=False).encode()
    for text in (parsed.completion_id, parsed.comment, parsed.correction, parsed.id):
        assert text is None or "\0" not in text.encode().decode()
