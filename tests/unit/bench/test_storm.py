"""The judge of the swap storm: every kind of wrong answer is found, and right ones are not accused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.bench.storm import Answer, Change, judge

MARKERS = {"chat:1": "green", "chat:2": "cold", "chat:3": "Paris"}


def answer(model: str = "chat:1", at: float = 1.0, **changed: Any) -> Answer:
    fields: dict[str, Any] = {
        "user": "u",
        "asked": "chat",
        "started": at,
        "ended": at + 0.1,
        "status": 200,
        "models": frozenset({model}),
        "words": frozenset({MARKERS[model]}),
    }
    return Answer(**fields | changed)


def change(kind: str, at: float, champion: str, challenger: str | None = None, weight: float = 0.0) -> Change:
    versions = frozenset({champion} | ({challenger} if challenger else set()))
    return Change(kind, at, at + 0.05, versions, champion, challenger, weight)


START = change("start", 0.0, "chat:1")
HISTORY = [
    START,
    change("step", 10.0, "chat:1", "chat:2", 0.3),
    change("step", 20.0, "chat:1", "chat:2", 0.6),
    change("promote", 30.0, "chat:2"),
    change("rollback", 40.0, "chat:1"),
]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (answer(status=503), "failed"),
        (answer(error="reset"), "failed"),
        (answer(models=frozenset({"chat:1", "chat:2"})), "mixed"),
        (answer(models=frozenset()), "mixed"),
        (answer(words=frozenset({"green", "cold"})), "mixed"),
        (answer(words=frozenset({"cold"})), "contradicting"),
        (answer("chat:2", 1.0), "misrouted"),  # before its rollout
        (answer("chat:1", 35.0), "misrouted"),  # a second after the promotion
        (answer("chat:2", 45.0), "misrouted"),  # after the rollback
        (answer("chat:2", 1.0, asked="chat:1"), "misrouted"),
    ],
)
def test_a_wrong_answer_is_found(wrong: Answer, kind: str) -> None:
    assert judge([wrong], HISTORY, MARKERS).counts == {kind: 1}


@pytest.mark.parametrize(
    "right",
    [
        answer(),
        answer(words=frozenset()),  # one word, cut off
        answer("chat:2", 10.01),  # while the change is being written
        answer("chat:1", 30.9),  # within the second in which all come to agree
        answer("chat:3", 5.0, asked="chat:3"),
    ],
)
def test_a_right_answer_is_not_accused(right: Answer) -> None:
    assert judge([right], HISTORY, MARKERS).counts == {}


@pytest.mark.parametrize(
    ("first", "second", "is_legal"),
    [
        (("chat:1", 11.5), ("chat:2", 15.0), False),  # nothing moved between them
        (("chat:2", 11.5), ("chat:1", 15.0), False),
        (("chat:1", 5.0), ("chat:2", 12.0), True),  # the rollout began
        (("chat:1", 15.0), ("chat:2", 22.0), True),  # in the added slice
        (("chat:2", 15.0), ("chat:1", 22.0), False),  # a higher weight takes nobody away
        (("chat:1", 25.0), ("chat:2", 32.0), True),  # promoted
        (("chat:2", 35.0), ("chat:1", 42.0), True),  # rolled back
        (("chat:2", 15.0), ("chat:1", 42.0), True),  # through all of it
    ],
)
def test_a_user_changes_version_only_when_something_moved_them(
    first: tuple[str, float], second: tuple[str, float], is_legal: bool
) -> None:
    found = judge([answer(*first), answer(*second)], HISTORY, MARKERS)
    assert found.num_pairs == 1
    assert found.counts == ({} if is_legal else {"wandering": 1})
