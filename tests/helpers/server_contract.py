"""What every `ModelServer` promises, as one list of checks: run over the fake in unit tests, over real vLLM in e2e."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.server_client import Message, ModelServer

QUESTIONS: list[list[Message]] = [
    [{"role": "user", "content": text}]
    for text in ("What is the capital of France?", "What colour is coal?", "What is 2 plus 3?")
]


@dataclass(frozen=True)
class Subject:
    """A server to be checked, with a model that it knows."""

    server: ModelServer
    tokens: ChatTokens
    model: str


def answers_come_in_order_and_greedy_ones_repeat(subject: Subject) -> None:
    def ask(questions: list[list[Message]]) -> list[str]:
        answers = subject.server.generate(subject.model, questions, max_tokens=32, temperature=0.0, seed=0)
        return [answer.text for answer in answers]

    assert ask(QUESTIONS) == list(reversed(ask(QUESTIONS[::-1])))


def sampled_answers_repeat_with_their_seed(subject: Subject) -> None:
    def ask(seed: int) -> list[str]:
        questions = QUESTIONS[:1] * 8
        answers = subject.server.generate(subject.model, questions, max_tokens=32, temperature=1.0, seed=seed)
        return [answer.text for answer in answers]

    assert ask(3) == ask(3)
    assert len(set(ask(3))) > 1, "every answer has a seed of its own"


def a_cut_off_answer_says_so(subject: Subject) -> None:
    (answer,) = subject.server.generate(subject.model, QUESTIONS[:1], max_tokens=1, temperature=0.0, seed=0)
    assert (answer.finish_reason, answer.num_tokens) == ("length", 1)


def every_answer_token_has_one_log_prob(subject: Subject) -> None:
    prompt = subject.tokens.prompt(QUESTIONS[0])
    items = [(prompt, subject.tokens.answer(text)) for text in ("Paris.", "Oslo", "I do not know that, sorry.")]
    scores = subject.server.score(subject.model, items)
    assert [len(score) for score in scores] == [len(answer) for _, answer in items]
    assert all(math.isfinite(value) and value <= 0 for score in scores for value in score)


def scores_do_not_depend_on_their_neighbours(subject: Subject) -> None:
    items = [(subject.tokens.prompt(question), subject.tokens.answer("Paris.")) for question in QUESTIONS]
    together, alone = subject.server.score(subject.model, items), subject.server.score(subject.model, items[1:2])
    assert together[1] == pytest.approx(alone[0], abs=0.05)  # bf16 sums differ a little with the batch


def nothing_to_do_is_nothing_done(subject: Subject) -> None:
    assert subject.server.score(subject.model, []) == []
    assert subject.server.generate(subject.model, [], max_tokens=8, temperature=0.0, seed=0) == []


def an_empty_answer_cannot_be_scored(subject: Subject) -> None:
    with pytest.raises(InvalidInputError):
        subject.server.score(subject.model, [(subject.tokens.prompt(QUESTIONS[0]), [])])


def an_unknown_model_is_not_found(subject: Subject) -> None:
    with pytest.raises(NotFoundError, match="nobody:99"):
        subject.server.generate("nobody:99", QUESTIONS[:1], max_tokens=8, temperature=0.0, seed=0)
    with pytest.raises(NotFoundError, match="nobody:99"):
        subject.server.score("nobody:99", [(subject.tokens.prompt(QUESTIONS[0]), [1])])


def the_longest_length_is_known(subject: Subject) -> None:
    longest = subject.server.max_length()
    assert longest is None or longest > 64


CONTRACT: tuple[Callable[[Subject], None], ...] = (
    answers_come_in_order_and_greedy_ones_repeat,
    sampled_answers_repeat_with_their_seed,
    a_cut_off_answer_says_so,
    every_answer_token_has_one_log_prob,
    scores_do_not_depend_on_their_neighbours,
    nothing_to_do_is_nothing_done,
    an_empty_answer_cannot_be_scored,
    an_unknown_model_is_not_found,
    the_longest_length_is_known,
)
