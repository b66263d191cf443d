"""Which votes become training rows, and which of those are held out. Pure: what the database said in, rows out.

Every vote that does not become a row is counted under the first reason that applies (`DropReason`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from scion_adapters.records import RED_TEAM
from scion_feedback.parsing import DEFAULT_NAME
from scion_feedback.statistics import NEUTRAL

Split = Literal["train", "heldout", "newest"]
"""`heldout`: of users that no run learns from; `newest`: kept from this snapshot's run only, because they came last."""
Kind = Literal["rating", "correction"]
SplitRule = Literal["user", "completion"]


class DropReason(StrEnum):
    DELETED = "deleted"
    UNKNOWN_COMPLETION = "unknown_completion"  # the answer was not recorded
    OTHER_ADAPTER = "other_adapter"
    TOO_OLD = "too_old"
    COMMENT_ONLY = "comment_only"  # neither a value nor a correction
    OTHER_NAME = "other_name"  # a value under another name than "rating" says nothing about liking
    RED_TEAM_SHARE = "red_team_share"  # more findings than their share of the snapshot
    SUPERSEDED = "superseded"  # a later vote of the same user about the same answer counts instead
    NEUTRAL_VALUE = "neutral_value"
    NOT_CHAT = "not_chat"  # a bare prompt: training wraps text in the chat template, which this answer never saw
    NOT_TEXT = "not_text"  # images, audio
    TOOLS = "tool_calls"  # tools were offered or used: their definitions are part of the prompt
    PREFILLED = "prefilled_answer"  # the answer continues an assistant message
    NO_TEXT_ANSWER = "no_text_answer"
    TRUNCATED = "truncated_answer"  # liked, but broken off: training on it teaches to stop mid-sentence
    JUDGES = "answer_held_out"  # a vote about its answer judges, now or in an earlier snapshot: no run learns from it
    LEARNED = "answer_trained_on"  # to be held out, but an earlier snapshot trained on its answer


_BROKEN_OFF = frozenset({"length", "cancelled", "error", "abort"})
"""Finish reasons of answers without their end: by max_tokens, by the user's stop button, in mid-stream, by vLLM."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One row of `feedback` with its completion's columns, which are None when the completion is unknown."""

    id: str
    completion_id: str
    choice_index: int
    name: str
    value: float | None
    correction: str | None
    user_hash: str | None
    counts: bool
    created_at: float
    deleted_at: float | None
    number: int | None
    route: str | None
    request: Mapping[str, Any] | None
    choices: Sequence[Mapping[str, Any]] | None
    completion_user: str | None
    conversation: str | None
    source: str = "user"

    @property
    def rates_with(self) -> str:
        """The name under which a value of this source says whether the answer is liked."""
        return RED_TEAM if self.source == RED_TEAM else DEFAULT_NAME

    @property
    def user(self) -> str | None:
        """Who voted: a vote without a user is one of the completion's user."""
        return self.user_hash or self.completion_user


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """One example. `liked` is None for a correction without a (counting) vote; `correction` replaces `answer`."""

    feedback_id: str
    completion_id: str
    split: Split
    kind: Kind
    messages: list[dict[str, str]]
    answer: str
    liked: bool | None
    correction: str | None
    user_hash: str | None
    conversation: str | None
    number: int
    created_at: float
    source: str = "user"  # or RED_TEAM
    replayed: bool = False  # older than the snapshot's window; an earlier snapshot trained on it

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Past:
    """The completions that earlier snapshots of an adapter trained on, and those that they held out."""

    learned: Collection[str] = frozenset()
    held_out: Collection[str] = frozenset()


def select(votes: Iterable[Vote], *, not_before: float) -> tuple[list[SnapshotRow], Counter[str]]:
    """The rows of `votes`, newest vote first, all in the split "train", and how many were dropped by reason.

    `votes` must come newest first: of several by one user about one answer the first seen stands.
    """
    rows: list[SnapshotRow] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[object, ...]] = set()
    for vote in votes:
        outcome = _row(vote, not_before, seen)
        if isinstance(outcome, SnapshotRow):
            rows.append(outcome)
        else:
            dropped[outcome.value] += 1
    return rows, dropped


def limit_red_team(rows: Sequence[SnapshotRow], share: float) -> tuple[list[SnapshotRow], list[SnapshotRow], int]:
    """(users' rows, as many findings of the red team as may be `share` of both together, how many were left out).

    `rows` come newest first, and the newest findings are kept: they are about the newest versions.
    """
    users = [row for row in rows if row.source != RED_TEAM]
    findings = [row for row in rows if row.source == RED_TEAM]
    kept = findings[: int(len(users) * share / (1 - share) + 1e-9)]
    return users, kept, len(findings) - len(kept)


def assign_splits(
    rows: Sequence[SnapshotRow], heldout_share: float, newest_share: float = 0.0, past: Past = Past()
) -> tuple[list[SnapshotRow], SplitRule, Counter[str]]:
    """Hold out whole users, the same ones in every snapshot: a gate must not ask what an ancestor was trained on.

    A user is held out when the hash of their (keyed) user hash falls into the lowest `heldout_share`. When users are so
    few, or rate so much the same answers, that this holds out nobody or leaves less than half of the rows to learn
    from, single completions are held out by the same rule.

    Users rate each other's answers, and the rule changes as users come, so a completion keeps the side that it was on
    first, whoever votes: one that was ever held out is never in "train", one that was trained on never in "heldout".
    The rows that this leaves out are counted by reason, as in `select`.

    Of the others, the newest `newest_share` of all rows is kept apart too, with every vote about the same answers. The
    next snapshot trains on them; the parent was not, unless it was made from a later part of the same votes.
    """
    newest = _newest(rows, newest_share)
    by_user = [_position(_unit(row)) < heldout_share for row in rows]
    judging = {row.completion_id for row, held in zip(rows, by_user, strict=True) if held}
    if judging and sum(row.completion_id not in judging for row in rows) >= len(rows) / 2:
        split, dropped = _split(rows, by_user, newest, past)
        if any(row.split == "heldout" for row in split) and any(row.split != "heldout" for row in split):
            return split, "user", dropped
    split, dropped = _split(rows, _by_completion(rows, heldout_share, past), newest, past)
    return split, "completion", dropped


def _by_completion(rows: Sequence[SnapshotRow], heldout_share: float, past: Past) -> list[bool]:
    """Which rows to hold out: those that were before, and of the new completions a share; at least one of them all."""
    positions = {
        row.completion_id: _position(f"completion:{row.completion_id}")
        for row in rows
        if row.completion_id not in past.learned
    }
    held = {id_ for id_, position in positions.items() if id_ in past.held_out or position < heldout_share}
    if not held and positions:
        held.add(min(positions, key=lambda id_: positions[id_]))
    return [row.completion_id in held for row in rows]


def _row(vote: Vote, not_before: float, seen: set[tuple[object, ...]]) -> SnapshotRow | DropReason:
    if vote.deleted_at is not None:
        if vote.correction is not None:  # empty by now, but what it replaced does not return
            _first(seen, _correction_of(vote))
        return DropReason.DELETED
    if vote.request is None or vote.choices is None or vote.number is None:
        return DropReason.UNKNOWN_COMPLETION
    if vote.created_at < not_before:
        return DropReason.TOO_OLD
    value, correction, reason = _standing(vote, seen)
    if reason is not None:
        return reason
    messages = _messages(vote)
    if isinstance(messages, DropReason):
        return messages
    answer = _answer(vote.choices, vote.choice_index)
    liked = None if value is None or value == NEUTRAL else value > NEUTRAL
    if isinstance(answer, DropReason) or (liked and answer.truncated):
        if correction is None:
            return answer if isinstance(answer, DropReason) else DropReason.TRUNCATED
        liked = None  # the vote cannot be learned from, the correction can
    return SnapshotRow(
        feedback_id=vote.id,
        completion_id=vote.completion_id,
        split="train",
        kind="rating" if correction is None else "correction",
        messages=messages,
        answer="" if isinstance(answer, DropReason) else answer.text,
        liked=liked,
        correction=correction,
        user_hash=vote.user,
        conversation=vote.conversation,
        number=vote.number,
        created_at=vote.created_at,
        source=vote.source,
    )


def _standing(
    vote: Vote, seen: set[tuple[object, ...]]
) -> tuple[float | None, str | None, None] | tuple[None, None, DropReason]:
    """The value and the correction of `vote` that still stand, or why neither does."""
    if vote.value is None and vote.correction is None:
        return None, None, DropReason.COMMENT_ONLY
    answer = (vote.completion_id, vote.choice_index, vote.user)
    value, correction = vote.value, vote.correction
    if value is not None and (not vote.counts or not _first(seen, ("value", vote.name, *answer))):
        value = None
    if correction is not None and not _first(seen, _correction_of(vote)):
        correction = None
    if value is None and correction is None:
        return None, None, DropReason.SUPERSEDED
    if vote.name != vote.rates_with:
        value = None
    if correction is None:
        if value is None:
            return None, None, DropReason.OTHER_NAME
        if value == NEUTRAL:
            return None, None, DropReason.NEUTRAL_VALUE
    return value, correction, None


def _correction_of(vote: Vote) -> tuple[object, ...]:
    """What two corrections share when the later one replaces the other."""
    return ("correction", vote.completion_id, vote.choice_index, vote.user)


def _first(seen: set[tuple[object, ...]], key: tuple[object, ...]) -> bool:
    if key in seen:
        return False
    seen.add(key)
    return True


def _messages(vote: Vote) -> list[dict[str, str]] | DropReason:
    """The conversation as role and text, or why it cannot be used."""
    assert vote.request is not None
    messages = vote.request.get("messages")
    if not isinstance(messages, list) or not messages:
        return DropReason.NOT_CHAT
    if vote.request.get("tools") or vote.request.get("functions"):
        return DropReason.TOOLS
    plain: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return DropReason.NOT_CHAT
        if message["role"] in ("tool", "function") or message.get("tool_calls"):
            return DropReason.TOOLS
        text = _plain_text(message.get("content"))
        if text is None:
            return DropReason.NOT_TEXT
        plain.append({"role": message["role"], "content": text})
    return DropReason.PREFILLED if plain[-1]["role"] == "assistant" else plain


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    truncated: bool


def _answer(choices: Sequence[Mapping[str, Any]], index: int) -> _Answer | DropReason:
    """The text of the choice with that index, or why it cannot be used."""
    choice = next((choice for choice in choices if choice.get("index", 0) == index), None)
    message = None if choice is None else choice.get("message")
    if choice is None or not isinstance(message, Mapping):
        return DropReason.NO_TEXT_ANSWER
    if message.get("tool_calls") or message.get("function_call"):
        return DropReason.TOOLS
    text = _plain_text(message.get("content"))
    if not text or not text.strip():
        return DropReason.NO_TEXT_ANSWER
    return _Answer(text, truncated=choice.get("finish_reason") in _BROKEN_OFF)


def _plain_text(content: Any) -> str | None:
    """`content` of a message as one string; None when part of it is not text."""
    if isinstance(content, str):
        return content.encode("utf-8", "replace").decode()  # half a surrogate pair would stop the tokenizer
    if not isinstance(content, list):
        return None
    parts = [_plain_text(part) if isinstance(part, str) else _part_text(part) for part in content]
    return None if any(part is None for part in parts) else "\n".join(part for part in parts if part is not None)


def _part_text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) and str(part.get("type", "")).endswith("text") else None
    return _plain_text(text) if isinstance(text, str) else None


def _unit(row: SnapshotRow) -> str:
    if row.user_hash is not None:
        return f"user:{row.user_hash}"
    return f"conversation:{row.conversation}" if row.conversation is not None else f"completion:{row.completion_id}"


def _position(unit: str) -> float:
    """A number in [0, 1) that depends on `unit` alone."""
    digest = hashlib.blake2b(f"heldout\0{unit}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _newest(rows: Sequence[SnapshotRow], share: float) -> frozenset[str]:
    """The completions of the newest `share` of the rows."""
    ordered = sorted(rows, key=lambda row: row.created_at)
    return frozenset(row.completion_id for row in ordered[len(rows) - int(len(rows) * share) :])


def _split(
    rows: Sequence[SnapshotRow], heldout: Sequence[bool], newest: frozenset[str], past: Past
) -> tuple[list[SnapshotRow], Counter[str]]:
    """The rows with their splits, without those that may be on no side, which are counted by reason."""
    judging = {
        row.completion_id
        for row, held in zip(rows, heldout, strict=True)
        if held and row.completion_id not in past.learned
    }

    def side(row: SnapshotRow, held: bool) -> Split | DropReason:
        if held:
            return "heldout" if row.completion_id in judging else DropReason.LEARNED
        if row.completion_id in newest:
            return "newest"
        return DropReason.JUDGES if row.completion_id in judging or row.completion_id in past.held_out else "train"

    split: list[SnapshotRow] = []
    dropped: Counter[str] = Counter()
    for row, held in zip(rows, heldout, strict=True):
        outcome = side(row, held)
        if isinstance(outcome, DropReason):
            dropped[outcome.value] += 1
        else:
            split.append(replace(row, split=outcome))
    return split, dropped
