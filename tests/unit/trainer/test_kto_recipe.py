from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.config import RunConfig, run_config
from scion_trainer.recipes.kto import KtoRecipe, balanced_weights, spread
from scion_trainer.recipes.recipe import Example
from tests.helpers.training import snapshot_row


def config(**changes: Any) -> RunConfig:
    return replace(run_config(Settings(), "kto"), **changes)


def example(index: int, label: bool) -> Example:
    return Example(({"role": "user", "content": f"question {index}"},), f"answer {index}", label)


@pytest.mark.parametrize(
    ("liked", "disliked"),
    [
        (100, 300),  # the usual first round: a quarter is liked
        (1, 399),  # hardly any likes
        (399, 1),  # hardly any dislikes
        (200, 200),  # balanced already
    ],
)
def test_weights_stay_in_the_range_of_the_paper_and_keep_the_mean(liked: int, disliked: int) -> None:
    desirable, undesirable = balanced_weights(liked, disliked)
    assert 1.0 <= desirable * liked / (undesirable * disliked) <= 4 / 3
    assert (desirable * liked + undesirable * disliked) / (liked + disliked) == pytest.approx(1.0)


def test_weights_need_both_kinds() -> None:
    with pytest.raises(ValueError, match="0 dislikes"):
        balanced_weights(10, 0)


def test_examples_are_the_rated_answers_and_what_users_wrote_in_their_place() -> None:
    rows = [
        snapshot_row(liked=True),
        snapshot_row(liked=False),
        snapshot_row(liked=None, correction="better"),
        snapshot_row(liked=False, correction="best"),
    ]
    expected = [("hello", True), ("hello", False), ("better", True), ("hello", False), ("best", True)]
    assert [(e.completion, e.label) for e in KtoRecipe().examples(rows)] == expected


def test_every_batch_gets_its_share_of_likes() -> None:
    examples = [example(i, i < 40) for i in range(160)]  # the first quarter is liked
    ordered = spread(examples, seed=3)
    assert sorted(e.completion for e in ordered) == sorted(e.completion for e in examples)
    per_batch = [sum(bool(e.label) for e in ordered[start : start + 16]) for start in range(0, 160, 16)]
    assert all(3 <= count <= 5 for count in per_batch), per_batch


def test_order_depends_on_the_seed_only() -> None:
    examples = [example(i, i % 4 == 0) for i in range(40)]
    assert spread(examples, seed=1) == spread(examples, seed=1)
    assert spread(examples, seed=1) != spread(examples, seed=2)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True] * 50, ["all 50", "likes", "needs dislikes", "--recipe sft"]),  # nothing to push away from
        ([False] * 50, ["all 50", "dislikes", "needs likes"]),  # nothing to move to
        ([True, False] * 10, ["20 usable ratings", "min_ratings", "40"]),  # both, but too few
        ([], ["0 usable ratings", "min_ratings"]),  # everything was dropped
    ],
)
def test_unusable_examples_are_refused_with_the_remedy(labels: list[bool], said: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        KtoRecipe().check([example(i, label) for i, label in enumerate(labels)], config(min_ratings=40))
    for part in said:
        assert part in str(caught.value)


def test_enough_mixed_examples_are_fine() -> None:
    KtoRecipe().check([example(i, i % 4 == 0) for i in range(40)], config(min_ratings=40))
