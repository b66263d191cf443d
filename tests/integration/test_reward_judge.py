"""The reward model as the win rate's judge: who is opened, and that real members decide, whatever the order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.fingerprint import base_info
from scion_adapters.settings import load_settings
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import ChatTokens, load_chat_tokens
from scion_trainer.config import run_config
from scion_trainer.judges import TIE, EndpointJudge, Judge, Pair
from scion_trainer.lora import start_adapter
from scion_trainer.reward.calibration import Platt
from scion_trainer.reward.files import save_weights
from scion_trainer.reward.model import Head, RewardModel
from scion_trainer.reward.store import DIRECTORY, GATE_METRIC, write_reward_model
from scion_trainer.reward_judge import RewardJudge, open_judge
from scion_trainer.roles import Roles, reward_role
from scion_trainer.runs import RunStore
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=build_tiny_model(tmp_path / "base"))
    yield project
    project.database.dispose()


def opened(project: Project, tokens: ChatTokens) -> Judge | None:
    fingerprint = base_info(project.settings).fingerprint
    return open_judge(project.settings, project.database, "chat", base_fingerprint=fingerprint, tokens=tokens)


def untrained_reward_model(project: Project, *, verdict: str) -> RewardModel:
    """Two members with random heads, stored as a run that ended with `verdict` would have left them."""
    runs, config = RunStore(project.database), run_config(project.settings, "reward")
    run = runs.create("chat", config, parent=0, directory=project.directory / "run", actor="test")
    peft_model, _ = start_adapter(load_base(project.settings), config, None)
    roles = Roles(peft_model)
    for member in range(2):
        roles.add(reward_role(member))
    model = RewardModel(roles, [Head(64), Head(64)])
    write_reward_model(
        Path(run.directory) / DIRECTORY,
        lambda folder: save_weights(model, folder),
        base_fingerprint=base_info(project.settings).fingerprint,
        base_quantization="nf4",
        rank=config.rank,
        num_members=2,
        disagreement_penalty=1.0,
        calibration=Platt(),
        gate={"verdict": verdict},
    )
    runs.succeed(run.id, candidate=None, metrics={GATE_METRIC: {"verdict": verdict}})
    return model


def test_the_stored_members_decide_and_the_order_does_not(project: Project) -> None:
    model = untrained_reward_model(project, verdict="pass")
    tokens = load_chat_tokens(project.settings)
    judge = opened(project, tokens)
    assert isinstance(judge, RewardJudge)
    messages = [{"role": "user", "content": "what is 7?"}]
    texts = ["seven", "it is blue.", "a", "no!"]
    sequences = [[*tokens.prompt(messages), *tokens.answer(text)] for text in texts]
    rewards = model.penalised(model.score_sequences(sequences)).tolist()
    pairs = [(i, j) for i in range(4) for j in range(4)]
    verdicts = judge.prefer([Pair(messages, texts[i], texts[j]) for i, j in pairs])
    judge.close()
    expected = [TIE if i == j else float(rewards[i] > rewards[j]) for i, j in pairs]
    assert verdicts == expected


def test_a_reward_model_that_did_not_pass_judges_nothing(project: Project) -> None:
    tokens = load_chat_tokens(project.settings)
    assert opened(project, tokens) is None
    untrained_reward_model(project, verdict="inconclusive")
    assert opened(project, tokens) is None


def test_a_configured_endpoint_comes_first(project: Project) -> None:
    untrained_reward_model(project, verdict="pass")
    settings = load_settings(project.file, overrides={"gates": {"judge_url": "http://judge/v1"}})
    judge = open_judge(
        settings, project.database, "chat", base_fingerprint="any", tokens=load_chat_tokens(project.settings)
    )
    assert isinstance(judge, EndpointJudge)
    judge.close()
