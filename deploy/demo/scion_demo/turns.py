"""What the simulated users saw: records of turns and measurements, and the figures drawn from them.

Owns the records and the arithmetic, as pure functions. It knows nothing of HTTP or of how turns come about.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from scion_demo.world import Manner, Skill


class Vote(StrEnum):
    """A thumb, in the server's words."""

    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of one user, and what came of it.

    `completion_id`, `version` and `answer` are None if no complete answer came. `liked` is the truth, whatever the user
    voted; `vote` is a vote that the server took. `failed`: a request of this turn ended in an exception or in anything
    but 2xx, `error` says which and how. `started_at_s` is Unix time; `latency_s` is that of the whole answer, without
    the vote.
    """

    index: int
    user: str
    skill: Skill
    question: str
    answer: str | None
    completion_id: str | None
    version: str | None
    correct: bool
    manner: Manner | None
    liked: bool
    vote: Vote | None
    streamed: bool
    started_at_s: float
    latency_s: float
    num_requests: int
    failed: bool
    error: str | None


@dataclass(frozen=True, slots=True)
class Tally:
    """Figures over some turns. Shares are in 0..1; None means that there was nothing to measure.

    `accuracy` and `liked_share` are of the answered turns, `thumbs_up_share` is of the votes.
    """

    num_turns: int
    num_answered: int
    num_requests: int
    num_failed: int
    num_votes: int
    accuracy: float | None
    liked_share: float | None
    thumbs_up_share: float | None
    median_latency_s: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """All turns together, and those that a version answered, by its exact name."""

    total: Tally
    by_version: Mapping[str, Tally]


@dataclass(frozen=True, slots=True)
class Measurement:
    """A measuring pass over one model. Shares are of the answered questions; None if there were none."""

    model: str
    num_asked: int
    num_failed: int
    accuracy: float | None
    liked_share: float | None
    manner_shares: Mapping[Manner, float]
    errors: tuple[str, ...] = ()


def summarize(turns: Iterable[Turn]) -> Summary:
    """The figures of a stretch of traffic, in total and by version."""
    everything = list(turns)
    versions = sorted({turn.version for turn in everything if turn.version is not None})
    return Summary(
        total=tally(everything),
        by_version={version: tally([turn for turn in everything if turn.version == version]) for version in versions},
    )


def tally(turns: Sequence[Turn]) -> Tally:
    """The figures of these turns."""
    answered = [turn for turn in turns if turn.completion_id is not None]
    votes = [turn.vote for turn in turns if turn.vote is not None]
    return Tally(
        num_turns=len(turns),
        num_answered=len(answered),
        num_requests=sum(turn.num_requests for turn in turns),
        num_failed=sum(turn.failed for turn in turns),
        num_votes=len(votes),
        accuracy=share([turn.correct for turn in answered]),
        liked_share=share([turn.liked for turn in answered]),
        thumbs_up_share=share([vote is Vote.UP for vote in votes]),
        median_latency_s=statistics.median(turn.latency_s for turn in answered) if answered else None,
    )


def share(outcomes: Sequence[bool]) -> float | None:
    """The share of true outcomes, None if there are none."""
    return sum(outcomes) / len(outcomes) if outcomes else None
