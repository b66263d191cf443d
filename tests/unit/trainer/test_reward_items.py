from __future__ import annotations

from collections import Counter

import pytest

from scion_trainer.reward.items import Item, batches, draw_raters


def thumb(number: int, rater: str, *, liked: bool = True) -> Item:
    return Item(((number,),), (1,), liked, (rater,))


def pair(number: int, *raters: str) -> Item:
    return Item(((number,), (number, 0)), (1, 2), None, raters)


ITEMS = [thumb(10 * user + n, f"u{user}", liked=n % 2 == 0) for user in range(8) for n in range(4)]


def test_raters_are_drawn_whole_and_as_many_as_there_are() -> None:
    drawn = Counter(item.sequences[0][0] // 10 for item in draw_raters(ITEMS, seed="0"))
    assert sum(drawn.values()) == len(ITEMS)
    assert set(drawn.values()) <= {4, 8, 12, 16}  # all four votes, once or more often
    assert len(drawn) < 8  # some rater is left out


def test_draws_differ_by_seed_and_are_repeatable() -> None:
    assert draw_raters(ITEMS, seed="1") == draw_raters(ITEMS, seed="1") != draw_raters(ITEMS, seed="2")


def test_about_a_third_of_the_raters_are_left_out() -> None:
    items = [thumb(user, f"u{user}", liked=user % 2 == 0) for user in range(200)]
    shares = [len({i.rater for i in draw_raters(items, seed=str(seed))}) / 200 for seed in range(20)]
    assert sum(shares) / 20 == pytest.approx(1 - 0.366, abs=0.02)


def test_a_pair_of_two_raters_counts_as_often_as_both_were_drawn() -> None:
    """One thumb of each rater tells how often that rater was drawn."""
    items = [thumb(0, "a"), thumb(1, "b"), pair(2, "a", "b"), *(thumb(n, f"c{n}", liked=False) for n in range(3, 9))]
    seen = set()
    for seed in range(40):
        times = Counter(item.sequences[0][0] for item in draw_raters(items, seed=str(seed)))
        assert times[2] == times[0] * times[1] or times[2] == 1  # the second: no draw had all kinds
        seen.add(times[2])
    assert {1, 2} <= seen


def test_every_draw_has_likes_and_dislikes() -> None:
    items = [thumb(0, "only one who likes"), *(thumb(n, f"u{n}", liked=False) for n in range(1, 10))]
    for seed in range(20):
        assert {item.liked for item in draw_raters(items, seed=str(seed))} == {True, False}


def test_each_epoch_has_every_item_once_in_another_order() -> None:
    found = batches(ITEMS, batch_size=8, epochs=2, seed="0")
    assert [len(batch) for batch in found] == [8] * 8
    first, second = ([item for batch in half for item in batch] for half in (found[:4], found[4:]))
    assert sorted(first, key=lambda i: i.sequences) == sorted(second, key=lambda i: i.sequences)
    assert first != second


@pytest.mark.parametrize(("epochs", "num_items"), [(0.5, 16), (1.25, 40), (0.001, 1)])
def test_parts_of_epochs(epochs: float, num_items: int) -> None:
    assert sum(map(len, batches(ITEMS, batch_size=8, epochs=epochs, seed="0"))) == num_items
