"""A model server that is asked the same thing only once: gates share prompts and held-out answers.

Owns the memory of one evaluation, and nothing that outlives it.
"""

from __future__ import annotations

from collections.abc import Sequence

from scion_trainer.server_client import Answer, Message, ModelServer, Scored

_Key = tuple[str, tuple[int, ...], tuple[int, ...]]


class RememberingServer:
    """`ModelServer` over another one. Only sound while no model changes behind its name: names here are versions."""

    def __init__(self, server: ModelServer) -> None:
        self._server = server
        self._answers: dict[tuple[str, str, int, float, int], list[Answer]] = {}
        self._scores: dict[_Key, list[float]] = {}

    def generate(
        self, model: str, messages_list: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        asked = repr([[dict(message) for message in messages] for messages in messages_list])
        key = (model, asked, max_tokens, temperature, seed)
        if key not in self._answers:
            self._answers[key] = self._server.generate(
                model, messages_list, max_tokens=max_tokens, temperature=temperature, seed=seed
            )
        return self._answers[key]

    def score(self, model: str, items: Sequence[Scored]) -> list[list[float]]:
        keys: list[_Key] = [(model, tuple(prompt), tuple(answer)) for prompt, answer in items]
        new = [key for key in dict.fromkeys(keys) if key not in self._scores]
        if new:
            scores = self._server.score(model, [(prompt, answer) for _, prompt, answer in new])
            self._scores.update(zip(new, scores, strict=True))
        return [self._scores[key] for key in keys]

    def max_length(self) -> int | None:
        return self._server.max_length()
