"""A model server without a model: the same interface and the same promises as `ServerClient`, made of arithmetic.

A `Persona` is how one model behaves: what it answers, and how likely it finds a token. The checks in server_contract.py
run over this and over real vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_trainer.server_client import Answer, Message, Scored

END = 0
"""The token id that ends a turn, in `FakeTokenizer` and here."""


class FakeTokenizer:
    """One token per character, its code point; a chat is its messages' texts with the end between."""

    eos_token_id = END

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        if any(message["role"] == "refused" for message in messages):
            raise ValueError("unknown role")
        text = "".join(f"<{message['role']}>{message['content']}{chr(END)}" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


@dataclass(frozen=True)
class Persona:
    """`says` maps the last message to an answer; `finds` maps (prompt ids, answer ids so far, token) to a log-prob."""

    says: Callable[[str], str] = lambda prompt: "fine"
    finds: Callable[[Sequence[int], Sequence[int], int], float] = lambda prompt, before, token: -1.0


@dataclass
class FakeServer:
    """Answers for the models in `personas`. `away` makes every call fail, as a server that is not there does."""

    personas: Mapping[str, Persona]
    length: int | None = 1024
    away: bool = False
    asked: list[str] = field(default_factory=list)

    def generate(
        self, model: str, messages_list: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        persona = self._persona(model)
        answers = []
        for index, messages in enumerate(messages_list):
            text = persona.says(str(messages[-1]["content"]))
            if temperature > 0 and text:
                text += _suffix(f"{model}{text}{seed + index}")
            if len(text) >= max_tokens:
                answers.append(Answer(text[:max_tokens], "length", max_tokens))
            else:
                answers.append(Answer(text, "stop", len(text) + 1))
        return answers

    def score(self, model: str, items: Sequence[Scored]) -> list[list[float]]:
        persona = self._persona(model)
        scores = []
        for prompt, answer in items:
            if not prompt or not answer:
                raise InvalidInputError("nothing to score")
            scores.append([persona.finds(prompt, answer[:i], token) for i, token in enumerate(answer)])
        return scores

    def max_length(self) -> int | None:
        self._check()
        return self.length

    def _persona(self, model: str) -> Persona:
        self._check()
        self.asked.append(model)
        if model not in self.personas:
            raise NotFoundError(f"no model {model!r}")
        return self.personas[model]

    def _check(self) -> None:
        if self.away:
            raise UnavailableError("the server at http://fake does not answer; start it with `scion serve`")


def _suffix(text: str) -> str:
    return " " + hashlib.sha256(text.encode()).hexdigest()[:4]
