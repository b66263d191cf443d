"""Preference pairs in a snapshot: corrections over answers, and answers to one prompt that were judged apart.

Pure. It knows nothing of losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from scion_trainer.recipes.recipe import Example

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow


def find_pairs(rows: Iterable[SnapshotRow]) -> list[Example]:
    """All pairs: `completion` is preferred to `rejected`."""
    rows = list(rows)
    return [*correction_pairs(rows), *judged_pairs(rows)]


def correction_pairs(rows: Iterable[SnapshotRow]) -> list[Example]:
    """A correction is preferred to the answer that it replaces."""
    return [
        Example(tuple(row.messages), row.correction, rejected=row.answer, raters=(rater(row),))
        for row in rows
        if row.correction and row.answer and row.correction.strip() != row.answer.strip()
    ]


def judged_pairs(rows: Iterable[SnapshotRow]) -> list[Example]:
    """Of the answers to the same messages each liked one is preferred to a disliked one.

    As many pairs as the more frequent kind has answers, so that one prompt that was asked often does not outweigh the
    others. An answer that some liked and others did not is evidence of neither and is left out.
    """
    by_prompt: dict[str, tuple[SnapshotRow, dict[str, set[bool]]]] = {}
    rater_of: dict[tuple[str, str], str] = {}
    for row in rows:
        if row.liked is not None and row.answer:
            prompt = json.dumps(row.messages, sort_keys=True)
            _, votes = by_prompt.setdefault(prompt, (row, {}))
            votes.setdefault(row.answer, set()).add(row.liked)
            rater_of.setdefault((prompt, row.answer), rater(row))
    pairs: list[Example] = []
    for prompt, (first, votes) in by_prompt.items():
        liked = [answer for answer, seen in votes.items() if seen == {True}]
        disliked = [answer for answer, seen in votes.items() if seen == {False}]
        if liked and disliked:
            for i in range(max(len(liked), len(disliked))):
                better, worse = liked[i % len(liked)], disliked[i % len(disliked)]
                raters = tuple(dict.fromkeys(rater_of[prompt, answer] for answer in (better, worse)))
                pairs.append(Example(tuple(first.messages), better, rejected=worse, raters=raters))
    return pairs


def rater(row: SnapshotRow) -> str:
    """Who judged: a vote without a user stands for itself."""
    return row.user_hash or row.feedback_id
