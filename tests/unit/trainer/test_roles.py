"""Roles on one NF4 base: who answers, who gets gradients, and the accidents that PEFT and bitsandbytes allow."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scion_adapters.settings import Settings, load_settings
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.lora import ADAPTER, export_adapter, start_adapter
from scion_trainer.roles import BASE, POLICY, REFERENCE, VALUE, RoleError, Roles
from tests.helpers.tiny_model import build_tiny_model

TOKENS_BT = torch.arange(5, 69).reshape(2, 32)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # 128 wide: bitsandbytes repacks only weights whose shape its kernel takes
    base = build_tiny_model(tmp_path_factory.mktemp("roles") / "base", hidden=128)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
    return load_settings(overrides={"base": {"model": str(base)}, "trainer": {"threads": 1, "lora": lora}})


@pytest.fixture
def roles(settings: Settings) -> Roles:
    return make_roles(settings)


def make_roles(settings: Settings) -> Roles:
    model, _ = start_adapter(load_base(settings, device=torch.device("cpu")), run_config(settings, "kto"), None)
    made = Roles(model)
    made.without_dropout()
    return made


def disturb(roles: Roles, role: str, seed: int = 0) -> None:
    """Give the role weights that change the answers."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(t.shape, generator=generator) * 0.2 for name, t in roles.state(role).items()}
    roles.load_state(role, state)


def answers(roles: Roles, role: str) -> torch.Tensor:
    with torch.no_grad(), roles.use(role):
        return roles.hidden(TOKENS_BT)


def gradients(roles: Roles, role: str) -> torch.Tensor | None:
    found = [p.grad.flatten() for p in roles.parameters(role) if p.grad is not None]
    return torch.cat(found).clone() if found else None


def train_policy(roles: Roles) -> torch.Tensor:
    """One forward and backward of the policy as it should be done; returns its gradients."""
    roles.model.zero_grad()
    with roles.use(POLICY, train=True):
        loss(roles).backward()
    found = gradients(roles, POLICY)
    assert found is not None
    return found


def loss(roles: Roles) -> torch.Tensor:
    return roles.hidden(TOKENS_BT).float().square().mean()


def test_each_role_answers_with_its_own_weights(roles: Roles) -> None:
    disturb(roles, POLICY)
    roles.add(VALUE)
    assert not torch.equal(answers(roles, POLICY), answers(roles, BASE))
    assert torch.equal(answers(roles, VALUE), answers(roles, BASE))  # a fresh LoRA changes nothing
    disturb(roles, VALUE, seed=1)
    assert len({float(answers(roles, role).sum()) for role in (POLICY, VALUE, BASE)}) == 3


def test_the_reference_of_an_untrained_policy_is_the_base_and_takes_no_memory(roles: Roles) -> None:
    roles.add_frozen_start()
    assert roles.parameters(REFERENCE) == []
    disturb(roles, POLICY)
    assert torch.equal(answers(roles, REFERENCE), answers(roles, BASE))


def test_the_reference_of_a_trained_policy_stays_as_the_policy_was(roles: Roles) -> None:
    disturb(roles, POLICY)
    before = answers(roles, POLICY)
    roles.add_frozen_start()
    disturb(roles, POLICY, seed=1)
    assert torch.equal(answers(roles, REFERENCE), before)
    assert not torch.equal(answers(roles, POLICY), before)


def test_a_role_comes_from_files(roles: Roles, tmp_path: Path) -> None:
    disturb(roles, POLICY)
    state = roles.state(POLICY)
    roles.load_state(POLICY, {name: tensor.bfloat16().float() for name, tensor in state.items()})  # as exported
    export_adapter(roles.model, tmp_path, base_model="base", lineage={})
    roles.add("reward-0", directory=tmp_path)
    assert {p.dtype for p in roles.parameters("reward-0")} == {torch.float32}
    assert torch.equal(answers(roles, "reward-0"), answers(roles, POLICY))


@pytest.mark.parametrize("train", [True, False])
def test_only_the_role_in_training_gets_gradients(roles: Roles, train: bool) -> None:
    roles.add(VALUE)
    with roles.use(VALUE, train=train):
        assert all(p.requires_grad is train for p in roles.parameters(VALUE))
        assert not any(p.requires_grad for p in roles.parameters(POLICY))
        if train:
            loss(roles).backward()
    assert gradients(roles, POLICY) is None
    assert (gradients(roles, VALUE) is not None) is train
    assert all(p.requires_grad for p in roles.parameters(POLICY))  # as it was before


def test_the_model_is_left_as_other_code_expects_it(roles: Roles) -> None:
    roles.add(VALUE)
    with pytest.raises(ZeroDivisionError), roles.use(BASE):
        _ = 1 / 0
    assert roles.model.active_adapters == [ADAPTER]
    assert all(p.requires_grad for p in roles.parameters(POLICY))


def leave_before_backward(roles: Roles) -> None:
    with roles.use(POLICY, train=True):
        value = loss(roles)
    value.backward()


def switch_before_backward(roles: Roles) -> None:
    with roles.use(POLICY, train=True):
        value = loss(roles)
        with roles.use(BASE):
            value.backward()


def switch_and_return_before_backward(roles: Roles) -> None:
    with roles.use(POLICY, train=True):
        value = loss(roles)
        with torch.no_grad(), roles.use(VALUE):
            roles.hidden(TOKENS_BT)
        value.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accident", [leave_before_backward, switch_before_backward, switch_and_return_before_backward])
def test_a_role_switched_before_its_backward_raises(
    roles: Roles, accident: Callable[[Roles], None], checkpointing: bool
) -> None:
    roles.add(VALUE)
    if checkpointing:
        roles.checkpoint_activations()
    with pytest.raises(RoleError, match="backward of role 'policy' after a switch"):
        accident(roles)
    assert gradients(roles, POLICY) is None


def test_without_the_guard_checkpointing_gives_another_roles_gradients(roles: Roles) -> None:
    """Why the guard is there: no error, and gradients that are not those of the forward."""
    disturb(roles, POLICY)
    roles.add(VALUE)
    disturb(roles, VALUE, seed=1)
    right = train_policy(roles)
    roles.model.enable_input_require_grads()
    roles.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    for hook in list(roles._decoder._forward_hooks):
        del roles._decoder._forward_hooks[hook]
    roles.model.zero_grad()
    with roles.use(POLICY, train=True):
        value = loss(roles)
        roles._switch(VALUE, train=True)
        value.backward()  # no error
    wrong = gradients(roles, POLICY)
    assert wrong is None or not torch.allclose(wrong, right)


def test_checkpointing_gives_the_same_gradients(roles: Roles) -> None:
    disturb(roles, POLICY)
    plain = train_policy(roles)
    roles.checkpoint_activations()
    torch.testing.assert_close(train_policy(roles), plain)


def test_gradients_survive_the_forwards_of_other_roles_in_eval_mode(roles: Roles) -> None:
    """bitsandbytes repacks a layer at its first forward in eval mode unless it is kept from it (see base.py)."""
    before = train_policy(roles)
    roles.add(VALUE)
    for role in (BASE, VALUE, POLICY):
        answers(roles, role)
    assert torch.equal(train_policy(roles), before)


def test_padding_on_either_side_leaves_the_answers(roles: Roles) -> None:
    disturb(roles, POLICY)
    row_BT = TOKENS_BT[:1, :8]
    pad_BT = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad(), roles.use(POLICY):
        alone = roles.hidden(row_BT)
        right = roles.hidden(torch.cat([row_BT, pad_BT], dim=1))[:, :8]
        mask_BT = torch.cat([torch.zeros_like(pad_BT), torch.ones_like(row_BT)], dim=1)
        left = roles.hidden(torch.cat([pad_BT, row_BT], dim=1), mask_BT)[:, 3:]
    torch.testing.assert_close(right, alone, atol=0.05, rtol=0.05)
    torch.testing.assert_close(left, alone, atol=0.05, rtol=0.05)


def test_dropout_is_off_in_roles_added_later_too(roles: Roles) -> None:
    roles.add(VALUE)
    disturb(roles, VALUE)
    with roles.use(VALUE, train=True):
        assert torch.equal(roles.hidden(TOKENS_BT), roles.hidden(TOKENS_BT))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (lambda roles: roles.use("judge").__enter__(), "no role 'judge'.*base, policy"),
        (lambda roles: roles.use(BASE, train=True).__enter__(), "frozen base"),
        (lambda roles: roles.add(POLICY), "there already"),
        (lambda roles: roles.remove(POLICY), "in use"),
        (lambda roles: roles.load_state(POLICY, {}), "28 tensors, and 0"),
        (lambda roles: roles.state(BASE), "no adapter of its own"),
    ],
)
def test_mistakes_say_what_was_expected(roles: Roles, mistake: Callable[[Roles], Any], said: str) -> None:
    with pytest.raises(RoleError, match=said):
        mistake(roles)


def test_a_failed_try_leaves_nothing_on_the_base(settings: Settings) -> None:
    """As lowering.py goes on: the base stays, and the weights and gradients of the roles on it are freed."""
    roles = make_roles(settings)
    roles.add(VALUE)
    train_policy(roles)
    weights = [weakref.ref(p) for role in (POLICY, VALUE) for p in roles.parameters(role)]
    base = roles.model.unload()
    hooked = base.get_decoder()._forward_hooks
    assert len(hooked) == 1
    del roles
    gc.collect()
    assert weights
    assert not any(weight() is not None for weight in weights)
    assert len(hooked) == 0


def test_a_removed_role_is_gone(roles: Roles) -> None:
    count = sum(1 for _ in roles.model.parameters())
    roles.add(VALUE)
    roles.remove(VALUE)
    assert VALUE not in roles
    assert sum(1 for _ in roles.model.parameters()) == count
    assert train_policy(roles).any()
