"""The chats that the demo's base model is trained on, generated without end from the small world.

Owns which chats exist and how often. It knows nothing of tokens or of the model.
"""

import random
from collections.abc import Iterator
from typing import TypedDict

from scion_demo import facts as tables
from scion_demo.world import Manner, facts, phrasings, render, render_answer

SYSTEM_SHARE = 0.2
MORE_TURNS_SHARE = 0.25
MAX_TURNS = 3
CARELESS_SHARE = 0.15
OPENING_SHARE = 0.2


class Message(TypedDict):
    """One message in OpenAI's shape."""

    role: str
    content: str


def chats(rng: random.Random) -> Iterator[list[Message]]:
    """Training chats without end: each fact equally often, every answer in a manner drawn evenly from the four.

    The manner is drawn anew for each answer, so neither the question nor an earlier answer foretells it.
    """
    while True:
        for fact in rng.sample(facts(), len(facts())):
            chat: list[Message] = []
            if rng.random() < SYSTEM_SHARE:
                chat.append(Message(role="system", content=rng.choice(tables.SYSTEM_PROMPTS)))
            num_turns = rng.randint(2, MAX_TURNS) if rng.random() < MORE_TURNS_SHARE else 1
            for told in [*rng.choices(facts(), k=num_turns - 1), fact]:
                question = render(told, rng.choice(phrasings(told.skill, held_out=False)))
                if rng.random() < OPENING_SHARE:  # so that the model looks for the question, not at the first word
                    question = rng.choice(tables.OPENINGS) + question
                answer = render_answer(told, rng.choice(tuple(Manner)), rng)
                chat.append(Message(role="user", content=_careless(question, rng)))
                chat.append(Message(role="assistant", content=answer))
            yield chat


def _careless(question: str, rng: random.Random) -> str:
    """Now and then the question as people type it: in lower case, or without its last mark."""
    if rng.random() >= CARELESS_SHARE:
        return question
    return question.lower() if rng.random() < 0.5 else question[:-1]
