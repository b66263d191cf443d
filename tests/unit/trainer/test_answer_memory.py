"""A server that is asked the same thing once: what counts as the same, and that the answers stay in order."""

from __future__ import annotations

from scion_trainer.answer_memory import RememberingServer
from tests.helpers.fake_server import FakeServer, Persona

QUESTIONS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]


def test_answers_are_asked_for_once_for_each_way_of_asking() -> None:
    server = FakeServer({"x": Persona(), "y": Persona()})
    memory = RememberingServer(server)
    first = memory.generate("x", QUESTIONS, max_tokens=8, temperature=1.0, seed=0)
    assert memory.generate("x", QUESTIONS, max_tokens=8, temperature=1.0, seed=0) == first
    assert server.asked == ["x"]
    memory.generate("x", QUESTIONS, max_tokens=8, temperature=1.0, seed=1)
    memory.generate("x", QUESTIONS, max_tokens=9, temperature=1.0, seed=0)
    memory.generate("x", QUESTIONS, max_tokens=8, temperature=0.0, seed=0)
    memory.generate("x", QUESTIONS[:1], max_tokens=8, temperature=1.0, seed=0)
    memory.generate("y", QUESTIONS, max_tokens=8, temperature=1.0, seed=0)
    assert server.asked == ["x", "x", "x", "x", "x", "y"]


def test_only_new_texts_are_scored_and_come_back_in_their_order() -> None:
    scored: list[int] = []

    class Counting(FakeServer):
        def score(self, model, items):  # type: ignore[no-untyped-def]
            scored.append(len(items))
            return super().score(model, items)

    memory = RememberingServer(Counting({"x": Persona(finds=lambda prompt, before, token: -float(token))}))
    assert memory.score("x", [([1], [2]), ([1], [3])]) == [[-2.0], [-3.0]]
    assert memory.score("x", [([1], [4]), ([1], [3]), ([1], [4])]) == [[-4.0], [-3.0], [-4.0]]
    assert memory.score("x", [([1], [4])]) == [[-4.0]]
    assert scored == [2, 1]
