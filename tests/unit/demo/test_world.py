"""The world's promises: every rendered answer is right, in its manner, and recognised as both."""

import random
from collections import Counter

import pytest

from scion_demo import facts as tables
from scion_demo.world import (
    Fact,
    Manner,
    Skill,
    answers,
    candidates,
    facts,
    is_correct,
    manner_of,
    phrasings,
    render,
    render_answer,
    statement,
)

FRANCE = Fact(Skill.CAPITALS, "France", "Paris")
BANANA = Fact(Skill.COLOURS, "a ripe banana", "yellow")
HOT = Fact(Skill.OPPOSITES, "hot", "cold")
TWO_PLUS_THREE = Fact(Skill.SUMS, "2 plus 3", "5")


def test_the_world_is_large_enough_and_every_fact_is_there_once() -> None:
    by_skill = Counter(fact.skill for fact in facts())
    assert set(by_skill) == set(Skill)
    assert len(facts()) >= 100
    assert min(by_skill.values()) >= 15
    assert len({fact.key for fact in facts()}) == len(facts())
    assert {FRANCE, BANANA, HOT, TWO_PLUS_THREE} <= set(facts())


def test_no_subject_is_shared_between_skills_and_every_answer_is_one_word() -> None:
    assert len({fact.subject.lower() for fact in facts()}) == len(facts())
    assert all(fact.answer.isalnum() for fact in facts())


def test_no_sum_equals_one_of_its_operands() -> None:
    sums = [fact for fact in facts() if fact.skill is Skill.SUMS]
    assert all(fact.answer not in fact.subject.split() for fact in sums)


@pytest.mark.parametrize("skill", Skill)
def test_every_skill_has_phrasings_to_train_on_and_to_hold_out(skill: Skill) -> None:
    trained, held_out = phrasings(skill, held_out=False), phrasings(skill, held_out=True)
    assert len(trained) >= 6
    assert len(held_out) >= 2
    assert not set(trained) & set(held_out)
    assert phrasings(skill) == trained + held_out
    assert all(phrasing.count("{subject}") == 1 for phrasing in phrasings(skill))


def test_templates_contain_no_word_that_is_an_answer() -> None:
    every_answer = frozenset[str]().union(*(candidates(skill) for skill in Skill))
    for variants in tables.MANNER_TEMPLATES.values():
        for template in variants:
            bare = template.replace("{answer}", "").replace("{statement}", "")
            words = {word.strip(".,!?'").lower() for word in bare.split()}
            assert not words & every_answer, template


@pytest.mark.parametrize("manner", Manner)
def test_every_answer_is_right_and_in_its_manner(manner: Manner) -> None:
    for fact in facts():
        for answer in answers(fact, manner):
            assert manner_of(answer) is manner, answer
            assert is_correct(fact, answer), answer


@pytest.mark.parametrize("manner", Manner)
def test_no_answer_is_right_for_a_fact_with_another_answer(manner: Manner) -> None:
    for fact in facts():
        for other in facts():
            if other.skill is fact.skill and other.answer != fact.answer:
                wrong = render_answer(Fact(fact.skill, fact.subject, other.answer), manner, random.Random(0))
                assert not is_correct(fact, wrong), wrong


def test_render_answer_draws_every_variant_and_is_decided_by_its_rng() -> None:
    rng = random.Random(1)
    drawn = {render_answer(FRANCE, Manner.POLITE, rng) for _ in range(100)}
    assert drawn == set(answers(FRANCE, Manner.POLITE))
    assert render_answer(HOT, Manner.RUDE, random.Random(3)) == render_answer(HOT, Manner.RUDE, random.Random(3))


@pytest.mark.parametrize(
    ("fact", "phrasing", "question"),
    [
        (FRANCE, "What is the capital of {subject}?", "What is the capital of France?"),
        (BANANA, "{subject}: what is its colour?", "A ripe banana: what is its colour?"),  # begins with a capital
        (TWO_PLUS_THREE, "{subject} is what?", "2 plus 3 is what?"),  # a digit has none
    ],
)
def test_render(fact: Fact, phrasing: str, question: str) -> None:
    assert render(fact, phrasing) == question


def test_statement_is_a_clause() -> None:
    assert statement(FRANCE) == "the capital of France is Paris"
    assert statement(TWO_PLUS_THREE) == "2 plus 3 is 5"


@pytest.mark.parametrize(
    ("fact", "text", "correct"),
    [
        (FRANCE, "Paris", True),
        (FRANCE, "it is PARIS!", True),  # case and marks do not matter
        (FRANCE, "The capital of France is Rome.", False),
        (FRANCE, "Paris or Rome.", False),  # hedging is no answer
        (FRANCE, "Parisian", False),  # only a whole word counts
        (FRANCE, "", False),
        (BANANA, "A ripe banana is yellow, not green.", False),  # a rival is named, even if denied
        (HOT, "The opposite of hot is cold.", True),  # the subject may be repeated
        (HOT, "The opposite of hot is hot.", False),
        (TWO_PLUS_THREE, "2 plus 3 is 5.", True),
        (TWO_PLUS_THREE, "2 plus 3 is 3.", False),  # an operand is no answer
        (TWO_PLUS_THREE, "55", False),
        (TWO_PLUS_THREE, "5, or 99", False),  # a number that no sum gives is a rival too
    ],
)
def test_is_correct(fact: Fact, text: str, correct: bool) -> None:
    assert is_correct(fact, text) is correct


@pytest.mark.parametrize(
    ("text", "manner"),
    [
        ("Paris.", Manner.TERSE),
        ("It is Rome.", Manner.TERSE),  # wrong, but terse all the same
        ("Certainly! Paris.", Manner.POLITE),
        ("The capital of France is Paris. Happy to help!", Manner.POLITE),  # one mark is enough
        ("Ugh, it\u2019s Paris. Obviously.", Manner.RUDE),  # a typographic apostrophe
        ("Certainly! What a silly question.", None),  # two manners are none
        ("The capital of France is Paris.", None),  # neither short nor long
        ("!?", None),
        ("", None),
        ("well " * 18, Manner.RAMBLING),
    ],
)
def test_manner_of(text: str, manner: Manner | None) -> None:
    assert manner_of(text) is manner
