"""The verdict on two versions' votes: its table, and what it does when it is asked after every single user."""

from __future__ import annotations

import random

import pytest

from scion_adapters.analysis import MIN_USERS, Judgement, UserVotes, Verdict, judge


def binary(users: int, liked: int) -> UserVotes:
    """`liked` of `users` users gave a thumb up."""
    return UserVotes(users, users, liked / users if users else 0.0, liked / users if users else 0.0)


VERDICTS = [
    # champion, challenger, verdict
    (binary(0, 0), binary(0, 0), Verdict.UNMEASURABLE),  # nobody voted
    (binary(0, 0), binary(500, 0), Verdict.UNMEASURABLE),  # nothing to compare with, however bad it looks
    (binary(500, 500), binary(0, 0), Verdict.UNMEASURABLE),
    (binary(500, 500), binary(MIN_USERS - 1, 0), Verdict.INCONCLUSIVE),  # too few to say
    (binary(MIN_USERS - 1, MIN_USERS - 1), binary(500, 0), Verdict.INCONCLUSIVE),
    (binary(10, 10), binary(10, 0), Verdict.FAILED),  # as clear as ten users a side can be
    (binary(10, 9), binary(10, 3), Verdict.INCONCLUSIVE),  # ten a side are not enough for 90% against 30%
    (binary(40, 36), binary(40, 12), Verdict.FAILED),  # 40 a side are
    (binary(40, 12), binary(40, 36), Verdict.PASSED),
    (binary(40, 36), binary(40, 33), Verdict.INCONCLUSIVE),
    (binary(40, 40), binary(40, 40), Verdict.INCONCLUSIVE),  # no variance at all is no evidence either
    (binary(10_000, 8_000), binary(10_000, 7_000), Verdict.FAILED),
    (binary(10_000, 8_000), binary(10_000, 7_990), Verdict.INCONCLUSIVE),
    (
        UserVotes(50, 5_000, 0.5, 0.26),
        UserVotes(50, 5_000, 0.2, 0.05),
        Verdict.FAILED,
    ),  # shares per user, little spread
]


@pytest.mark.parametrize(("champion", "challenger", "verdict"), VERDICTS)
def test_verdicts(champion: UserVotes, challenger: UserVotes, verdict: Verdict) -> None:
    judgement = judge(champion, challenger)
    assert judgement.verdict is verdict
    assert -1 <= judgement.low <= judgement.difference <= judgement.high <= 1


def test_it_is_the_same_seen_from_the_other_side() -> None:
    one, other = judge(binary(40, 30), binary(90, 20)), judge(binary(90, 20), binary(40, 30))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_votes_of_one_user_do_not_count_twice() -> None:
    few = judge(UserVotes(20, 20, 0.8, 0.8), UserVotes(20, 20, 0.3, 0.3))
    many_votes = judge(UserVotes(20, 9_000, 0.8, 0.8), UserVotes(20, 9_000, 0.3, 0.3))
    assert few == many_votes


def test_more_users_narrow_the_interval() -> None:
    widths = [j.high - j.low for j in (judge(binary(n, n // 2), binary(n, n // 2)) for n in (20, 80, 320, 1280))]
    assert widths == sorted(widths, reverse=True)


def peek_after_every_user(
    rng: random.Random, share_a: float, share_b: float, weights: tuple[float, ...], users_per_step: int
) -> tuple[Judgement, int] | None:
    """Users come one by one; after each, the verdict is asked. The first `failed` and how many users it took."""
    users, liked = [0, 0], [0, 0]
    for weight in weights:
        for _ in range(users_per_step):
            side = int(rng.random() < weight)
            users[side] += 1
            liked[side] += rng.random() < (share_a, share_b)[side]
            if min(users) >= MIN_USERS:
                judgement = judge(binary(users[0], liked[0]), binary(users[1], liked[1]))
                if judgement.verdict is Verdict.FAILED:
                    return judgement, sum(users)
    return None


@pytest.mark.parametrize(
    ("share", "weights", "users_per_step"),
    [
        (0.5, (0.5,), 800),  # the plain case
        (0.9, (0.5,), 800),  # skewed votes
        (0.3, (0.1, 0.5, 1.0), 250),  # the default steps: the sides are uneven, and the champion's stops growing
    ],
)
def test_false_aborts_are_rare_though_it_is_asked_after_every_user(
    share: float, weights: tuple[float, ...], users_per_step: int
) -> None:
    rng = random.Random(20260101)
    num_rollouts = 300
    false_aborts = sum(
        peek_after_every_user(rng, share, share, weights, users_per_step) is not None for _ in range(num_rollouts)
    )
    assert (
        false_aborts / num_rollouts < 0.01
    )  # alpha is 0.001; a fixed-sample test at 0.001 would err in several percent


def test_a_drop_from_90_to_30_percent_is_found_with_40_users_a_side() -> None:
    rng = random.Random(20260102)
    found = [peek_after_every_user(rng, 0.9, 0.3, (0.5,), 80) for _ in range(200)]
    assert sum(result is not None for result in found) / 200 > 0.93
    num_users = sorted(result[1] for result in found if result is not None)
    assert num_users[len(num_users) // 2] < 60
