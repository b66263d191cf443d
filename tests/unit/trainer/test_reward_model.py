from __future__ import annotations

import pytest
import torch

from scion_trainer.reward.evaluation import out_of_bag
from scion_trainer.reward.items import Item
from scion_trainer.reward.model import chunks_by_length, padded, penalised_score, right_padded


def test_the_penalty_is_the_spread_over_the_members() -> None:
    scores_BK = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    assert penalised_score(scores_BK, 2.0).tolist() == pytest.approx([1.0, 1.0 - 2.0 * (2 / 3) ** 0.5])
    assert penalised_score(scores_BK, 0.0).tolist() == [1.0, 1.0]


def test_a_single_member_never_disagrees() -> None:
    assert penalised_score(torch.tensor([[3.0], [-1.0]]), 5.0).tolist() == [3.0, -1.0]


def test_tokens_move_to_the_left_in_their_order_wherever_padding_is() -> None:
    tokens_BT = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 0, 0, 0], [0, 3, 0, 4, 0]])
    mask_BT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    moved_BT, lengths_B = right_padded(tokens_BT, mask_BT)
    assert lengths_B.tolist() == [3, 2, 2]
    assert [row[:length].tolist() for row, length in zip(moved_BT, lengths_B, strict=True)] == [
        [7, 8, 9],
        [5, 6],
        [3, 4],
    ]
    assert moved_BT.shape == (3, 3)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="without tokens"):
        right_padded(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]]))


def test_sequences_of_like_length_are_scored_together_within_a_bound() -> None:
    assert chunks_by_length([5, 1, 40, 2, 3], tokens_at_once=10) == [[1, 3, 4], [0], [2]]
    assert chunks_by_length([], tokens_at_once=10) == []


def test_sequences_become_a_rectangle_and_a_mask() -> None:
    tokens_BT, mask_BT = padded([[1, 2, 3], [4]], torch.device("cpu"))
    assert tokens_BT.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_what_a_member_did_not_see_can_be_asked_of_it() -> None:
    items = [
        Item(((0,),), (1,), True, ("a",)),
        Item(((1,),), (1,), True, ("b",)),
        Item(((2,), (3,)), (1, 1), None, ("a", "b")),
        Item(((4,),), (1,), True, ("c",)),
    ]
    found = out_of_bag(items, [frozenset({"a"}), frozenset({"a", "b"})])
    assert [(each.item.sequences[0][0], each.members) for each in found] == [(0, (0, 1)), (1, (1,)), (2, (1,))]
