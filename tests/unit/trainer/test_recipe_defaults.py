from __future__ import annotations

from typing import Any

import pytest

from scion_adapters.fingerprint import BaseInfo
from scion_adapters.settings import load_settings
from scion_trainer.config import RunConfig, run_config
from scion_trainer.defaults import dpo_epochs, hidden_size, kto_beta, kto_epochs, learning_rate, resolve


def base(hidden: int) -> BaseInfo:
    """A layer of a Llama whose heads together are narrower than the model."""
    shapes = {
        "q_proj": (hidden // 2, hidden),
        "k_proj": (hidden // 8, hidden),
        "v_proj": (hidden // 8, hidden),
        "o_proj": (hidden, hidden // 2),
        "up_proj": (3 * hidden, hidden),
        "down_proj": (hidden, 3 * hidden),
    }
    return BaseInfo("sha256:0", {f"model.layers.0.{name}": shape for name, shape in shapes.items()}, 100, 1)


def config(recipe: str, **kto: Any) -> RunConfig:
    return run_config(load_settings(overrides={"trainer": {"kto": kto}}), recipe)


def test_the_width_is_what_most_layers_take_in() -> None:
    assert hidden_size(base(4096)) == 4096
    assert hidden_size(BaseInfo("sha256:0", {}, 0, 0)) == 1


@pytest.mark.parametrize(
    ("recipe", "width", "low", "high"),
    [
        ("kto", 192, 1.8e-3, 2.2e-3),  # the demo's base: measured best
        ("kto", 4096, 5e-5, 1e-4),  # an 8B: within what is published for KTO with LoRA
        ("kto", 8192, 3e-5, 5e-5),  # a 70B
        ("sft", 192, 3e-3, 5e-3),  # measured best
        ("sft", 4096, 1.9e-4, 2.1e-4),  # QLoRA's 2e-4 for 7B and 13B
        ("sft", 8192, 0.9e-4, 1.1e-4),  # QLoRA's 1e-4 for 33B and 65B
    ],
)
def test_the_rate_falls_with_the_width(recipe: str, width: int, low: float, high: float) -> None:
    assert low < learning_rate(recipe, width) < high


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [
        (400, 4.0),  # a first round
        (1200, 2.0),  # three rounds together
        (100_000, 1.0),  # every rating is seen
        (0, 4.0),
    ],
)
def test_many_ratings_need_fewer_passes(examples: int, epochs: float) -> None:
    assert kto_epochs(examples) == epochs


@pytest.mark.parametrize(("pairs", "epochs"), [(180, 8.0), (600, 4.0), (5000, 1.0), (0, 8.0)])
def test_few_pairs_are_seen_more_often(pairs: int, epochs: float) -> None:
    assert dpo_epochs(pairs) == epochs
    found = resolve(config("dpo"), base(192), num_examples=pairs, mean_answer_tokens=15.0)
    assert (found.epochs, found.learning_rate) == (epochs, learning_rate("kto", 192))


@pytest.mark.parametrize(
    ("tokens", "beta"),
    [
        (15, 1.0),  # short answers
        (200, 0.1),  # the paper's value
        (1000, 0.02),
        (0, 1.0),  # no answers: nothing is divided by zero
    ],
)
def test_beta_falls_with_the_length_of_answers(tokens: float, beta: float) -> None:
    assert kto_beta(tokens) == pytest.approx(beta)


def test_what_is_set_stays_set() -> None:
    found = resolve(
        config("kto", learning_rate=3e-4, beta=0.3, epochs=7), base(192), num_examples=400, mean_answer_tokens=15
    )
    assert (found.learning_rate, found.options["beta"], found.epochs) == (3e-4, 0.3, 7)


def test_what_is_open_is_filled_in() -> None:
    found = resolve(config("kto"), base(190), num_examples=400, mean_answer_tokens=40)
    assert (found.learning_rate, found.options["beta"], found.epochs) == pytest.approx((2e-3, 0.5, 4.0))
    sft = resolve(config("sft"), base(4000), num_examples=400, mean_answer_tokens=40)
    assert (sft.learning_rate, sft.epochs) == pytest.approx((2e-4, 3.0))


def test_a_run_begun_before_there_were_options_keeps_its_beta() -> None:
    old = {**config("kto").to_json(), "beta": 0.3}
    del old["options"]
    assert RunConfig.from_json(old).options == {"beta": 0.3}
    assert RunConfig.from_json(config("kto", beta=0.2).to_json()) == config("kto", beta=0.2)
