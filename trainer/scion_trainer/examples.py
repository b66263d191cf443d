"""From a snapshot's rows to examples that fit: chats as the base's template takes them, short enough to train on.

Owns what is left out, and the count of it by reason. It knows nothing of losses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
        if flat is None or not all(answer.strip() for answer in flat.answers):
            dropped["not_text"] += 1
            continue
        try:
            found = [_num_tokens(tokenizer, flat.prompt, answer) for answer in flat.answers]
        except (
            Exception
        ):  # templates raise what they like (jinja2.TemplateError, TypeError…) for roles they do not know
            dropped["chat_template"] += 1
            continue
        if max(found) > max_length:
            dropped["too_long"] += 1
            continue
        kept.append(flat)
        lengths += found
        answer_lengths += [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in flat.answers]
    mean = sum(answer_lengths) / len(answer_lengths) if answer_lengths else 0.0
    return Prepared(tuple(kept), dict(dropped), sum(lengths), max(lengths, default=0), mean)


def _num_tokens(tokenizer: Any, prompt: Sequence[Mapping[str, Any]], answer: str) -> int:
    """Of prompt and answer as the chat template renders them."""
    chat = [{"role": message["role"], "content": message["content"]} for message in prompt]
    tokens = tokenizer.apply_chat_template(
        [*chat, {"role": "assistant", "content": answer}], tokenize=True, return_dict=True
    )
    return len(tokens["input_ids"])


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
