"""From a snapshot's rows to examples that fit: chats as the base's template takes them, short enough to train on.

Owns what is left out, and the count of it by reason. It knows nothing of losses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scion_trainer.recipes.recipe import Example


@dataclass(frozen=True, slots=True)
class Prepared:
    """Examples to train on, and what was left out and why."""

    examples: tuple[Example, ...]
    dropped: Mapping[str, int]
    num_tokens: int
    longest_tokens: int
    mean_answer_tokens: float


def prepare(examples: Iterable[Example], tokenizer: Any, *, max_length: int) -> Prepared:
    """Keep the examples that the chat template takes and that have at most `max_length` tokens, answer included.

    A cut answer would teach to stop in mid-sentence, and a cut prompt another question, so longer rows are left out.
    """
    kept: list[Example] = []
    dropped: Counter[str] = Counter()
    lengths: list[int] = []
    answer_lengths: list[int] = []
    for example in examples:
        flat = with_plain_text(example)
        if flat is None or not flat.completion.strip():
            dropped["not_text"] += 1
            continue
        row = flat.to_row()
        try:
            tokens = tokenizer.apply_chat_template(
                [*row["prompt"], *row["completion"]], tokenize=True, return_dict=True
            )
        except (
            Exception
        ):  # templates raise what they like (jinja2.TemplateError, TypeError…) for roles they do not know
            dropped["chat_template"] += 1
            continue
        length = len(tokens["input_ids"])
        if length > max_length:
            dropped["too_long"] += 1
            continue
        kept.append(flat)
        lengths.append(length)
        answer_lengths.append(len(tokenizer(flat.completion, add_special_tokens=False)["input_ids"]))
    mean = sum(answer_lengths) / len(answer_lengths) if answer_lengths else 0.0
    return Prepared(tuple(kept), dict(dropped), sum(lengths), max(lengths, default=0), mean)


def with_plain_text(example: Example) -> Example | None:
    """The example with every message's content as one string; None when a message has other than text (images…)."""
    messages = []
    for message in example.prompt:
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if any(not isinstance(part, str) for part in parts):
                return None
            content = "".join(str(part) for part in parts)
        if not isinstance(content, str):
            return None
        messages.append({"role": message["role"], "content": content})
    return replace(example, prompt=tuple(messages)) if messages else None
