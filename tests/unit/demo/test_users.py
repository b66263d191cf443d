"""Simulated users against a server in memory: what they send, how they vote, and that no failure is hidden."""

import asyncio
import random
from dataclasses import replace

import pytest

from scion_demo.profiles import Profile
from scion_demo.turns import Turn, Vote
from scion_demo.users import Habit, User, crowd, measure, rating_of, run_traffic
from scion_demo.world import Fact, Manner, Skill, answers, facts, phrasings, render
from tests.unit.demo.fake_server import FakeServer

LIKES_TERSE = Profile(name="test", default_likes=(Manner.TERSE,))
FRANCE = Fact(Skill.CAPITALS, "France", "Paris")
HONEST = User("user-000", Habit.HONEST, comments=True, corrects=True)
BY_QUESTION = {render(fact, phrasing): fact for fact in facts() for phrasing in phrasings(fact.skill)}


def terse(question: str) -> str:
    """The right answer in one word."""
    return BY_QUESTION[question].answer


def polite(question: str) -> str:
    """The right answer with a kind word."""
    return answers(BY_QUESTION[question], Manner.POLITE)[0]


async def traffic(
    server: FakeServer, profile: Profile = LIKES_TERSE, *, num_turns: int = 40, seed: int = 0
) -> list[Turn]:
    return await run_traffic(
        "http://fake", profile, num_turns=num_turns, seed=seed, num_users=10, transport=server.transport
    )


def test_a_crowds_shares_hold_and_its_users_stay_themselves() -> None:
    profile = replace(LIKES_TERSE, never_vote_share=0.3, random_vote_share=0.1, comment_share=0.2, correct_share=0.5)
    users = crowd(profile, 20)
    habits = [user.habit for user in users]
    assert (habits.count(Habit.NEVER), habits.count(Habit.RANDOM), habits.count(Habit.HONEST)) == (6, 2, 12)
    assert sum(user.comments for user in users) == 4
    assert sum(user.corrects for user in users) == 10
    assert len({user.name for user in users}) == 20
    assert users == crowd(profile, 20)
    assert crowd(profile, 1, prefix="raider")[0].name == "raider-000"


@pytest.mark.parametrize(
    ("user", "answer", "value", "comment", "correction"),
    [
        (HONEST, "Paris.", "up", "Just how I like it.", None),  # right, liked manner: nothing to correct
        (HONEST, "Rome.", "down", "That is wrong.", "Paris"),
        (HONEST, "Ugh, it's Paris. Obviously.", "down", "Right, but I want it told differently.", "Paris"),
        (replace(HONEST, comments=False), "Rome.", "down", None, "Paris"),
        (replace(HONEST, corrects=False, comments=False), "Rome.", "down", None, None),
    ],
)
def test_honest_ratings(user: User, answer: str, value: str, comment: str | None, correction: str | None) -> None:
    rating = rating_of(user, LIKES_TERSE, FRANCE, answer, random.Random(0))
    assert rating is not None
    assert (rating.value, rating.comment) == (value, comment)
    assert (rating.correction is None) == (correction is None)
    assert rating.correction is None or LIKES_TERSE.likes(FRANCE, rating.correction)


def test_some_never_vote_and_some_toss_a_coin() -> None:
    rng = random.Random(0)
    assert rating_of(replace(HONEST, habit=Habit.NEVER), LIKES_TERSE, FRANCE, "Paris.", rng) is None
    tosses = [rating_of(replace(HONEST, habit=Habit.RANDOM), LIKES_TERSE, FRANCE, "Paris.", rng) for _ in range(50)]
    assert {toss.value for toss in tosses if toss is not None} == {"up", "down"}
    assert all(toss is not None and toss.comment is None and toss.correction is None for toss in tosses)


async def test_liked_answers_get_thumbs_up_and_every_vote_names_its_answer() -> None:
    server = FakeServer(terse)
    turns = await traffic(server)
    assert [turn.index for turn in turns] == list(range(40))
    assert all(turn.correct and turn.liked and turn.vote is Vote.UP and not turn.failed for turn in turns)
    assert {turn.version for turn in turns} == {"chat:1"}
    assert {(vote["completion_id"], vote["user"]) for vote in server.votes} == {
        (turn.completion_id, turn.user) for turn in turns
    }
    assert all(set(vote) == {"completion_id", "value", "user"} for vote in server.votes)
    assert len(set(server.keys)) == 40
    assert server.authorizations == {"Bearer demo"}


async def test_requests_are_what_an_application_sends() -> None:
    server = FakeServer(terse)
    turns = await traffic(server)
    assert all(
        chat["model"] == "chat" and chat["temperature"] == 1.0 and chat["max_tokens"] == 48 for chat in server.chats
    )
    assert {chat["user"] for chat in server.chats} == {turn.user for turn in turns}
    assert {turn.streamed for turn in turns} == {True, False}
    assert sum(bool(chat.get("stream")) for chat in server.chats) == sum(turn.streamed for turn in turns)
    held_out = {render(fact, phrasing) for fact in facts() for phrasing in phrasings(fact.skill, held_out=True)}
    asked = {turn.question for turn in turns}
    assert asked & held_out
    assert asked - held_out


async def test_right_answers_in_another_manner_are_voted_down_with_a_correction() -> None:
    server = FakeServer(polite)
    turns = await traffic(server, replace(LIKES_TERSE, correct_share=1.0))
    assert all(turn.correct and not turn.liked and turn.vote is Vote.DOWN for turn in turns)
    assert all(vote["correction"] for vote in server.votes)


async def test_a_seed_asks_the_same_again() -> None:
    first, again, other = [await traffic(FakeServer(terse), seed=seed) for seed in (1, 1, 2)]
    assert [(turn.user, turn.question, turn.streamed) for turn in first] == [
        (turn.user, turn.question, turn.streamed) for turn in again
    ]
    assert [turn.question for turn in first] != [turn.question for turn in other]


async def test_a_failed_chat_is_recorded_once_and_never_retried() -> None:
    server = FakeServer(terse, chat_status=500)
    turns = await traffic(server, num_turns=5)
    assert len(server.chats) == 5
    assert all(turn.failed and turn.version is None and turn.vote is None and turn.num_requests == 1 for turn in turns)
    assert all(turn.error is not None and turn.error.startswith("chat: InternalServerError") for turn in turns)
    assert not server.votes


async def test_a_vote_that_is_not_taken_is_a_failure_and_no_vote() -> None:
    turns = await traffic(FakeServer(terse, feedback_status=503), num_turns=5)
    assert all(turn.failed and turn.vote is None and turn.num_requests == 2 for turn in turns)
    assert all(turn.liked and turn.completion_id is not None for turn in turns)
    assert all(turn.error is not None and turn.error.startswith("feedback: HTTPStatusError: 503") for turn in turns)


async def test_a_redirected_vote_is_not_taken_either() -> None:
    turns = await traffic(FakeServer(terse, feedback_status=307), num_turns=2)
    assert all(turn.failed and turn.vote is None for turn in turns)


async def test_a_stream_that_just_ends_is_a_failure() -> None:
    server = FakeServer(terse, cut_streams=True)
    turns = await traffic(server)
    assert all(turn.failed is turn.streamed for turn in turns)
    errors = [turn.error for turn in turns if turn.error is not None]
    assert errors
    assert all("ended unfinished" in error for error in errors)


async def test_traffic_goes_on_until_it_is_told_to_stop() -> None:
    stop = asyncio.Event()
    seen: list[Turn] = []

    def on_turn(turn: Turn) -> None:
        seen.append(turn)
        if len(seen) == 7:
            stop.set()

    server = FakeServer(terse)
    turns = await run_traffic(
        "http://fake/v1/", LIKES_TERSE, until=stop, concurrency=3, on_turn=on_turn, transport=server.transport
    )
    assert 7 <= len(turns) <= 9  # what had begun was finished
    assert sorted(seen, key=lambda turn: turn.index) == turns
    assert not any(turn.failed for turn in turns)


async def test_traffic_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        await run_traffic("http://fake", LIKES_TERSE)


async def test_measuring_asks_every_fact_of_one_exact_model_and_leaves_no_trace() -> None:
    server = FakeServer(terse)
    measurement = await measure("http://fake", "chat:3", LIKES_TERSE, transport=server.transport)
    assert (measurement.model, measurement.num_asked, measurement.num_failed) == ("chat:3", 2 * len(facts()), 0)
    assert (measurement.accuracy, measurement.liked_share) == (1.0, 1.0)
    assert measurement.manner_shares[Manner.TERSE] == 1.0
    assert not server.votes
    assert {BY_QUESTION[chat["messages"][0]["content"]] for chat in server.chats} == set(facts())
    assert all(chat["model"] == "chat:3" and chat["store"] is False for chat in server.chats)
    assert len({chat["seed"] for chat in server.chats}) == len(server.chats)


async def test_measuring_a_dead_server_measures_nothing() -> None:
    measurement = await measure(
        "http://fake", "chat:3", LIKES_TERSE, transport=FakeServer(terse, chat_status=404).transport
    )
    assert measurement.num_failed == measurement.num_asked == len(measurement.errors)
    assert (measurement.accuracy, measurement.liked_share, measurement.manner_shares) == (None, None, {})
