"""Which votes become training rows: every reason to drop one, what stands when several votes compete, and the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scion_feedback.selection import DropReason, SnapshotRow, Vote, assign_splits, select
from tests.helpers.feedback import choice

_TOOL_CALL = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_QUESTION = {"role": "user", "content": "question"}


def _vote(**fields: Any) -> Vote:
    defaults: dict[str, Any] = {
        "id": "v",
        "completion_id": "c",
        "choice_index": 0,
        "name": "rating",
        "value": 1.0,
        "correction": None,
        "user_hash": "alice",
        "counts": True,
        "created_at": 100.0,
        "deleted_at": None,
        "number": 3,
        "route": "chat",
        "request": {"messages": [_QUESTION]},
        "choices": [choice("answer")],
        "completion_user": None,
        "conversation": None,
    }
    return Vote(**{**defaults, **fields})


def _request(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"request": {"messages": list(messages), **fields}}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"deleted_at": 200.0, "value": None}, DropReason.DELETED),
        ({"request": None, "choices": None, "number": None}, DropReason.UNKNOWN_COMPLETION),  # an outer join's NULLs
        ({"created_at": 49.9}, DropReason.TOO_OLD),
        ({"value": None}, DropReason.COMMENT_ONLY),
        ({"name": "helpful"}, DropReason.OTHER_NAME),
        ({"counts": False}, DropReason.SUPERSEDED),
        ({"value": 0.5}, DropReason.NEUTRAL_VALUE),
        ({"request": {"prompt": "once upon"}, "route": "completions"}, DropReason.NOT_CHAT),
        ({"request": {"messages": []}}, DropReason.NOT_CHAT),
        ({"request": {"messages": "question"}}, DropReason.NOT_CHAT),
        (_request({"content": "no role"}), DropReason.NOT_CHAT),
        (_request({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), DropReason.NOT_TEXT),
        (_request({"role": "user", "content": None}), DropReason.NOT_TEXT),
        (_request(_QUESTION, tools=[{"type": "function"}]), DropReason.TOOLS),  # their definitions are in the prompt
        (_request(_QUESTION, {"role": "tool", "content": "7"}), DropReason.TOOLS),
        (_request(_QUESTION, {"role": "assistant", "tool_calls": [_TOOL_CALL]}), DropReason.TOOLS),
        (_request(_QUESTION, {"role": "assistant", "content": "Sure, "}), DropReason.PREFILLED),
        ({"choices": [choice(None, tool_calls=[_TOOL_CALL])]}, DropReason.TOOLS),
        ({"choices": [choice("")]}, DropReason.NO_TEXT_ANSWER),
        ({"choices": [choice(None)]}, DropReason.NO_TEXT_ANSWER),
        ({"choices": [{"index": 0, "text": "answer"}]}, DropReason.NO_TEXT_ANSWER),
        ({"choices": []}, DropReason.NO_TEXT_ANSWER),
        ({"choice_index": 1}, DropReason.NO_TEXT_ANSWER),  # no such choice
        ({"choices": [choice("cut off", finish_reason="length")]}, DropReason.TRUNCATED),
    ],
)
def test_dropped(fields: dict[str, Any], reason: DropReason) -> None:
    rows, dropped = select([_vote(**fields)], not_before=50.0)
    assert rows == []
    assert dropped == {reason.value: 1}


def test_row_of_a_plain_rating() -> None:
    rows, dropped = select([_vote(value=0.0, conversation="k")], not_before=0.0)
    assert dropped == {}
    assert rows == [
        SnapshotRow(
            feedback_id="v",
            completion_id="c",
            split="train",
            kind="rating",
            messages=[_QUESTION],
            answer="answer",
            liked=False,
            correction=None,
            user_hash="alice",
            conversation="k",
            number=3,
            created_at=100.0,
        )
    ]


@pytest.mark.parametrize(
    ("fields", "liked", "correction", "answer"),
    [
        ({"value": 0.51}, True, None, "answer"),
        ({"value": 0.49}, False, None, "answer"),
        ({"correction": "better", "value": None}, None, "better", "answer"),
        ({"correction": "better", "value": 0.0}, False, "better", "answer"),  # the vote and the correction both teach
        ({"correction": "better", "value": 0.5}, None, "better", "answer"),
        ({"correction": "better", "counts": False}, None, "better", "answer"),  # only the vote was replaced
        ({"correction": "better", "name": "edit"}, None, "better", "answer"),  # a value of that name is no liking
        ({"correction": "better", "choices": []}, None, "better", ""),  # the answer is not needed
        ({"correction": "better", "choices": [choice("cut", finish_reason="length")]}, None, "better", "cut"),
        ({"value": 0.0, "choices": [choice("cut", finish_reason="length")]}, False, None, "cut"),
        ({"choice_index": 1, "choices": [choice("a"), choice("b", index=1)]}, True, None, "b"),
    ],
)
def test_used(fields: dict[str, Any], liked: bool | None, correction: str | None, answer: str) -> None:
    (row,), _ = select([_vote(**fields)], not_before=0.0)
    assert (row.liked, row.correction, row.answer) == (liked, correction, answer)
    assert row.kind == ("rating" if correction is None else "correction")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),  # OpenAI's parts
        ([{"type": "input_text", "text": "a"}], "a"),  # of the responses route
        ("half \ud83d", "half ?"),  # no tokenizer takes half a surrogate pair
    ],
)
def test_content_forms(content: Any, text: str) -> None:
    (row,), _ = select([_vote(**_request({"role": "user", "content": content, "name": "x"}))], not_before=0.0)
    assert row.messages == [{"role": "user", "content": text}]


def test_the_newest_of_several_stands() -> None:
    votes = [
        _vote(id="5", correction="newest", value=None),
        _vote(id="4", value=0.0, user_hash=None, completion_user="alice"),  # its user is not known yet
        _vote(id="3", value=1.0),
        _vote(id="2", correction="older", value=None),
        _vote(id="1", value=1.0, user_hash="bob"),
    ]
    rows, dropped = select(votes, not_before=0.0)
    assert [row.feedback_id for row in rows] == ["5", "4", "1"]
    assert rows[1].user_hash == "alice"
    assert dropped == {"superseded": 2}


def _rows(num_users: int, each: int = 2) -> list[SnapshotRow]:
    votes = [
        _vote(id=f"{u}-{n}", completion_id=f"c{u}-{n}", user_hash=f"user {u}")
        for u in range(num_users)
        for n in range(each)
    ]
    return select(votes, not_before=0.0)[0]


def test_whole_users_are_held_out_near_the_share() -> None:
    rows, rule = assign_splits(_rows(1000), 0.15)
    heldout = {row.user_hash for row in rows if row.split == "heldout"}
    train = {row.user_hash for row in rows if row.split == "train"}
    assert rule == "user"
    assert not heldout & train
    assert 110 < len(heldout) < 190  # 150 expected, standard deviation 11


def test_a_user_stays_on_one_side_when_others_join() -> None:
    few, _ = assign_splits(_rows(100), 0.15)
    many, _ = assign_splits(_rows(1000), 0.15)
    assert {row.feedback_id: row.split for row in few}.items() <= {row.feedback_id: row.split for row in many}.items()


@pytest.mark.parametrize("heldout_share", [1e-6, 0.15, 0.499])
def test_with_one_user_single_completions_are_held_out(heldout_share: float) -> None:
    rows, rule = assign_splits(_rows(1, each=60), heldout_share)
    assert rule == "completion"
    assert 0 < sum(row.split == "heldout" for row in rows) < 45


def test_two_votes_about_one_completion_are_never_split() -> None:
    rows = _rows(1, each=60)
    twins = [replace(row, feedback_id=row.feedback_id + "'") for row in rows]
    split, _ = assign_splits(rows + twins, 0.3)
    sides: dict[str, set[str]] = {}
    for row in split:
        sides.setdefault(row.completion_id, set()).add(row.split)
    assert all(len(side) == 1 for side in sides.values())


def test_without_users_conversations_are_the_unit() -> None:
    votes = [
        _vote(id=f"{c}-{n}", completion_id=f"c{c}-{n}", user_hash=None, conversation=f"k{c}")
        for c in range(200)
        for n in range(3)
    ]
    rows, rule = assign_splits(select(votes, not_before=0.0)[0], 0.15)
    assert rule == "user"
    heldout = {row.conversation for row in rows if row.split == "heldout"}
    assert not heldout & {row.conversation for row in rows if row.split == "train"}


def test_nothing_to_split() -> None:
    assert assign_splits([], 0.15) == ([], "completion")
    assert assign_splits([], 0.15, 0.05) == ([], "completion")


def _rows_over_time(num_users: int = 100) -> list[SnapshotRow]:
    return [replace(row, created_at=float(at)) for at, row in enumerate(_rows(num_users))]


def test_the_newest_of_the_others_are_kept_apart_too() -> None:
    rows, rule = assign_splits(_rows_over_time(), 0.15, 0.1)
    plain, _ = assign_splits(_rows_over_time(), 0.15)
    assert rule == "user"
    newest = [row.created_at for row in rows if row.split == "newest"]
    assert newest
    assert min(newest) >= 180  # of 200 rows, the last 20
    assert all(row.split != "train" for row in rows if row.created_at >= 180)
    for with_newest, without in zip(rows, plain, strict=True):  # who is held out does not depend on time
        assert (with_newest.split == "heldout") == (without.split == "heldout")


def test_all_votes_about_a_newest_answer_are_kept_apart() -> None:
    rows = _rows_over_time()
    early = replace(rows[0], feedback_id="early", completion_id=rows[-1].completion_id, created_at=0.5)
    sides = {row.feedback_id: row.split for row in assign_splits([*rows, early], 0.15, 0.05)[0]}
    late = next(row for row in rows if row.feedback_id == rows[-1].feedback_id)
    assert sides["early"] != "train"
    assert sides[late.feedback_id] != "train"


def test_what_was_newest_is_trained_on_later() -> None:
    rows = _rows_over_time()
    then = {row.feedback_id for row in assign_splits(rows[:100], 0.15, 0.1)[0] if row.split == "newest"}
    later = {row.feedback_id: row.split for row in assign_splits(rows, 0.15, 0.1)[0]}
    assert then
    assert {later[key] for key in then} == {"train"}
