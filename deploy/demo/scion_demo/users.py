"""Simulated users: they ask the served model and rate the answers as their profile would.

Owns who the users are, what they ask and how they vote. They are only ever clients of the server.

    await run_traffic(base_url, profile, num_turns=500, seed=0) -> list[Turn]
    await run_traffic(base_url, profile, until=event, on_turn=show) -> list[Turn]
    await measure(base_url, "chat:3", profile, seed=0) -> Measurement      (asks everything once or more, never votes)
    summarize(turns) -> Summary                                            (in `turns.py`, with all the records)

A failed request never raises: it is recorded in its turn with its error. The same seed asks the same questions as the
same users; what a user is like depends on the profile and the crowd's size alone, so it stays the same all along.
"""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import httpx

from scion_demo.client import Answer, Client, Rating, connect
from scion_demo.profiles import Profile
from scion_demo.turns import Measurement, Turn, Vote, share, summarize
from scion_demo.world import Fact, Manner, facts, is_correct, manner_of, phrasings, render, render_answer

__all__ = ["Habit", "User", "crowd", "measure", "rating_of", "run_traffic", "summarize"]

ERROR_LENGTH = 300


class Habit(StrEnum):
    """How a user votes."""

    HONEST = "honest"
    RANDOM = "random"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class User:
    """A stable person: only an honest one comments and corrects."""

    name: str
    habit: Habit
    comments: bool
    corrects: bool


def crowd(profile: Profile, num_users: int, *, prefix: str = "user") -> tuple[User, ...]:
    """The users of a profile; its shares hold to the nearest user, not merely on average."""
    habits = random.Random("habits").sample(range(num_users), num_users)
    num_never = round(profile.never_vote_share * num_users)
    num_random = round(profile.random_vote_share * num_users)
    never, tossing = set(habits[:num_never]), set(habits[num_never : num_never + num_random])
    commenting = random.Random("comments").sample(range(num_users), round(profile.comment_share * num_users))
    correcting = random.Random("corrections").sample(range(num_users), round(profile.correct_share * num_users))
    return tuple(
        User(
            name=f"{prefix}-{index:03d}",
            habit=Habit.NEVER if index in never else Habit.RANDOM if index in tossing else Habit.HONEST,
            comments=index in commenting,
            corrects=index in correcting,
        )
        for index in range(num_users)
    )


def rating_of(user: User, profile: Profile, fact: Fact, answer: str, rng: random.Random) -> Rating | None:
    """What a user says about an answer; None if nothing."""
    if user.habit is Habit.NEVER:
        return None
    if user.habit is Habit.RANDOM:
        return Rating(value=rng.choice(tuple(Vote)))
    if profile.likes(fact, answer):
        return Rating(value=Vote.UP, comment="Just how I like it." if user.comments else None)
    complaint = "Right, but I want it told differently." if is_correct(fact, answer) else "That is wrong."
    wanted = render_answer(fact, rng.choice(profile.liked_manners(fact.skill)), rng)
    return Rating(
        value=Vote.DOWN,
        comment=complaint if user.comments else None,
        correction=wanted if user.corrects else None,
    )


async def run_traffic(
    base_url: str,
    profile: Profile,
    *,
    num_turns: int | None = None,
    until: asyncio.Event | None = None,
    seed: int = 0,
    num_users: int = 40,
    user_prefix: str = "user",
    concurrency: int = 8,
    model: str = "chat",
    streamed_share: float = 0.25,
    turns_per_s: float | None = None,
    api_key: str = "demo",
    transport: httpx.AsyncBaseTransport | None = None,
    on_turn: Callable[[Turn], None] | None = None,
) -> list[Turn]:
    """Lets the crowd ask and rate until `num_turns` are done or `until` is set, whichever comes first.

    A turn that has begun is always finished. `turns_per_s` caps the pace, None goes as fast as `concurrency` allows.
    Users are named `user_prefix` and a number. `on_turn` is called as each turn ends; the list is in the order in which
    turns began. Raises ValueError if neither end is given.
    """
    if num_turns is None and until is None:
        raise ValueError("run_traffic has num_turns=None and until=None and would never end: give one of them")
    users = crowd(profile, num_users, prefix=user_prefix)
    indexes = itertools.count() if num_turns is None else iter(range(num_turns))
    started = time.monotonic()
    turns: list[Turn] = []

    async def work(client: Client) -> None:
        for index in indexes:
            if turns_per_s is not None:
                await asyncio.sleep(max(0.0, started + index / turns_per_s - time.monotonic()))
            if until is not None and until.is_set():
                return
            turn = await _take_turn(
                client, profile, users, index, seed=seed, model=model, streamed_share=streamed_share
            )
            turns.append(turn)
            if on_turn is not None:
                on_turn(turn)

    async with connect(base_url, api_key=api_key, transport=transport) as client, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work(client))
    return sorted(turns, key=lambda turn: turn.index)


async def _take_turn(
    client: Client,
    profile: Profile,
    users: tuple[User, ...],
    index: int,
    *,
    seed: int,
    model: str,
    streamed_share: float,
) -> Turn:
    """One question, its answer and perhaps a vote; every failure ends up in the record."""
    rng = random.Random(f"{seed}/{index}")
    user, fact = rng.choice(users), rng.choice(facts())
    question = render(fact, rng.choice(phrasings(fact.skill)))
    streamed = rng.random() < streamed_share
    started_at_s, started = time.time(), time.monotonic()
    answer: Answer | None = None
    vote: Vote | None = None
    error: str | None = None
    num_requests = 1
    try:
        answer = await client.ask(model, question, user=user.name, streamed=streamed)
    except Exception as failure:
        error = _describe("chat", failure)
    latency_s = time.monotonic() - started
    rating = None if answer is None else rating_of(user, profile, fact, answer.text, rng)
    if answer is not None and rating is not None:
        num_requests = 2
        try:
            await client.rate(answer.completion_id, rating, user=user.name)
            vote = Vote(rating.value)
        except Exception as failure:
            error = _describe("feedback", failure)
    return Turn(
        index=index,
        user=user.name,
        skill=fact.skill,
        question=question,
        answer=None if answer is None else answer.text,
        completion_id=None if answer is None else answer.completion_id,
        version=None if answer is None else answer.version,
        correct=answer is not None and is_correct(fact, answer.text),
        manner=None if answer is None else manner_of(answer.text),
        liked=answer is not None and profile.likes(fact, answer.text),
        vote=vote,
        streamed=streamed,
        started_at_s=started_at_s,
        latency_s=latency_s,
        num_requests=num_requests,
        failed=error is not None,
        error=error,
    )


async def measure(
    base_url: str,
    model: str,
    profile: Profile,
    *,
    seed: int = 0,
    questions_per_fact: int = 2,
    concurrency: int = 8,
    api_key: str = "demo",
    transport: httpx.AsyncBaseTransport | None = None,
) -> Measurement:
    """Asks `model`, an exact name such as `chat:3`, about every fact, without votes and without being stored.

    The same seed asks the same questions with the same sampling seeds, in alternation known and held-out phrasings, so
    that two versions are compared like with like.
    """
    rng = random.Random(f"measure/{seed}")
    asked = [
        (fact, rng.choice(phrasings(fact.skill, held_out=number % 2 == 1)))
        for fact in facts()
        for number in range(questions_per_fact)
    ]
    pending = iter(enumerate(asked))
    answers: list[tuple[Fact, str]] = []
    errors: list[str] = []

    async def work(client: Client) -> None:
        for index, (fact, phrasing) in pending:
            try:
                answer = await client.ask(
                    model,
                    render(fact, phrasing),
                    user="measure",
                    seed=seed * len(asked) + index,
                    extra_body={"store": False},
                )
                answers.append((fact, answer.text))
            except Exception as failure:
                errors.append(_describe("chat", failure))

    async with connect(base_url, api_key=api_key, transport=transport) as client, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work(client))
    manners = Counter(manner_of(text) for _, text in answers)
    return Measurement(
        model=model,
        num_asked=len(asked),
        num_failed=len(errors),
        accuracy=share([is_correct(fact, text) for fact, text in answers]),
        liked_share=share([profile.likes(fact, text) for fact, text in answers]),
        manner_shares={manner: manners[manner] / len(answers) for manner in Manner if answers},
        errors=tuple(errors),
    )


def _describe(request: str, failure: Exception) -> str:
    """The request that failed and why, short enough for a table."""
    return f"{request}: {type(failure).__name__}: {failure}"[:ERROR_LENGTH]
