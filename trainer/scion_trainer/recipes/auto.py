"""Which recipe suits the ratings there are: the decision behind `--recipe auto`, and the words that explain it.

Pure: counts in, choice out. A run asks once, when its snapshot is frozen, and writes the answer down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from scion_trainer.recipes.pairs import judged_pairs

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Counts:
    """What the training rows of a snapshot hold."""

    liked: int
    disliked: int
    corrections: int
    pairs: int  # answers to the same prompt, of which one is liked and the other not

    def describe(self) -> str:
        return f"{self.liked} liked, {self.disliked} disliked, {self.corrections} corrected, {self.pairs} pairs"


@dataclass(frozen=True, slots=True)
class Choice:
    """A recipe's name, and why it is that one."""

    recipe: str
    why: str


def count(rows: Sequence[SnapshotRow]) -> Counts:
    """What `rows` hold."""
    return Counts(
        liked=sum(row.liked is True for row in rows),
        disliked=sum(row.liked is False for row in rows),
        corrections=sum(row.correction is not None for row in rows),
        pairs=len(judged_pairs(rows)),
    )


def choose(counts: Counts, has_reward_model: bool, *, min_pairs: int, ppo_min_ratings: int) -> Choice:
    """The recipe for these ratings. `has_reward_model`: one for this adapter and base has passed its gate."""
    ratings = counts.liked + counts.disliked
    if counts.disliked == 0:
        return Choice(
            "sft", f"{counts.describe()}: nothing is disliked, so there is only what to say, as sft learns it"
        )
    if has_reward_model and ratings >= ppo_min_ratings:
        return Choice(
            "ppo", f"a reward model has passed its gate, and {ratings} ratings are at least {ppo_min_ratings}"
        )
    if counts.pairs >= min_pairs and 2 * counts.pairs >= ratings:
        return Choice("dpo", f"{counts.describe()}: the pairs hold at least half of the ratings, as dpo wants them")
    if counts.pairs >= min_pairs:
        why = f"{counts.describe()}: the pairs hold less than half of the ratings, and kto learns from all"
    elif has_reward_model:
        few = f"fewer than {ppo_min_ratings} ratings for ppo"
        why = f"{counts.describe()}: {few}, and single thumbs are what kto learns from"
    else:
        why = f"{counts.describe()}: single thumbs are what kto learns from"
    return Choice("kto", why)


def note(choice: Choice, counts: Counts) -> Mapping[str, Any]:
    """What the run's metrics keep of the choice."""
    return {"chosen_recipe": choice.recipe, "chosen_why": choice.why, "chosen_from": asdict(counts)}
