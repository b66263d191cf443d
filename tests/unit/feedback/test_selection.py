"""Which votes become training rows: every reason to drop one, what stands when several votes compete, and the split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scion_feedback.selection import DropReason, Past, SnapshotRow, Vote, assign_splits, select
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
        ({"choices": [choice("cut off", finish_reason="cancelled")]}, DropReason.TRUNCATED),  # stopped by its reader
        ({"choices": [choice("cut off", finish_reason="error")]}, DropReason.TRUNCATED),
        ({"choices": [choice("cut off", finish_reason="abort")]}, DropReason.TRUNCATED),
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


def test_a_correction_that_was_replaced_stays_so_when_the_later_one_is_deleted() -> None:
    votes = [
        _vote(id="5", correction="", value=None, counts=False, deleted_at=200.0),  # alice took hers back
        _vote(id="4", correction=None, value=None, counts=False, deleted_at=200.0, user_hash="bob"),  # a thumb was
        _vote(id="3", correction="bob's", value=None, user_hash="bob"),
        _vote(id="2", correction="older", value=1.0),
        _vote(id="1", correction="oldest", value=None),
    ]
    rows, dropped = select(votes, not_before=0.0)
    assert [(row.feedback_id, row.correction, row.liked) for row in rows] == [("3", "bob's", None), ("2", None, True)]
    assert dropped == {"deleted": 2, "superseded": 1}


def _rows(num_users: int, each: int = 2) -> list[SnapshotRow]:
    votes = [
        _vote(id=f"{u}-{n}", completion_id=f"c{u}-{n}", user_hash=f"user {u}")
        for u in range(num_users)
        for n in range(each)
    ]
    return select(votes, not_before=0.0)[0]


def test_whole_users_are_held_out_near_the_share() -> None:
    rows, rule, _ = assign_splits(_rows(1000), 0.15)
    heldout = {row.user_hash for row in rows if row.split == "heldout"}
    train = {row.user_hash for row in rows if row.split == "train"}
    assert rule == "user"
    assert not heldout & train
    assert 110 < len(heldout) < 190  # 150 expected, standard deviation 11


def test_a_user_stays_on_one_side_when_others_join() -> None:
    few, _, _ = assign_splits(_rows(100), 0.15)
    many, _, _ = assign_splits(_rows(1000), 0.15)
    assert {row.feedback_id: row.split for row in few}.items() <= {row.feedback_id: row.split for row in many}.items()


@pytest.mark.parametrize("heldout_share", [1e-6, 0.15, 0.499])
def test_with_one_user_single_completions_are_held_out(heldout_share: float) -> None:
    rows, rule, _ = assign_splits(_rows(1, each=60), heldout_share)
    assert rule == "completion"
    assert 0 < sum(row.split == "heldout" for row in rows) < 45


def test_two_votes_about_one_completion_are_never_split() -> None:
    rows = _rows(1, each=60)
    twins = [replace(row, feedback_id=row.feedback_id + "'") for row in rows]
    split, _, _ = assign_splits(rows + twins, 0.3)
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
    rows, rule, _ = assign_splits(select(votes, not_before=0.0)[0], 0.15)
    assert rule == "user"
    heldout = {row.conversation for row in rows if row.split == "heldout"}
    assert not heldout & {row.conversation for row in rows if row.split == "train"}


def test_nothing_to_split() -> None:
    assert assign_splits([], 0.15) == ([], "completion", {})
    assert assign_splits([], 0.15, 0.05) == ([], "completion", {})


def _rows_over_time(num_users: int = 100) -> list[SnapshotRow]:
    return [replace(row, created_at=float(at)) for at, row in enumerate(_rows(num_users))]


def test_the_newest_of_the_others_are_kept_apart_too() -> None:
    rows, rule, _ = assign_splits(_rows_over_time(), 0.15, 0.1)
    plain, _, _ = assign_splits(_rows_over_time(), 0.15)
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


def _past(*snapshots: list[SnapshotRow]) -> Past:
    rows = [row for snapshot in snapshots for row in snapshot]
    return Past(_answers(rows, "train"), _answers(rows, "heldout"))


def _answers(rows: list[SnapshotRow], split: str) -> set[str]:
    return {row.completion_id for row in rows if row.split == split}


def _same_answers(num_users: int, num_answers: int) -> list[SnapshotRow]:
    return [replace(row, completion_id=row.completion_id.split("-")[1]) for row in _rows(num_users, each=num_answers)]


def test_sides_are_kept_when_single_completions_give_way_to_whole_users() -> None:
    early, rule, _ = assign_splits(_rows(3, each=20), 0.15)
    assert rule == "completion"
    rows = [*_rows(3, each=20), *_rows(43, each=3)[9:]]
    late, rule, dropped = assign_splits(rows, 0.15, past=_past(early))
    assert rule == "user"
    assert not _answers(early, "heldout") & _answers(late, "train")
    assert not _answers(early, "train") & _answers(late, "heldout")
    assert len(late) + dropped.total() == len(rows)
    assert set(dropped) <= {"answer_held_out", "answer_trained_on"}
    assert len(_answers(late, "heldout")) >= 10
    assert len(_answers(late, "train")) > len(_answers(early, "train"))


def test_an_answer_that_several_users_rated_is_never_on_both_sides() -> None:
    rows = _rows(100)
    heldout = next(row for row in assign_splits(rows, 0.15)[0] if row.split == "heldout")
    fans = [replace(heldout, feedback_id=f"fan-{n}", user_hash=f"user {n}") for n in range(100)]
    split, rule, dropped = assign_splits([*rows, *fans], 0.15)
    assert rule == "user"
    assert not _answers(split, "heldout") & _answers(split, "train")
    num_judging = sum(row.completion_id == heldout.completion_id for row in split)
    assert dropped == {"answer_held_out": 101 - num_judging}


def test_users_who_all_rate_the_same_few_answers_leave_enough_on_both_sides() -> None:
    snapshots: list[list[SnapshotRow]] = []
    for num_users in (3, 30, 300):
        rows = _same_answers(num_users, 8)
        split, rule, dropped = assign_splits(rows, 0.15, past=_past(*snapshots))
        snapshots.append(split)
        assert rule == "completion"
        assert dropped == {}
        assert 0 < len(_answers(split, "heldout")) <= 4
    assert len({frozenset(_answers(split, "heldout")) for split in snapshots}) == 1


@pytest.mark.parametrize("newest_share", [0.0, 0.05])
@pytest.mark.parametrize("shared", [False, True])
def test_ordinary_growth_keeps_a_holdout_and_a_training_set(newest_share: float, shared: bool) -> None:
    snapshots: list[list[SnapshotRow]] = []
    for num_users in (4, 40, 120, 400):
        rows = [replace(row, created_at=float(at)) for at, row in enumerate(_rows(num_users, each=5))]
        if shared:  # everyone rates an answer of the user before them too
            rows += [replace(row, feedback_id=f"{row.feedback_id}'", user_hash=f"user {1 + at // 5}")
                     for at, row in enumerate(rows) if at % 5 == 0]  # fmt: skip
        split, _, dropped = assign_splits(rows, 0.15, newest_share, _past(*snapshots))
        snapshots.append(split)
        learned = {id_ for earlier in snapshots for id_ in _answers(earlier, "train")}
        judged = {id_ for earlier in snapshots for id_ in _answers(earlier, "heldout")}
        assert not learned & judged
        assert 0.05 < sum(row.split == "heldout" for row in split) / len(rows) < 0.3
        assert sum(row.split == "train" for row in split) / len(rows) > 0.6
        assert dropped.total() < 0.1 * len(rows) + 3
        assert assign_splits(rows, 0.15, newest_share, _past(*snapshots)) == (split, _, dropped)  # built again


def test_an_answer_that_was_on_both_sides_is_on_neither() -> None:
    rows = _rows(1, each=60)
    both = Past({"c0-7"}, {"c0-7"})
    split, _, dropped = assign_splits(rows, 0.15, past=both)
    assert "c0-7" not in {row.completion_id for row in split}
    assert dropped == {"answer_held_out": 1}
