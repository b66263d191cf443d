"""What `auto` chooses, and the reasons it gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_trainer.recipes.auto import Counts, choose, count
from tests.helpers.training import snapshot_row


def counts(liked: int = 0, disliked: int = 0, corrections: int = 0, pairs: int = 0) -> Counts:
    return Counts(liked, disliked, corrections, pairs)


@pytest.mark.parametrize(
    ("found", "has_reward_model", "recipe", "said"),
    [
        (counts(corrections=90), False, "sft", "nothing is disliked"),  # corrections only
        (counts(liked=90, corrections=9), False, "sft", "nothing is disliked"),  # likes only: kto would refuse
        (counts(liked=40, disliked=60), False, "kto", "single thumbs"),
        (counts(liked=40, disliked=60, corrections=60), False, "kto", "60 corrected"),  # kto learns from both
        (counts(disliked=60), False, "kto", "0 liked, 60 disliked"),  # and kto says what is missing
        (counts(liked=40, disliked=60, pairs=50), False, "dpo", "at least half"),  # real pairs
        (counts(liked=40, disliked=60, pairs=39), False, "kto", "single thumbs"),  # one pair too few
        (counts(liked=400, disliked=600, pairs=50), False, "kto", "less than half"),  # dpo would waste 900 thumbs
        (counts(liked=400, disliked=600), True, "ppo", "1000 ratings are at least 500"),
        (counts(liked=400, disliked=600), False, "kto", "single thumbs"),  # no reward model that passed
        (counts(liked=40, disliked=60), True, "kto", "fewer than 500 ratings for ppo"),
        (counts(liked=600), True, "sft", "nothing is disliked"),  # a reward model cannot come from likes alone
    ],
)
def test_the_choice_follows_the_ratings_and_says_why(
    found: Counts, has_reward_model: bool, recipe: str, said: str
) -> None:
    choice = choose(found, has_reward_model, min_pairs=40, ppo_min_ratings=500)
    assert choice.recipe == recipe
    assert said in choice.why


def test_rows_are_counted_by_kind_and_corrections_are_no_pairs() -> None:
    row = snapshot_row(answer="hello", liked=True)
    rows = [
        row,
        replace(row, answer="go away", liked=False),
        replace(row, liked=None, correction="good day", messages=[{"role": "user", "content": "hey"}]),
    ]
    assert count(rows) == counts(liked=1, disliked=1, corrections=1, pairs=1)
