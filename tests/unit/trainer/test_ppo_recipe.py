"""The PPO recipe: its prompts, what it refuses, how long it goes on, and which reward model it holds on to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.settings import load_settings
from scion_trainer.config import run_config
from scion_trainer.defaults import ppo_epochs
from scion_trainer.ppo.options import PpoOptions
from scion_trainer.ppo.ppo import prompts_of_step
from scion_trainer.recipes.ppo import PpoRecipe, num_steps
from scion_trainer.reward.store import pinned_reward_model
from tests.helpers.training import snapshot_row

CONFIG = run_config(load_settings(), "ppo")


def test_every_rated_prompt_is_used_once_whatever_its_rating() -> None:
    ask = [{"role": "user", "content": "hi"}]
    other = [{"role": "user", "content": "who?"}]
    rows = [
        snapshot_row(messages=ask, liked=True),
        snapshot_row(messages=ask, liked=False),
        snapshot_row(messages=other, liked=False),
        snapshot_row(messages=other, liked=None, correction="me"),
    ]
    assert [example.prompt for example in PpoRecipe().examples(rows)] == [tuple(ask), tuple(other)]


def test_too_few_prompts_are_refused_with_the_remedy() -> None:
    examples = PpoRecipe().examples([snapshot_row()])
    with pytest.raises(InvalidInputError, match=r"1 different prompts.*ppo needs 8.*--recipe kto"):
        PpoRecipe().check(examples, CONFIG)


@pytest.mark.parametrize(
    ("prompts", "epochs", "steps"),
    [
        (64, 1.0, 1),  # one round has them all
        (65, 1.0, 2),  # rounded up
        (100, 8.0, 13),  # several passes
        (1, 0.1, 1),  # at least one
    ],
)
def test_steps_cover_the_epochs(prompts: int, epochs: float, steps: int) -> None:
    assert num_steps(prompts, replace(CONFIG, epochs=epochs)) == steps


def test_few_prompts_are_answered_more_often() -> None:
    assert [ppo_epochs(count) for count in (1, 400, 10_000)] == [8.0, 4.0, 1.0]


def test_the_settings_reach_the_algorithm() -> None:
    options = PpoOptions.of({**CONFIG.options, "clip": 0.1, "unknown": 1}, steps=1, batch_size=8, learning_rate=1e-3)
    assert (options.clip, options.max_tokens, options.dual_clip) == (0.1, 128, 3.0)


def test_settings_and_options_have_the_same_defaults() -> None:
    plain = PpoOptions(steps=1, batch_size=8, learning_rate=1e-3, max_tokens=128)
    assert PpoOptions.of(CONFIG.options, steps=1, batch_size=8, learning_rate=1e-3) == plain


def test_a_pass_has_every_prompt_once_and_each_pass_its_own_order() -> None:
    prompts = [(number,) for number in range(10)]
    steps = [prompts_of_step(prompts, step, 4, seed=0) for step in range(5)]
    flat = [prompt for step in steps for prompt in step]
    assert sorted(map(tuple, flat[:10])) == sorted(map(tuple, flat[10:])) == prompts
    assert flat[:10] != flat[10:]
    assert prompts_of_step(prompts, 3, 4, seed=0) == steps[3]  # as a resumed run asks for it
    assert prompts_of_step(prompts, 3, 4, seed=1) != steps[3]


def test_a_run_keeps_the_reward_model_it_began_with(tmp_path: Path) -> None:
    run, first, newer = tmp_path / "run", tmp_path / "first", tmp_path / "newer"
    for directory in (run, first, newer):
        directory.mkdir()
    assert pinned_reward_model(run, first) == first
    assert pinned_reward_model(run, newer) == first  # resumed, after another passed its gate
    shutil.rmtree(first)
    with pytest.raises(NotFoundError, match="is gone: start a new run"):
        pinned_reward_model(run, newer)


def test_without_a_reward_model_the_remedy_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"scion train NAME --recipe reward.*--recipe kto"):
        pinned_reward_model(tmp_path, None)
