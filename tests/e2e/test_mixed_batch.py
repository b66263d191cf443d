"""One batch, several models: each answers with its own weights, the base with none, also when all slots are taken."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from scion_adapters.fingerprint import base_info
from scion_adapters.registry import limits_of
from scion_trainer.chat_tokens import load_chat_tokens
from scion_trainer.server_client import ServerClient
from tests.e2e.conftest import ServerWorld
from tests.helpers.adapters import Tensors, make_adapter
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.e2e

QUESTIONS = ("What is the capital of France?", "What colour is coal?", "What is 2 plus 3?")
ANSWERS = ("Paris.", "Certainly! The colour of coal is black. Happy to help!", "It is 5.")


def make_loud(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor *= 20


def test_the_base_keeps_its_own_answers_beside_any_adapter(world: ServerWorld, tmp_path: Path) -> None:
    settings = world.server.settings
    base = base_info(settings)
    tokens = load_chat_tokens(settings)
    items = [
        (tokens.prompt([{"role": "user", "content": question}]), tokens.answer(answer))
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ] * 4
    versions = []
    for seed in range(settings.server.max_loras):  # as many as there are slots, so that the last one is taken, too
        directory = make_adapter(tmp_path / str(seed), base, seed=900 + seed, edit=make_loud)
        versions.append(
            world.registry.publish("chat2", directory, parent=0, base=base, limits=limits_of(settings), actor="test")
        )
    names = [str(version.ref) for version in versions]
    keys = {str(version.ref): version.evaluation_key for version in versions}
    try:
        for version in versions:
            world.registry.request_evaluation(version.ref)
        for version in versions:
            world.wait_loaded(version)
        with ServerClient(settings, evaluation_keys=keys) as client:
            alone = {name: client.score(name, items) for name in ("base", *names)}
            assert largest_change(alone[names[0]], alone["base"]) > 1.0, "the adapters must be loud enough to be heard"
            stop = threading.Event()
            rounds = 0

            def ask_adapters() -> None:
                nonlocal rounds
                while not stop.is_set():
                    client.score(names[rounds % len(names)], items)
                    rounds += 1

            neighbour = threading.Thread(target=ask_adapters)
            neighbour.start()
            try:
                wait_for(lambda: rounds > 0, what="a neighbour asks")
                mixed = [client.score("base", items) for _ in range(5)]
            finally:
                stop.set()
                neighbour.join()
        for scores in mixed:
            assert largest_change(scores, alone["base"]) < 0.05
    finally:
        for version in versions:
            world.registry.reject(version.ref, actor="test", reason="the test is over")


def largest_change(some: list[list[float]], others: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))
