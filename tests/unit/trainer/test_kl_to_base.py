"""KL from the pinned base: the figure, where it is measured, and the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scion_adapters.errors import RejectedError
from scion_adapters.settings import load_settings
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.config import run_config
from scion_trainer.kl import Divergence, check_budget, heldout_prompts, measure, token_kl
from scion_trainer.lora import start_adapter
from scion_trainer.roles import POLICY, Roles
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import snapshot_row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatTokens]:
    base = build_tiny_model(tmp_path_factory.mktemp("kl") / "base")
    lora = {"rank": 4, "alpha": 8}
    settings = load_settings(overrides={"base": {"model": str(base)}, "trainer": {"threads": 1, "lora": lora}})
    loaded = load_base(settings, device=torch.device("cpu"))
    model, _ = start_adapter(loaded, run_config(settings, "kto"), None)
    return model, ChatTokens(loaded.tokenizer)


def test_the_divergence_of_two_distributions_is_the_textbooks() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = float((p * (p / q).log()).sum())
    found = token_kl(torch.stack([p.log() + 3.0, p.log()]), torch.stack([q.log(), p.log()]))
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-6)


def test_it_is_zero_at_the_base_and_grows_with_the_adapter(made: tuple[Any, ChatTokens]) -> None:
    model, tokens = made
    prompts = heldout_prompts([snapshot_row()], tokens, max_length=256)
    parameters = [p for name, p in model.named_parameters() if "lora_B" in name]
    figures = []
    for scale in (0.0, 0.02, 0.1):
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        found = measure(model, prompts, stop_ids=tokens.stop_ids())
        assert found is not None
        assert (found.num_prompts, found.num_tokens > 0) == (1, True)
        figures.append(found.per_token)
    assert figures[0] == pytest.approx(0.0, abs=1e-6)
    assert 1e-4 < figures[1] < figures[2]
    assert Roles(model).changes_nothing(POLICY) is False
    assert all(parameter.requires_grad for parameter in parameters)  # training could go on


def test_no_more_are_sampled_at_once_than_asked_for(made: tuple[Any, ChatTokens]) -> None:
    """The memory is that of the longest few, and a long prompt widens only those it is sampled with."""
    model, tokens = made
    lengths = (4, 90, 5, 6, 80)
    prompts = [list(range(10, 10 + length)) for length in lengths]
    shapes: list[tuple[int, ...]] = []
    hook = model.get_base_model().register_forward_pre_hook(
        lambda _module, _arguments, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = measure(model, prompts, stop_ids=tokens.stop_ids(), seed=3, at_once=2)
    finally:
        hook.remove()
    assert max(rows for rows, _ in shapes) == 2
    assert shapes[0] == (2, 5)  # 4 and 5 tokens; then 6 and 80, and 90 alone
    assert [shape for shape in shapes if shape in {(2, 80), (1, 90)}] == [(2, 80), (1, 90)]
    assert found == measure(model, prompts, stop_ids=tokens.stop_ids(), seed=3, at_once=2)


def test_prompts_are_different_and_leave_room_for_an_answer(made: tuple[Any, ChatTokens]) -> None:
    rows = [snapshot_row(messages=[{"role": "user", "content": text}]) for text in ("a", "a", "b", "x" * 100)]
    rows.append(snapshot_row(messages=[{"role": "nobody", "content": "?"}]))  # the template refuses it
    assert len(heldout_prompts(rows, made[1], max_length=110)) == 2
    assert len(heldout_prompts(rows, made[1], max_length=256)) == 3
    assert measure(made[0], [], stop_ids={0}) is None


def test_the_budget_refuses_with_the_figures_and_the_remedy() -> None:
    found = Divergence(2.5, 8, 100)
    check_budget(found, 2.5)
    check_budget(found, None)
    check_budget(None, 1.0)
    with pytest.raises(
        RejectedError, match=r"2\.500 nats.*100 tokens.*kl_budget allows 2: .*learning_rate.*--to 0"
    ) as caught:
        check_budget(found, 2.0)
    assert caught.value.reason == "kl_budget"
