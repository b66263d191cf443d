"""Scores of answers by members that never saw their raters, arranged for the gate.

Owns which score is judged: the one that a policy would be given, mean less disagreement. Held-out users were seen by no
member. Of the training set, each draw of raters leaves out about a third: what such a member says of them is evidence
too (Breiman, "Out-of-bag estimation", 1996), and from fewer members than the ensemble has, so it flatters nobody. Where
users are few, the held-out ones alone are too few to decide on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scion_trainer.gates.types import GateResult
from scion_trainer.reward.calibration import Platt
from scion_trainer.reward.figures import Judged
from scion_trainer.reward.gate import RewardBounds, decide, mirrored
from scion_trainer.reward.items import Item
from scion_trainer.reward.model import RewardModel, penalised_score

MAX_ITEMS = 2000


@dataclass(frozen=True, slots=True)
class Unseen:
    """An item, and the members that were not trained on any of its raters."""

    item: Item
    members: tuple[int, ...]


def held_out(items: Sequence[Item], num_members: int) -> list[Unseen]:
    """Items of users that no member was trained on."""
    return [Unseen(item, tuple(range(num_members))) for item in items]


def out_of_bag(items: Sequence[Item], unseen: Sequence[frozenset[str]]) -> list[Unseen]:
    """Items of the training set that some members did not see; `unseen[k]` are the raters member k did not see."""
    found = [
        Unseen(item, tuple(k for k, raters in enumerate(unseen) if raters.issuperset(item.raters))) for item in items
    ]
    return [each for each in found if each.members]


def evaluate(
    model: RewardModel, unseen: Sequence[Unseen], *, bounds: RewardBounds, seed: int
) -> tuple[GateResult, Platt]:
    """The gate's result on at most MAX_ITEMS, the first, and the calibration of the penalised score by them."""
    thumbs, pairs = judged(model, unseen[:MAX_ITEMS])
    return decide(thumbs, pairs, bounds=bounds, seed=seed)


def judged(model: RewardModel, unseen: Sequence[Unseen]) -> tuple[Judged, Judged]:
    """(thumbs, mirrored pairs) with their penalised scores, each over its own members."""
    scores = iter(_scores(model, unseen))
    scored = [(each.item, [next(scores) for _ in each.item.sequences]) for each in unseen]
    thumbs = [(item, found[0]) for item, found in scored if not item.is_pair]
    pairs = [(item, found) for item, found in scored if item.is_pair]
    return (
        Judged.of(
            [score for _, score in thumbs],
            [bool(item.liked) for item, _ in thumbs],
            [item.answer_lengths[0] for item, _ in thumbs],
            [item.rater for item, _ in thumbs],
        ),
        mirrored(
            [found[0] for _, found in pairs],
            [found[1] for _, found in pairs],
            [item.answer_lengths[0] - item.answer_lengths[1] for item, _ in pairs],
            [item.rater for item, _ in pairs],
        ),
    )


def _scores(model: RewardModel, unseen: Sequence[Unseen]) -> list[float]:
    """The penalised score of every sequence."""
    sequences = [sequence for each in unseen for sequence in each.item.sequences]
    if not sequences:
        return []
    scores_NK = model.score_sequences(sequences)
    members = [each.members for each in unseen for _ in each.item.sequences]
    found = torch.empty(len(sequences))
    for group in set(members):
        rows = [index for index, own in enumerate(members) if own == group]
        found[rows] = penalised_score(scores_NK[rows][:, list(group)], model.disagreement_penalty)
    return [float(score) for score in found]
