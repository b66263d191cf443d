"""The likelihood term beside KTO's loss: its value, its sign, and that it is of liked answers only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import KTOTrainer

from scion_trainer.recipes.kto_trainer import LikelihoodKtoTrainer

KTO_LOSS = 0.5


class FixedModel(torch.nn.Module):
    """Gives each of three answers its log-probs, whatever it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.log_probs = torch.nn.Parameter(torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, 0.0]]))

    def forward(self) -> Any:
        return SimpleNamespace(log_probs=self.log_probs)


def kto_loss(self: Any, model: FixedModel, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """As TRL's: a pass without gradients for the KL, then the policy's."""
    with torch.no_grad():
        model()
    model()
    loss = torch.tensor(KTO_LOSS)
    return (loss, "outputs") if return_outputs else loss


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> LikelihoodKtoTrainer:
    monkeypatch.setattr(KTOTrainer, "_compute_loss", kto_loss)
    trainer = LikelihoodKtoTrainer.__new__(LikelihoodKtoTrainer)
    trainer.beta = 0.5
    trainer.likelihood_weight = 2.0
    return trainer


@pytest.mark.parametrize(
    ("labels", "term"),
    [
        ([True, False, False], 2.0 * 0.5 * 3.0 / 3),
        ([True, False, True], 2.0 * 0.5 * (3.0 + 5.0) / 3),
        ([False, False, False], 0.0),
    ],
)
def test_liked_answers_count_by_their_log_prob(trainer: LikelihoodKtoTrainer, labels: list[bool], term: float) -> None:
    loss = trainer._compute_loss(FixedModel(), {"label": torch.tensor(labels)}, return_outputs=False)
    assert loss.detach().item() == pytest.approx(KTO_LOSS + term)


def test_the_gradient_raises_liked_answers_and_leaves_the_others(trainer: LikelihoodKtoTrainer) -> None:
    model = FixedModel()
    loss, outputs = trainer._compute_loss(model, {"label": torch.tensor([True, False, False])}, return_outputs=True)
    loss.backward()
    assert outputs == "outputs"
    assert model.log_probs.grad is not None
    assert (model.log_probs.grad[0] < 0).all()
    assert (model.log_probs.grad[1:] == 0).all()


def test_without_weight_it_is_kto(trainer: LikelihoodKtoTrainer) -> None:
    trainer.likelihood_weight = 0.0
    assert float(trainer._compute_loss(FixedModel(), {"label": torch.tensor([True])}, return_outputs=False)) == KTO_LOSS
