"""PPO on a tiny NF4 base with a reward that is a function: it learns, resumes exactly, stops, and keeps its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scion_adapters.errors import ScionError
from scion_trainer import checkpoints
from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.ppo import ppo as ppo_module
from scion_trainer.ppo import state as state_module
from scion_trainer.ppo.ppo import train
from scion_trainer.ppo.state import FILE, State, seed_for
from scion_trainer.progress import read_metrics
from scion_trainer.reward.model import Head
from scion_trainer.roles import BASE, POLICY, REFERENCE, VALUE, Roles, reward_role
from scion_trainer.rollouts.types import Rollout
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.ppo import fresh_roles, make_job
from tests.helpers.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


def policy(roles: Roles) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(roles.state(POLICY).items())])


def learnt(base: Path, directory: Path, kl_coefficient: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A training long enough to learn something: what it returned, and its steps."""
    options: dict[str, Any] = {
        "steps": 8,
        "batch_size": 32,
        "learning_rate": 1e-2,
        "passes": 4,
        "kl_coefficient": kl_coefficient,
    }
    return train(make_job(fresh_roles(base), directory, **options)), read_metrics(directory)


def test_the_reward_rises_and_the_penalty_holds_the_policy_near(base: Path, tmp_path: Path) -> None:
    out, steps = learnt(base, tmp_path / "free", 0.0)
    assert 0.4 < steps[0]["reward"] < 0.6  # half of the tokens are liked
    assert out["final"]["reward"] > steps[0]["reward"] + 0.1
    _, held = learnt(base, tmp_path / "held", 5.0)
    assert sum(step["kl"] for step in held[-3:]) < 0.75 * sum(step["kl"] for step in steps[-3:])


def test_every_step_says_what_happened(base: Path, tmp_path: Path) -> None:
    train(make_job(fresh_roles(base), tmp_path, steps=2))
    first, second = read_metrics(tmp_path)
    assert {
        *("loss", "value_loss", "clip_fraction", "log_ratio", "grad_norm", "value_grad_norm", "reward", "kl"),
        *("kl_to_base", "kl_coefficient", "entropy", "answer_tokens", "finished_share", "mismatch", "mismatch_kl"),
        *("effective_share", "rejected_share", "explained_variance"),
    } <= set(first)
    assert first["kl"] == pytest.approx(0, abs=1e-4)  # the policy is the base still
    assert abs(second["kl"]) > 1e-3
    assert second["kl_coefficient"] != first["kl_coefficient"]  # far below its target: falls
    assert first["rejected_share"] == 0.0
    assert first["effective_share"] == pytest.approx(1, abs=0.01)


def test_a_stopped_run_ends_as_one_that_was_not(base: Path, tmp_path: Path) -> None:
    roles = fresh_roles(base)
    train(make_job(roles, tmp_path / "whole", steps=4))
    expected, curve = policy(roles), [r["reward"] for r in read_metrics(tmp_path / "whole")]

    stopped = tmp_path / "stopped"
    with pytest.raises(RunInterruptedError, match="stopped at step 2 of 4"):
        train(
            make_job(
                fresh_roles(base), stopped, steps=4, job={"stop_requested": lambda: len(read_metrics(stopped)) == 2}
            )
        )
    found = newest_complete(stopped / CHECKPOINTS)
    assert found.step == 2
    roles = fresh_roles(base)
    train(make_job(roles, stopped, steps=4, job={"resume_from": found.path}))
    assert torch.equal(policy(roles), expected)
    assert [r["reward"] for r in read_metrics(stopped)] == curve


def test_a_killed_run_does_its_lost_steps_again_and_ends_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it wrote its third checkpoint: the second one is newest."""
    roles = fresh_roles(base)
    train(make_job(roles, tmp_path / "whole", steps=4))
    expected = policy(roles)

    class Killed(BaseException):
        pass

    def killed(path: Path) -> None:
        if path.name == "checkpoint-3":
            raise Killed
        real(path)

    real, run = checkpoints.mark_complete, tmp_path / "killed"
    monkeypatch.setattr(state_module, "mark_complete", killed)
    with pytest.raises(Killed):
        train(make_job(fresh_roles(base), run, steps=4))
    monkeypatch.undo()
    found = newest_complete(run / CHECKPOINTS)
    assert found.step == 2
    roles = fresh_roles(base)
    train(make_job(roles, run, steps=4, job={"resume_from": found.path}))
    assert torch.equal(policy(roles), expected)


def test_two_checkpoints_are_kept(base: Path, tmp_path: Path) -> None:
    train(make_job(fresh_roles(base), tmp_path, steps=4))
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert (tmp_path / CHECKPOINTS / "checkpoint-4" / FILE).is_file()
    assert not (tmp_path / "policy").exists()


def test_out_of_the_budget_the_last_policy_within_is_kept(base: Path, tmp_path: Path) -> None:
    """The budget binds at the second measurement: what remains is the policy of the first, which is the base."""
    roles = fresh_roles(base)
    start = policy(roles)
    out = train(make_job(roles, tmp_path, steps=6, learning_rate=5e-2, kl_budget=0.001, kl_coefficient=0.0))
    assert out["stopped_by"] == "kl_budget"
    assert out["steps"] == 1
    assert "trainer.kl_budget allows 0.001" in out["note"]
    assert out["final"]["kl_to_base"] <= 0.001
    assert torch.equal(policy(roles), start)


def test_the_last_update_is_measured_too(base: Path, tmp_path: Path) -> None:
    roles = fresh_roles(base)
    start = policy(roles)
    out = train(make_job(roles, tmp_path, steps=1, learning_rate=5e-2, kl_budget=0.001))
    assert out["stopped_by"] == "kl_budget"
    assert torch.equal(policy(roles), start)


def test_a_parent_out_of_the_budget_is_refused(base: Path, tmp_path: Path) -> None:
    roles = fresh_roles(base)
    disturb(roles, 0.5)
    with pytest.raises(ScionError, match=r"starts .* nats per token from the pinned base.*--to 0"):
        train(make_job(roles, tmp_path, kl_budget=0.001))


def disturb(roles: Roles, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    roles.load_state(
        POLICY, {n: torch.randn(t.shape, generator=generator) * size for n, t in roles.state(POLICY).items()}
    )


def test_the_reference_is_the_parent_and_the_budget_is_from_the_base(base: Path, tmp_path: Path) -> None:
    roles = fresh_roles(base)
    disturb(roles, 0.1)
    train(make_job(roles, tmp_path, steps=2))
    first, second = read_metrics(tmp_path)
    assert roles.parameters(REFERENCE) != []
    assert first["kl"] == pytest.approx(0, abs=1e-4)
    assert first["kl_to_base"] > 0.01
    assert abs(second["kl"]) > 1e-3


def test_unfinished_answers_are_learnt_away(base: Path, tmp_path: Path) -> None:
    """No reward but the penalty: answers come to an end more often than at the start."""
    roles = fresh_roles(base)
    job = make_job(
        roles,
        tmp_path,
        reward=lambda rollouts: torch.zeros(len(rollouts)),
        steps=6,
        batch_size=32,
        learning_rate=3e-2,
        missing_eos_penalty=5.0,
        kl_coefficient=0.0,
        passes=4,
    )
    # The tiny model hardly ever ends by itself, so more of its tokens count as an end.
    job.source._stop_ids = torch.tensor([0, *range(5, 20)])  # type: ignore[attr-defined]
    out = train(job)
    assert out["final"]["finished_share"] > read_metrics(tmp_path)[0]["finished_share"] + 0.2


def test_the_value_begins_as_the_reward_model(base: Path, tmp_path: Path) -> None:
    """In the reward's normalised units; the role has the member's weights."""
    roles = fresh_roles(base)
    roles.add(reward_role(0))
    state = {name: torch.full_like(tensor, 0.01) for name, tensor in roles.state(reward_role(0)).items()}
    roles.load_state(reward_role(0), state)
    head = Head(64)
    run = ppo_module._Run(make_job(roles, tmp_path, job={"value_from": head}))
    assert all(torch.equal(tensor, state[name]) for name, tensor in roles.state(VALUE).items())
    run._publish_policy()
    run._meet_the_reward()
    moments = run.state.moments
    assert moments.count == 8
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(run.head(hidden), (head(hidden) - moments.mean) / moments.deviation)


def test_without_a_reward_model_the_value_begins_at_zero(base: Path, tmp_path: Path) -> None:
    """Whatever the reward's mean is: here it is many deviations from 0."""
    job = make_job(fresh_roles(base), tmp_path)
    inner = job.reward
    run = ppo_module._Run(replace(job, reward=lambda rollouts: inner(rollouts) + 5.0))
    run._publish_policy()
    run._meet_the_reward()
    assert run.state.moments.mean > 5 * run.state.moments.deviation
    assert torch.equal(run.head(torch.randn(3, 64)), torch.zeros(3))


def biased_log_probs(rollouts: list[Rollout], row: int, shift: float) -> list[Rollout]:
    return [
        replace(rollout, log_probs=tuple(value + shift for value in rollout.log_probs)) if index == row else rollout
        for index, rollout in enumerate(rollouts)
    ]


class Elsewhere:
    """A source whose log-probs of some answers are not the trainer's."""

    def __init__(self, inner: Any, shift: float, *, rows: Sequence[int], begin: int = 0) -> None:
        self.inner, self.shift, self.rows, self.begin, self.calls = inner, shift, rows, begin, 0
        self.steps: list[int] = []

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        self.calls += 1
        rollouts: list[Rollout] = self.inner.sample(prompts, seed=seed)
        for row in self.rows if self.calls > self.begin else ():
            rollouts = biased_log_probs(rollouts, row, self.shift)
        return rollouts

    def update(self, adapter_directory: Path, step: int) -> None:
        assert (adapter_directory / "adapter_model.safetensors").is_file()
        self.steps.append(step)

    def close(self) -> None:
        pass


def test_a_sampler_that_is_another_policy_is_found_out_at_once(base: Path, tmp_path: Path) -> None:
    job = make_job(fresh_roles(base), tmp_path)
    job = replace(job, source=Elsewhere(job.source, -0.5, rows=range(8)))
    with pytest.raises(ScionError, match=r"sampler's log-probs are 0\.5 nats"):
        train(job)


def test_outliers_are_rejected_and_logged(base: Path, tmp_path: Path) -> None:
    """From the second step on, one of eight answers would hardly be the trainer's own."""
    job = make_job(fresh_roles(base), tmp_path, steps=3)
    job = replace(job, source=Elsewhere(job.source, -2.0, rows=[3], begin=2))  # the reward's meeting and step 0
    train(job)
    assert job.source.steps == [1, 2, 3, 4]  # type: ignore[attr-defined]  # the start, and after each step
    first, second, third = read_metrics(tmp_path)
    assert [r["rejected_share"] for r in (first, second, third)] == [0.0, 0.125, 0.125]
    assert second["mismatch"] == pytest.approx(2.0 / 8, abs=0.1)
    assert second["effective_share"] < 0.9


def test_a_rejected_answer_teaches_nothing(base: Path, tmp_path: Path) -> None:
    job = make_job(fresh_roles(base), tmp_path)
    run = ppo_module._Run(job)
    rollouts = job.source.sample([job.prompts[0]] * 4, seed=1)
    state = State(0.05, step=1)  # at step 0 it would be an error
    plain = run.assessor.experience(rollouts, state)
    found = run.assessor.experience(biased_log_probs(rollouts, 2, -2.0), state)
    assert torch.equal(plain.mask_BR, plain.batch.mask_BR)
    assert not found.mask_BR[2].any()
    assert not found.advantages_BR[2].any()
    assert not found.weights_BR[2].any()
    assert torch.equal(found.mask_BR[[0, 1, 3]], plain.mask_BR[[0, 1, 3]])
    assert found.advantages_BR[[0, 1, 3]].any()


def test_a_ratio_that_is_not_one_before_the_first_update_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by dropout."""
    monkeypatch.setattr(Roles, "without_dropout", lambda self: None)
    roles = fresh_roles(base)
    disturb(roles, 0.1)
    for name, module in roles.model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    with pytest.raises(ScionError, match="ratio to itself must be 1"):
        train(make_job(roles, tmp_path))


def test_a_reward_that_is_not_a_number_is_refused(base: Path, tmp_path: Path) -> None:
    job = make_job(fresh_roles(base), tmp_path, reward=lambda rollouts: torch.full((len(rollouts),), float("nan")))
    with pytest.raises(ScionError, match="not finite"):
        train(job)


def test_divergence_publishes_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ScionError, match=r"diverged.*trainer\.ppo\.learning_rate"):
        train(make_job(fresh_roles(base), tmp_path, learning_rate=1e30))


@pytest.mark.parametrize("micro", [1, 3])
def test_micro_batches_change_no_result_but_rounding(base: Path, tmp_path: Path, micro: int) -> None:
    found = []
    for size in (None, micro):
        roles = fresh_roles(base)
        train(make_job(roles, tmp_path / str(size), steps=1, passes=1, minibatches=1, micro_batch_size=size))
        found.append(read_metrics(tmp_path / str(size))[0])
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=2e-3)
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=0.05)
    assert found[1]["value_loss"] == pytest.approx(found[0]["value_loss"], rel=0.05)


def test_gradient_checkpointing_gives_the_same_training(base: Path, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        roles = fresh_roles(base)
        if checkpointing:
            roles.checkpoint_activations()
        train(make_job(roles, tmp_path / str(checkpointing), steps=2))
        found.append(policy(roles))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_the_frozen_roles_stay_frozen(base: Path, tmp_path: Path) -> None:
    roles = fresh_roles(base)
    disturb(roles, 0.1)
    roles.add(reward_role(0))
    before = roles.state(reward_role(0))
    parent = roles.state(POLICY)
    tokens = torch.arange(5, 37).reshape(1, 32)
    with torch.no_grad(), roles.use(BASE):
        answers = roles.hidden(tokens)
    train(make_job(roles, tmp_path, steps=2, job={"value_from": Head(64)}))
    assert all(torch.equal(before[name], tensor) for name, tensor in roles.state(reward_role(0)).items())
    assert all(torch.equal(parent[name], tensor) for name, tensor in roles.state(REFERENCE).items())
    assert not torch.equal(policy(roles), torch.cat([t.flatten() for _, t in sorted(parent.items())]))
    with torch.no_grad(), roles.use(BASE):
        assert torch.equal(roles.hidden(tokens), answers)


def test_seeds_of_uses_differ() -> None:
    uses = {seed_for(seed, step, purpose) for seed in (0, 1) for step in (0, 1, 11) for purpose in ("sample", "pass 1")}
    assert len(uses) == 12
