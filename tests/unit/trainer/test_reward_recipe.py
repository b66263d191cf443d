from __future__ import annotations

from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.records import Run, RunState
from scion_adapters.settings import Settings
from scion_trainer.config import run_config
from scion_trainer.followup import reward_product
from scion_trainer.gates.types import Verdict
from scion_trainer.recipes import RECIPES
from scion_trainer.recipes.recipe import Example
from scion_trainer.recipes.reward import RewardRecipe
from scion_trainer.reward.store import GATE_METRIC
from tests.helpers.training import snapshot_row

PROMPT = ({"role": "user", "content": "hi"},)


def test_thumbs_corrections_and_judged_pairs_are_all_examples_with_their_raters() -> None:
    rows = [
        snapshot_row(answer="good", liked=True, user_hash="a"),
        snapshot_row(answer="bad", liked=False, user_hash="b"),
        snapshot_row(answer="bad", liked=False, kind="correction", correction="better", user_hash="c"),
        snapshot_row(
            answer="alone", liked=None, kind="correction", correction="rather", feedback_id="fb-9", user_hash=None
        ),
    ]
    assert RewardRecipe().examples(rows) == [
        Example(PROMPT, "good", True, raters=("a",)),
        Example(PROMPT, "bad", False, raters=("b",)),
        Example(PROMPT, "bad", False, raters=("c",)),
        Example(PROMPT, "better", rejected="bad", raters=("c",)),
        Example(PROMPT, "rather", rejected="alone", raters=("fb-9",)),  # a vote without a user stands for itself
        Example(PROMPT, "good", rejected="bad", raters=("a", "b")),
    ]


def check(*examples: Example) -> None:
    RewardRecipe().check(list(examples), run_config(Settings(trainer={"min_ratings": 2}), "reward"))


def test_pairs_or_both_kinds_of_thumbs_are_needed() -> None:
    like, dislike = Example(PROMPT, "good", True), Example(PROMPT, "bad", False)
    pair = Example(PROMPT, "good", rejected="bad")
    check(like, dislike)
    check(pair, pair)
    check(like, pair)
    with pytest.raises(InvalidInputError, match="2 likes, 0 dislikes and no pairs"):
        check(like, like)
    with pytest.raises(InvalidInputError, match=r"1 usable thumbs and pairs.*asks for 2"):
        check(pair)


def test_its_run_has_the_settings_of_its_own() -> None:
    options = run_config(Settings(), "reward").options
    assert (options["members"], options["disagreement_penalty"], options["min_auroc"]) == (3, 1.0, 0.6)
    assert not RECIPES["reward"].makes_version
    assert RECIPES["kto"].makes_version


def run(**metrics: Any) -> Run:
    return Run("run-1", "chat", "reward", RunState.SUCCEEDED, 0, {}, metrics, "/runs/run-1", 1, "me", 0.0, 0.0)


@pytest.mark.parametrize(
    ("verdict", "next_command", "exit_code"),
    [
        ("pass", "scion train chat --recipe ppo", 0),
        ("inconclusive", "scion runs show run-1", 0),  # more ratings may tell
        ("fail", "scion runs show run-1", 9),
    ],
)
def test_what_is_said_of_a_reward_model(verdict: str, next_command: str, exit_code: int) -> None:
    gate = {"verdict": verdict, "reason": "because", "figures": {"auroc": 0.9}}
    product = reward_product(run(**{GATE_METRIC: gate, "reward_model": "/runs/run-1/reward_model"}))
    assert product is not None
    assert (product.verdict, product.next) == (Verdict(verdict), next_command)
    assert (product.exit_code != 0) == (exit_code != 0)


def test_a_run_that_made_a_version_made_no_reward_model() -> None:
    assert reward_product(run(rows=40)) is None
