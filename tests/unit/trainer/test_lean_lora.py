"""The lean forward of LoRA layers against PEFT's own: the same numbers and gradients, and PEFT's where it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer

from scion_trainer.lean_lora import plain_adapter, use_lean_forward
from scion_trainer.roles import POLICY, VALUE, Roles
from tests.helpers.ppo import fresh_roles
from tests.helpers.tiny_model import build_tiny_model

TOKENS_BT = torch.tensor([[3, 20, 4, 21, 22], [3, 23, 4, 24, 25]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def roles(base: Path) -> Roles:
    roles = fresh_roles(base)
    generator = torch.Generator().manual_seed(0)
    for parameter in roles.parameters(POLICY):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return roles


@pytest.fixture
def peft_forward(roles: Roles) -> Callable[..., torch.Tensor]:
    return Linear4bit.forward.__wrapped__  # type: ignore[attr-defined]


def hidden_and_gradients(roles: Roles) -> list[torch.Tensor]:
    with roles.use(POLICY, train=True):
        hidden_BTD = roles.hidden(TOKENS_BT)
        hidden_BTD.float()[..., ::3].sum().backward()  # the last norm makes the sum of all squares a constant
    gradients = [parameter.grad.clone() for parameter in roles.parameters(POLICY) if parameter.grad is not None]
    for parameter in roles.parameters(POLICY):
        parameter.grad = None
    assert len(gradients) == len(roles.parameters(POLICY))
    return [hidden_BTD.detach(), *gradients]


def test_numbers_and_gradients_are_peft_s(
    roles: Roles, peft_forward: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = hidden_and_gradients(roles)
    monkeypatch.setattr(Linear4bit, "forward", peft_forward)
    for ours, theirs in zip(lean, hidden_and_gradients(roles), strict=True):
        distance = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        assert distance < 0.03, "both round to bf16, each in places of its own"


def test_no_adapter_is_the_base(roles: Roles, peft_forward: Callable[..., torch.Tensor]) -> None:
    layer = layers(roles)[0]
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16)
    with roles.model.disable_adapter():
        assert torch.equal(layer(x), peft_forward(layer, x))


@pytest.mark.parametrize(
    ("change", "is_plain"),
    [
        (lambda layer: None, True),
        (lambda layer: layer.lora_dropout.__setitem__(layer.active_adapters[0], torch.nn.Dropout(0.5)), False),
        (lambda layer: layer.lora_variant.__setitem__(layer.active_adapters[0], object()), False),
        (lambda layer: layer.merged_adapters.append("default"), False),
        (lambda layer: layer.set_adapter(["default", VALUE]), False),
        (lambda layer: layer.set_adapter(["nobody"]), False),
    ],
)
def test_only_one_plain_adapter_is_taken(roles: Roles, change: Callable[[Any], None], is_plain: bool) -> None:
    roles.add(VALUE)
    layer = layers(roles)[0]
    assert plain_adapter(layer) == "default"
    layer._active_adapter = ["default"]
    change(layer)
    assert (plain_adapter(layer) is not None) is is_plain


def test_it_is_put_in_place_once() -> None:
    use_lean_forward()
    forward = Linear4bit.forward
    use_lean_forward()
    assert Linear4bit.forward is forward


def layers(roles: Roles) -> list[Any]:
    return [module for module in roles.model.modules() if isinstance(module, BaseTunerLayer)]
