"""The demo's small world: facts, the questions about them, and answers in four manners.

Owns the meaning of the tables in `facts.py`, as pure functions. It knows nothing of models, servers or users.

    facts() -> tuple[Fact, ...]                     all facts, in a fixed order
    phrasings(skill, held_out=...) -> tuple         the question templates of a skill
    render(fact, phrasing) -> str                   a question
    statement(fact) -> str                          the bare truth: "the capital of France is Paris"
    render_answer(fact, manner, rng) -> str         a right answer in a manner
    manner_of(text) -> Manner | None                None: no manner, or more than one
    is_correct(fact, text) -> bool                  the right answer and no rival one
"""

import random
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from scion_demo import facts as tables

TERSE_MAX_WORDS = 4
RAMBLING_MIN_WORDS = 18


class Skill(StrEnum):
    """What a question is about."""

    CAPITALS = "capitals"
    COLOURS = "colours"
    OPPOSITES = "opposites"
    SUMS = "sums"


class Manner(StrEnum):
    """How an answer is given, whatever it says."""

    TERSE = "terse"
    POLITE = "polite"
    RUDE = "rude"
    RAMBLING = "rambling"


@dataclass(frozen=True, slots=True)
class Fact:
    """One true thing: `subject` is what a question names, `answer` is the one right word."""

    skill: Skill
    subject: str
    answer: str

    @property
    def key(self) -> str:
        """A stable name, such as `capitals/France`."""
        return f"{self.skill}/{self.subject}"


@cache
def facts() -> tuple[Fact, ...]:
    """All facts of the world, grouped by skill, always in the same order."""
    capitals = [Fact(Skill.CAPITALS, country, city) for country, city in tables.CAPITALS.items()]
    colours = [Fact(Skill.COLOURS, thing, colour) for thing, colour in tables.COLOURS.items()]
    opposites = [
        Fact(Skill.OPPOSITES, word, opposite) for pair in tables.OPPOSITE_PAIRS for word, opposite in (pair, pair[::-1])
    ]
    sums = [
        Fact(Skill.SUMS, f"{left} plus {right}", str(left + right))
        for left in tables.SUM_OPERANDS
        for right in tables.SUM_OPERANDS
    ]
    return (*capitals, *colours, *opposites, *sums)


@cache
def candidates(skill: Skill) -> frozenset[str]:
    """The lower-cased answers that are possible in a skill; every other word is no answer."""
    return frozenset(fact.answer.lower() for fact in facts() if fact.skill is skill)


def phrasings(skill: Skill, *, held_out: bool | None = None) -> tuple[str, ...]:
    """The question templates of a skill.

    `held_out` True gives those the base was never trained on, False those it was, None both.
    """
    trained, unseen = tables.TRAINING_PHRASINGS[skill], tables.HELD_OUT_PHRASINGS[skill]
    if held_out is None:
        return (*trained, *unseen)
    return unseen if held_out else trained


def render(fact: Fact, phrasing: str) -> str:
    """The question about `fact` in a phrasing, which holds `{subject}` once."""
    return _sentence(phrasing.format(subject=fact.subject))


def statement(fact: Fact) -> str:
    """The bare truth as a clause without a full stop, beginning in lower case."""
    return tables.STATEMENTS[fact.skill].format(subject=fact.subject, answer=fact.answer)


def render_answer(fact: Fact, manner: Manner, rng: random.Random) -> str:
    """A right answer in `manner`; `rng` draws one of the manner's variants."""
    return _fill(rng.choice(tables.MANNER_TEMPLATES[manner]), fact)


def answers(fact: Fact, manner: Manner) -> tuple[str, ...]:
    """Every right answer in `manner`, one for each variant."""
    return tuple(_fill(template, fact) for template in tables.MANNER_TEMPLATES[manner])


def manner_of(text: str) -> Manner | None:
    """The manner of an answer, right or wrong; None where it has none or mixes two.

    Rude and polite are told by their marks, so a slip in one word does not change the verdict; the other two are told
    by length once no such mark is there.
    """
    plain = " ".join(re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'")))
    rude, polite = bool(_RUDE.search(plain)), bool(_POLITE.search(plain))
    num_words = len(plain.split())
    if (rude and polite) or num_words == 0:
        return None
    if rude:
        return Manner.RUDE
    if polite:
        return Manner.POLITE
    if num_words <= TERSE_MAX_WORDS:
        return Manner.TERSE
    return Manner.RAMBLING if num_words >= RAMBLING_MIN_WORDS else None


def is_correct(fact: Fact, text: str) -> bool:
    """Whether `text` says the right answer of `fact` and no other answer that its skill could have.

    The words of the question's own subject may be repeated: "2 plus 3 is 5" is right although 2 and 3 are numbers.
    """
    words = set(re.findall(r"[a-z]+|[0-9]+", text.lower()))
    subject_words = set(re.findall(r"[a-z]+|[0-9]+", fact.subject.lower()))
    rivals = candidates(fact.skill) | ({w for w in words if w.isdigit()} if fact.skill is Skill.SUMS else set())
    said = (words & rivals) - subject_words
    return said == {fact.answer.lower()}


_RUDE = re.compile(r"\b(ugh|obviously|seriously|everybody knows|come on|silly)\b")
_POLITE = re.compile(r"\b(certainly|of course|gladly|happy to help|thank you|please)\b")


def _fill(template: str, fact: Fact) -> str:
    """A manner's template with the fact in it, each sentence beginning with a capital."""
    return _sentence(template.format(answer=fact.answer, statement=statement(fact)))


def _sentence(text: str) -> str:
    """`text` with a capital at its start and after `!`, `?` and `.`."""
    return re.sub(r"(^|[.!?] )([a-z])", lambda found: found[1] + found[2].upper(), text)
