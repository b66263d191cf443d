"""Which rows make pairs, and when they are too few. Training itself is in tests/integration/test_dpo_run.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_feedback.selection import SnapshotRow
from scion_trainer.config import run_config
from scion_trainer.recipes.dpo import DpoRecipe, likelihood_weight
from scion_trainer.recipes.recipe import Example
from tests.helpers.training import snapshot_row

LIKED = snapshot_row(answer="hello", liked=True)
DISLIKED = snapshot_row(answer="go away", liked=False)
OTHER_PROMPT = [{"role": "user", "content": "who are you?"}]


def pairs(*rows: SnapshotRow) -> list[tuple[str, str | None]]:
    return [(example.completion, example.rejected) for example in DpoRecipe().examples(rows)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([LIKED], []),  # one thumb alone prefers nothing
        ([LIKED, DISLIKED], [("hello", "go away")]),  # two answers to one prompt
        ([LIKED, replace(DISLIKED, messages=OTHER_PROMPT)], []),  # to different prompts
        ([replace(LIKED, liked=None, correction="good day")], [("good day", "hello")]),  # a correction
        ([replace(DISLIKED, correction="good day")], [("good day", "go away")]),  # with its thumb: one pair, not two
        ([replace(LIKED, liked=None, correction=" hello ")], []),  # corrected to itself
        ([replace(LIKED, liked=None, answer="", correction="good day")], []),  # the answer was no text
        ([LIKED, replace(LIKED, liked=False), DISLIKED], []),  # "hello": some liked it, others did not
        (
            [LIKED, DISLIKED, replace(DISLIKED, answer="hm"), replace(DISLIKED, answer="no")],
            [("hello", "go away"), ("hello", "hm"), ("hello", "no")],  # as many as the more frequent kind
        ),
        ([LIKED, LIKED, DISLIKED], [("hello", "go away")]),  # the same answer, liked twice
    ],
)
def test_pairs_are_corrections_and_answers_judged_apart(
    rows: list[SnapshotRow], expected: list[tuple[str, str | None]]
) -> None:
    assert pairs(*rows) == expected


def test_a_pair_is_a_row_of_trl() -> None:
    (example,) = DpoRecipe().examples([LIKED, DISLIKED])
    assert example.to_row() == {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "go away"}],
    }


def test_too_few_pairs_are_refused_with_the_remedy() -> None:
    example = Example(({"role": "user", "content": "hi"},), "hello", rejected="no")
    config = replace(run_config(Settings(), "dpo"), min_ratings=3)
    DpoRecipe().check([example] * 3, config)
    with pytest.raises(InvalidInputError, match=r"2 preference pairs.*min_ratings asks for 3.*--recipe kto"):
        DpoRecipe().check([example] * 2, config)


def test_the_likelihood_counts_as_in_kto() -> None:
    """Per token in TRL, per answer in KTO: weight 1 at beta 0.1 and 200 tokens is 20 times the token mean."""
    assert likelihood_weight(1.0, 0.1, 200.0) == pytest.approx(20.0)
    assert likelihood_weight(0.0, 0.1, 200.0) == 0.0
