"""Train-serve parity: the server's log-probs are the trainer's, on the same NF4 base, with an adapter and without.

The server is real vLLM, asked through the client that the gates use; the trainer is transformers, bitsandbytes and
PEFT, loaded as runs load them. A bf16 base is the negative control: the comparison can tell two quantizations apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from scion_adapters.fingerprint import base_info
from scion_adapters.registry import limits_of
from scion_adapters.settings import load_settings
from scion_demo.retention import retention_path
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import ChatTokens, load_chat_tokens
from scion_trainer.gates.retention import parse_items
from scion_trainer.server_client import Scored, ServerClient
from tests.e2e.conftest import ServerWorld
from tests.helpers.adapters import make_adapter, make_loud
from tests.helpers.serving import DEMO_BASE

pytestmark = pytest.mark.e2e

BOUND = 0.01
"""Nats: mean |log p(server) - log p(trainer)| over tokens."""
NTH = 3


def scored(tokens: ChatTokens) -> list[Scored]:
    """Answers of the demo's world, in three manners, each to another question: what the base really says, and doubts.

    Of a right answer it is so sure that hardly any log-prob is far from zero, whoever computes it.
    """
    items = parse_items(retention_path().read_text("utf-8"), origin="the demo's retention set")[::NTH]
    others = [*items[1:], items[0]]
    return [
        (tokens.prompt(item.messages), tokens.answer(other.prefix + other.answer))
        for item, other in zip(items, others, strict=True)
    ]


def trainer_logprobs(model: Any, items: list[Scored]) -> list[list[float]]:
    """Log-probs of the answers' tokens as the trainer computes them, one item at a time."""
    scores = []
    model.eval()
    with torch.inference_mode():
        for prompt, answer in items:
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0].float()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            scores.append(logprobs.gather(1, torch.tensor(list(answer)).unsqueeze(1)).squeeze(1).tolist())
    return scores


def mean_difference(some: list[list[float]], others: list[list[float]]) -> float:
    return float(np.mean(np.abs(np.concatenate(some) - np.concatenate(others))))


def test_server_and_trainer_agree(world: ServerWorld, tmp_path: Path) -> None:
    settings = world.server.settings
    tokens = load_chat_tokens(settings)
    items = scored(tokens)
    base = base_info(settings)
    directory = make_adapter(tmp_path / "loud", base, rank=16, alpha=32, seed=5, edit=make_loud)
    version = world.registry.publish("chat2", directory, parent=0, base=base, limits=limits_of(settings), actor="test")
    try:
        world.registry.request_evaluation(version.ref)
        world.wait_loaded(version)
        with ServerClient(settings, evaluation_keys={str(version.ref): version.evaluation_key}) as client:
            served_base = client.score(settings.base.served_name, items)
            served_adapter = client.score(str(version.ref), items)
    finally:
        world.registry.finish_evaluation(version.ref)

    def trainer(quantization: str) -> tuple[list[list[float]], list[list[float]]]:
        sections = {"base": {"model": str(DEMO_BASE), "quantization": quantization}, "trainer": {"threads": 2}}
        loaded = load_base(load_settings(world.server.home / "scion.toml", overrides=sections))
        plain = trainer_logprobs(loaded.model, items)
        return plain, trainer_logprobs(PeftModel.from_pretrained(loaded.model, str(directory)), items)

    plain, adapted = trainer("nf4")
    without, with_adapter = mean_difference(served_base, plain), mean_difference(served_adapter, adapted)
    bf16_plain, bf16_adapted = trainer("none")
    bf16_without = mean_difference(served_base, bf16_plain)
    bf16_with = mean_difference(served_adapter, bf16_adapted)
    print(
        f"\nmean |d log-prob|: NF4 {without:.4f} without and {with_adapter:.4f} with the adapter; "
        f"against bf16 {bf16_without:.4f} and {bf16_with:.4f}; the adapter itself {mean_difference(plain, adapted):.2f}"
    )
    assert mean_difference(plain, adapted) > 0.2, "the adapter must matter, or agreement with it shows nothing"
    assert without <= BOUND
    assert with_adapter <= BOUND
    assert bf16_without > BOUND, "a trainer on another quantization must be told apart"
    assert bf16_with > BOUND
