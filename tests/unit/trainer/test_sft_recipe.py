from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_feedback.selection import SnapshotRow
from scion_trainer.config import run_config
from scion_trainer.recipes import RECIPES
from scion_trainer.recipes.sft import SftRecipe
from tests.helpers.training import snapshot_row

LIKED = snapshot_row()


@pytest.mark.parametrize(
    ("row", "completions"),
    [
        (LIKED, ["hello"]),  # a liked answer is worth repeating
        (replace(LIKED, liked=False), []),  # a disliked one is not
        (replace(LIKED, liked=False, correction="good day"), ["good day"]),  # the correction instead of the answer
        (replace(LIKED, liked=True, correction="good day"), ["good day"]),  # also when both came
        (replace(LIKED, liked=None, correction="good day"), ["good day"]),  # a correction without a thumb
    ],
)
def test_examples_are_corrections_and_liked_answers(row: SnapshotRow, completions: list[str]) -> None:
    found = SftRecipe().examples([row])
    assert [example.completion for example in found] == completions
    assert all(example.label is None and "label" not in example.to_row() for example in found)


def test_too_few_examples_are_refused_with_the_remedy() -> None:
    examples = SftRecipe().examples([LIKED] * 3)
    with pytest.raises(InvalidInputError, match=r"3 corrections and liked answers.*min_ratings asks for 40.*kto"):
        SftRecipe().check(examples, run_config(Settings(), "sft"))


def test_the_registry_names_each_recipe_as_it_names_itself() -> None:
    assert {"sft", "kto", "dpo"} <= set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())
