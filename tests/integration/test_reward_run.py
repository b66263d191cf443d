"""Reward runs on a tiny random base in NF4: votes in the database in, a judged reward model out."""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scion_adapters.errors import InvalidInputError, RejectedError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Run, RunState
from scion_adapters.registry import open_registry
from scion_adapters.settings import load_settings
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.config import RunConfig
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.lora import start_adapter
from scion_trainer.progress import read_metrics
from scion_trainer.reward.files import load_reward_model
from scion_trainer.reward.store import GATE_METRIC, newest_reward_model, read_manifest
from scion_trainer.roles import Roles
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_project, number_question


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


def words(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))


def likes_exclamations(rng: random.Random) -> tuple[str, str, bool]:
    """What is said before the mark, and how much, has no part in it."""
    question, liked = number_question(rng), rng.random() < 0.5
    return question, words(rng, rng.randint(2, 12)) + ("!" if liked else "."), liked


def likes_length(rng: random.Random) -> tuple[str, str, bool]:
    """The longer, the likelier to be liked."""
    question, length = number_question(rng), rng.randint(2, 30)
    return question, words(rng, length) + ".", rng.random() < 1 / (1 + math.exp((16 - length) / 3))


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Iterator[Project]:
    project = make_project(
        tmp_path,
        base=base,
        trainer__heldout_share=0.3,
        trainer__reward__learning_rate=0.02,
        trainer__reward__epochs=3,
        trainer__reward__batch_size=16,
    )
    yield project
    project.database.dispose()


def train(project: Project, said: Callable[[random.Random], tuple[str, str, bool]], count: int = 240) -> Run:
    add_ratings(project.database, count, said=said)
    run = create_run(project.settings, project.database, "chat", "reward", actor="test")
    assert execute(project.settings, project.database, run.id) is None
    return RunStore(project.database).get(run.id)


def newest(project: Project, fingerprint: str | None = None) -> Path | None:
    return newest_reward_model(project.database, "chat", fingerprint or base_info(project.settings).fingerprint)


def test_a_planted_preference_is_told_on_users_not_trained_on(project: Project) -> None:
    run = train(project, likes_exclamations)

    gate = run.metrics[GATE_METRIC]
    assert gate["verdict"] == "pass", gate["reason"]
    assert gate["figures"]["auroc"] > 0.9
    assert gate["figures"]["users"] >= 4
    assert (run.state, run.candidate) == (RunState.SUCCEEDED, None)
    assert open_registry(project.settings, project.database).versions("chat") == []  # nothing that could be served
    assert run.metrics["steps"] == len(read_metrics(Path(run.directory)))
    assert run.metrics["members"] == 2

    directory = newest(project)
    assert directory == Path(run.directory) / "reward_model"
    assert newest(project, "sha256:of another base") is None
    assert sorted(path.name for path in directory.iterdir()) == [
        "heads.safetensors",
        "member-0",
        "member-1",
        "reward.json",
    ]
    assert str(project.directory) not in (directory / "member-0" / "adapter_config.json").read_text()


def test_what_was_saved_scores_as_it_was_trained(project: Project) -> None:
    run = train(project, likes_exclamations)
    directory = newest(project)
    assert directory is not None
    loaded = load_base(project.settings)
    model, _ = start_adapter(loaded, RunConfig.from_json(run.config), None)
    roles = Roles(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    reward = load_reward_model(roles, directory, base_fingerprint=base_info(project.settings).fingerprint)
    tokens = ChatTokens(loaded.tokenizer)
    prompt = tokens.prompt([{"role": "user", "content": "what is 7?"}])
    sequences = [[*prompt, *tokens.answer(text)] for text in ("abc!", "abc.", "abcdefgh!", "abcdefgh.")]
    scores_NK = reward.score_sequences(sequences)
    penalised = reward.penalised(scores_NK)
    assert scores_NK.shape == (4, 2)
    assert scores_NK.dtype is torch.float32
    assert min(penalised[0], penalised[2]) > max(penalised[1], penalised[3])
    assert torch.all(penalised < scores_NK.mean(dim=1))
    with roles.use("policy", train=True):  # scoring left the policy's role as it was
        assert [parameter.requires_grad for name, parameter in model.named_parameters() if ".default." in name] == [
            True
        ] * sum(trainable)


def test_a_preference_for_length_does_not_pass(project: Project) -> None:
    run = train(project, likes_length, count=300)
    gate = run.metrics[GATE_METRIC]
    assert gate["figures"]["auroc"] > 0.8  # users do like it, and the model tells: that is the trap
    assert gate["figures"]["length_correlation"] > 0.7
    assert gate["verdict"] == "fail"
    assert "length_correlation" in gate["reason"]
    assert newest(project) is None


def test_a_stopped_run_ends_as_one_that_was_not_stopped(project: Project) -> None:
    whole = train(project, likes_exclamations, count=120)
    for stop_after in (2, whole.metrics["steps"] // 2 + 2):  # in the first member, and in the second
        run = create_run(project.settings, project.database, "chat", "reward", actor="test")
        directory = Path(run.directory)
        with pytest.raises(RunInterruptedError, match="is in a checkpoint"):
            execute(
                project.settings,
                project.database,
                run.id,
                stop_requested=lambda directory=directory, n=stop_after: len(read_metrics(directory)) >= n,
            )
        assert execute(project.settings, project.database, run.id) is None
        resumed = RunStore(project.database).get(run.id)
        assert resumed.attempt == 2
        steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, whole.metrics["steps"] + 1))  # none was done twice
        assert resumed.metrics["reward_digest"] == whole.metrics["reward_digest"]


class KilledError(BaseException):
    """As `kill -9`: nothing is caught, and nothing is written."""


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_end(project: Project) -> None:
    whole = train(project, likes_exclamations, count=120)
    run = create_run(project.settings, project.database, "chat", "reward", actor="test")
    directory = Path(run.directory)

    def killed_in_the_second_member() -> bool:
        if len(read_metrics(directory)) >= whole.metrics["steps"] // 2 + 2:
            raise KilledError
        return False

    with pytest.raises(KilledError):
        execute(project.settings, project.database, run.id, stop_requested=killed_in_the_second_member)
    assert execute(project.settings, project.database, run.id) is None
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) > whole.metrics["steps"]  # what came after the checkpoint was done again
    assert RunStore(project.database).get(run.id).metrics["reward_digest"] == whole.metrics["reward_digest"]


def test_a_reward_model_whose_files_changed_is_refused(project: Project) -> None:
    train(project, likes_exclamations, count=120)
    directory = next(project.directory.glob("artifacts/runs/*/reward_model"))
    with pytest.raises(InvalidInputError, match="trained on the base"):
        read_manifest(directory, base_fingerprint="sha256:other")
    weights = directory / "member-1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RejectedError, match=r"damaged.*recipe reward"):
        read_manifest(directory)


def test_votes_of_one_kind_are_refused_before_the_base_is_loaded(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scion_trainer.base.load_base", lambda *_: pytest.fail("the base was loaded"))
    add_ratings(project.database, 40, liked_share=1.0)
    run = create_run(project.settings, project.database, "chat", "reward", actor="test")
    with pytest.raises(InvalidInputError, match="learns from the difference"):
        execute(project.settings, project.database, run.id)


def test_members_begin_at_the_champion(project: Project, tmp_path: Path) -> None:
    """A parent's weights are where the members start, so that they know its answers from the first step."""
    from tests.integration.test_training_run import make_champion

    add_ratings(project.database, 80, said=likes_exclamations)
    first = create_run(project.settings, project.database, "chat", "kto", actor="test")
    version = execute(project.settings, project.database, first.id)
    assert version is not None
    make_champion(project, version.ref)
    still: dict[str, Any] = {"trainer": {"reward": {"learning_rate": 1e-12, "epochs": 0.5}}}
    settings = load_settings(project.file, overrides=still)
    run = create_run(settings, project.database, "chat", "reward", actor="test")
    execute(settings, project.database, run.id)

    from safetensors.torch import load_file

    export = load_file(str(Path(first.directory) / "export" / "adapter_model.safetensors"))
    member = load_file(str(Path(run.directory) / "reward_model" / "member-0" / "adapter_model.safetensors"))
    assert set(member) == set(export)
    assert all(torch.allclose(member[name], export[name].float(), atol=1e-6) for name in export)
