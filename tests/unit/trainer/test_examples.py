from __future__ import annotations

from typing import Any

import pytest

from scion_trainer.examples import prepare
from scion_trainer.recipes.batches import micro_batches
from scion_trainer.recipes.recipe import Example


class FakeTokenizer:
    """One token per character and one per message; knows only the roles of a plain chat."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, list[int]]:
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise RuntimeError("unknown role")
        return {"input_ids": [0] * sum(len(message["content"]) + 1 for message in messages)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text)}


def example(content: Any, completion: str = "ok", role: str = "user") -> Example:
    return Example(({"role": role, "content": content},), completion, True)


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        (example("hi"), {}),  # fits
        (example([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), {}),  # OpenAI's content parts
        (example("x" * 30), {"too_long": 1}),  # never cut: a cut answer teaches to stop in mid-sentence
        (example("hi", completion="x" * 30), {"too_long": 1}),
        (example([{"type": "image_url", "image_url": {}}]), {"not_text": 1}),
        (example(None), {"not_text": 1}),  # a message that only called a tool
        (example("hi", completion="  "), {"not_text": 1}),  # nothing to learn
        (example("hi", role="tool"), {"chat_template": 1}),  # the base's template refuses it
    ],
)
def test_what_does_not_fit_is_left_out_and_counted(given: Example, dropped: dict[str, int]) -> None:
    prepared = prepare([given], FakeTokenizer(), max_length=16)
    assert prepared.dropped == dropped
    assert len(prepared.examples) == (0 if dropped else 1)


def test_lengths_are_of_what_is_kept() -> None:
    prepared = prepare([example("hi"), example("hello"), example("x" * 99)], FakeTokenizer(), max_length=16)
    assert (prepared.num_tokens, prepared.longest_tokens, prepared.mean_answer_tokens) == (6 + 9, 9, 2.0)
    assert prepared.examples[0].to_row() == {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "ok"}],
        "label": True,
    }


@pytest.mark.parametrize(
    ("batch", "micro", "expected"),
    [
        (16, None, (16, 1)),  # unset: the whole batch
        (16, 4, (4, 4)),
        (16, 5, (4, 4)),  # rounded down to a divisor, so that the effective batch stays
        (16, 64, (16, 1)),
        (16, 1, (2, 8)),  # KTO's KL needs two
        (7, 4, (7, 1)),  # a prime has no smaller divisor above 1
        (1, None, (1, 1)),
    ],
)
def test_micro_batches_keep_the_effective_batch(batch: int, micro: int | None, expected: tuple[int, int]) -> None:
    assert micro_batches(batch, micro) == expected
