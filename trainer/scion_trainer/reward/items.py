"""From examples to what a member of the ensemble is trained on: token sequences, a draw of raters, batches.

Pure functions; the same seed gives the same draw and the same batches, so that a resumed run goes on as it began.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.recipes.recipe import Example

_MAX_DRAWS = 20


@dataclass(frozen=True, slots=True)
class Item:
    """One thumb (a sequence, and whether it was liked) or one pair (preferred and other sequence; `liked` None).

    A sequence is prompt and answer with the end of the turn. `raters` are the users behind it: two where a pair is made
    of two users' votes.
    """

    sequences: tuple[tuple[int, ...], ...]
    answer_lengths: tuple[int, ...]
    liked: bool | None
    raters: tuple[str, ...]

    @property
    def is_pair(self) -> bool:
        return len(self.sequences) == 2

    @property
    def rater(self) -> str:
        return self.raters[0]


def encode(examples: Iterable[Example], tokens: ChatTokens) -> list[Item]:
    """The items of `examples`, in their order. An example without raters stands for a rater of its own."""
    items = []
    for index, example in enumerate(examples):
        prompt = tokens.prompt(example.prompt)
        answers = [tokens.answer(answer) for answer in example.answers]
        items.append(
            Item(
                sequences=tuple((*prompt, *answer) for answer in answers),
                answer_lengths=tuple(len(answer) for answer in answers),
                liked=example.label if example.rejected is None else None,
                raters=example.raters or (f"#{index}",),
            )
        )
    return items


def draw_raters(items: Sequence[Item], *, seed: str) -> list[Item]:
    """The items of as many raters as there are, drawn with replacement: a rater drawn twice counts twice.

    Raters, not votes, are drawn, since votes of one rater are alike. An item of two raters is there as often as the
    product of theirs (the pigeonhole bootstrap: Owen, Annals of Applied Statistics, 2007). Draws that leave out all
    likes, or all dislikes, are made again.
    """
    raters = sorted({rater for item in items for rater in item.raters})
    rng = random.Random(seed)
    for _ in range(_MAX_DRAWS):
        times = Counter(rng.choices(raters, k=len(raters)))
        drawn = [item for item in items for _ in range(_product(times[rater] for rater in item.raters))]
        if drawn and {item.liked for item in drawn} == {item.liked for item in items}:
            return drawn
    return list(items)


def batches(items: Sequence[Item], *, batch_size: int, epochs: float, seed: str) -> list[list[Item]]:
    """The batches of all epochs, shuffled anew in each; the last epoch may be a part of one."""
    num_wanted = max(1, round(len(items) * epochs))
    rng = random.Random(seed)
    order: list[Item] = []
    while len(order) < num_wanted:
        order += rng.sample(items, len(items))
    order = order[:num_wanted]
    return [order[start : start + batch_size] for start in range(0, num_wanted, batch_size)]


def _product(factors: Iterable[int]) -> int:
    product = 1
    for factor in factors:
        product *= factor
    return product
