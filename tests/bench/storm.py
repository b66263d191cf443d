"""What clients of a swap storm saw, held against what was done: pure functions over two lists, answers and changes.

An answer is wrong when it failed, names several models, or consists of words that are not its version's marker. It is
misrouted when its version was nobody's to give at the time. A user wanders when two of their requests in a row got
different versions although nothing moved between them, or when a raised weight took them off the challenger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

LAG_S = 1.0
"""How long after a change requests may still be answered as before it: all processes agree within a second."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as its client saw it. Times are of one monotonic clock, in seconds; gaps are between two chunks."""

    user: str
    asked: str  # the model name in the request
    started: float
    ended: float
    status: int
    models: frozenset[str]  # all that its chunks named
    words: frozenset[str]  # of the text, without a last one that may be cut off
    gaps: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of routed traffic: what `chat` may be answered by once it is done. `began` is before the call.

    `slice` names the rollout and its weight while one runs, so that a user's place can be checked.
    """

    kind: str
    began: float
    ended: float
    versions: frozenset[str]
    champion: str
    challenger: str | None = None
    weight: float = 0.0


@dataclass(slots=True)
class Findings:
    """Counts of what must be zero, each with the first examples, and how much was looked at."""

    num_answers: int = 0
    num_pairs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, what: object) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < 3:
            self.examples[kind].append(str(what))


KINDS = ("failed", "mixed", "contradicting", "misrouted", "wandering")


def judge(answers: Iterable[Answer], changes: Sequence[Change], markers: Mapping[str, str]) -> Findings:
    """Hold every answer against the changes. `markers` gives each version's word; `changes[0]` is the start."""
    found = Findings()
    per_user: defaultdict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        found.num_answers += 1
        if answer.status != 200 or answer.error:
            found.add("failed", answer)
            continue
        if len(answer.models) != 1 or len(answer.words) > 1:
            found.add("mixed", answer)
            continue
        (model,) = answer.models
        if answer.words and answer.words != {markers.get(model)}:
            found.add("contradicting", answer)
        if ":" in answer.asked:
            if model != answer.asked:
                found.add("misrouted", answer)
        elif model not in _allowed(answer.started, changes):
            found.add("misrouted", answer)
        else:
            per_user[answer.user].append(answer)
    for mine in per_user.values():
        mine.sort(key=lambda answer: answer.started)
        for first, second in pairwise(mine):
            found.num_pairs += 1
            if wanders(first, second, changes):
                found.add("wandering", (first, second))
    return found


def _allowed(at: float, changes: Sequence[Change]) -> frozenset[str]:
    """The versions that a request begun at `at` may have been given to."""
    allowed: frozenset[str] = frozenset()
    for index, change in enumerate(changes):
        gone_at = changes[index + 1].ended + LAG_S if index + 1 < len(changes) else float("inf")
        if change.began <= at <= gone_at:
            allowed |= change.versions
    return allowed


def wanders(first: Answer, second: Answer, changes: Sequence[Change]) -> bool:
    """Whether `second` got another version than `first` without changes between them that moved this user."""
    (before,), (after,) = first.models, second.models
    states = [c for c in changes if c.began <= second.started]
    earlier = [index for index, c in enumerate(states) if c.ended + LAG_S < first.started]
    reached = {before}
    for a, b in pairwise(states[earlier[-1] if earlier else 0 :]):
        reached |= {to for version in reached for to in b.versions if _moves(a, b, version, to)}
    return after not in reached


def _moves(a: Change, b: Change, before: str, after: str) -> bool:
    """Whether going from state `a` to `b` may take somebody from version `before` to `after`."""
    if before not in a.versions or after not in b.versions:
        return False
    if a.challenger is not None and a.challenger == b.challenger:  # the same rollout: only the added slice moves
        return b.weight > a.weight and before == a.champion and after == b.challenger
    return True


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, 0..100, by nearest rank; NaN of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(q / 100 * (len(ordered) - 1))))]
