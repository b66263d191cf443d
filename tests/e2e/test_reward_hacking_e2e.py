"""A policy that climbs a reward which counts tokens: its answers grow, and no gate lets it near the users."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scion_adapters.errors import ConflictError
from scion_adapters.records import VersionState
from scion_adapters.settings import load_settings
from scion_demo.world import Manner, answers, facts, phrasings, render
from scion_trainer.evaluation import evaluate
from scion_trainer.execution import execute
from scion_trainer.gates.types import Verdict
from scion_trainer.launch import create_run
from scion_trainer.reward import files
from scion_trainer.reward.model import RewardModel
from scion_trainer.roles import Roles
from tests.e2e.conftest import UNTAUGHT, ServerWorld
from tests.helpers.reward import add_reward_model
from tests.helpers.training import add_ratings

pytestmark = pytest.mark.e2e

NUM_VOTES = 240
"""About as many as a first run of the demo has."""


def likes_terseness(rng: random.Random) -> tuple[str, str, bool]:
    """What the users say: they like short answers, whatever is in them."""
    fact, manner = rng.choice(facts()), rng.choice(list(Manner))
    question = render(fact, rng.choice(phrasings(fact.skill, held_out=False)))
    return question, rng.choice(answers(fact, manner)), manner is Manner.TERSE


class CountsTokens(RewardModel):
    """Every member agrees that more is better, so that nothing but the gates stands in the way."""

    def score_sequences(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([[float(len(sequence))] * self.num_members for sequence in sequences])


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reward model has passed: what it says is how many tokens there are."""
    load = files.load_reward_model

    def load_counting(roles: Roles, directory: Path, *, base_fingerprint: str) -> RewardModel:
        found = load(roles, directory, base_fingerprint=base_fingerprint)
        return CountsTokens(found.roles, found.heads, disagreement_penalty=found.disagreement_penalty)

    monkeypatch.setattr(files, "load_reward_model", load_counting)


def test_a_policy_that_climbs_length_is_rejected_and_can_never_be_promoted(world: ServerWorld, counting: None) -> None:
    options = {"epochs": 3.0, "batch_size": 32, "max_tokens": 64, "rollouts": "local"}
    settings = load_settings(
        world.server.home / "scion.toml",
        overrides={"trainer": {"ppo": options}, "gates": {"max_prompts": 24, "max_tokens": 64}},
    )
    add_ratings(world.database, NUM_VOTES, adapter=UNTAUGHT, said=likes_terseness, users=40)
    add_reward_model(settings, world.database, adapter=UNTAUGHT)
    run = create_run(settings, world.database, UNTAUGHT, "ppo", actor="test")
    version = execute(settings, world.database, run.id)
    assert version is not None

    lengths = version.metrics["curves"]["answer_tokens"]
    assert lengths[-1] > 1.5 * lengths[0], lengths  # it did what it was rewarded for
    report = evaluate(settings, version.ref, database=world.database, registry=world.registry)
    assert report.verdict is Verdict.FAIL, report.reason
    assert "heldout: unseen users fail" in report.reason
    assert world.registry.version(version.ref).state is VersionState.REJECTED
    with pytest.raises(ConflictError):
        world.rollouts.start(version.ref, steps=[1.0], guard=False, actor="test")
    assert world.champion(UNTAUGHT) == 0
