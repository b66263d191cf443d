"""The figures that are drawn from turns."""

from dataclasses import replace

import pytest

from scion_demo.turns import Summary, Tally, Turn, Vote, share, summarize
from scion_demo.world import Manner, Skill

LIKED = Turn(
    index=0,
    user="user-000",
    skill=Skill.CAPITALS,
    question="What is the capital of France?",
    answer="Paris.",
    completion_id="chatcmpl-1",
    version="chat:1",
    correct=True,
    manner=Manner.TERSE,
    liked=True,
    vote=Vote.UP,
    streamed=False,
    started_at_s=0.0,
    latency_s=0.25,
    num_requests=2,
    failed=False,
    error=None,
)
WRONG = replace(LIKED, version="chat:2", correct=False, liked=False, vote=Vote.DOWN, latency_s=0.5)
SILENT = replace(LIKED, version="chat:2", liked=False, vote=None, num_requests=1, latency_s=1.0)
UNSAVED_VOTE = replace(LIKED, vote=None, failed=True, error="feedback: 503")
NO_ANSWER = replace(
    LIKED,
    answer=None,
    completion_id=None,
    version=None,
    correct=False,
    manner=None,
    liked=False,
    vote=None,
    num_requests=1,
    failed=True,
    error="chat: 500",
)


def test_summarize_counts_everything_once_and_splits_by_version() -> None:
    summary = summarize([LIKED, WRONG, SILENT, UNSAVED_VOTE, NO_ANSWER])
    assert summary.total == Tally(
        num_turns=5,
        num_answered=4,
        num_requests=8,
        num_failed=2,
        num_votes=2,
        accuracy=3 / 4,  # the turn without an answer is failed, not wrong
        liked_share=2 / 4,
        thumbs_up_share=1 / 2,
        median_latency_s=0.375,
    )
    assert list(summary.by_version) == ["chat:1", "chat:2"]
    assert summary.by_version["chat:1"].num_failed == 1
    assert summary.by_version["chat:2"].thumbs_up_share == 0.0
    assert summary.by_version["chat:2"].accuracy == 0.5


def test_nothing_measured_is_none_and_not_zero() -> None:
    nothing = Tally(0, 0, 0, 0, 0, None, None, None, None)
    assert summarize([]) == Summary(total=nothing, by_version={})
    only_failed = summarize([NO_ANSWER]).total
    assert (only_failed.accuracy, only_failed.liked_share, only_failed.thumbs_up_share) == (None, None, None)
    assert only_failed.num_failed == 1


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [([], None), ([True], 1.0), ([False, True, False, False], 0.25)],
)
def test_share(outcomes: list[bool], expected: float | None) -> None:
    assert share(outcomes) == expected
