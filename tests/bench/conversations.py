"""Chat requests of ordinary size from many users, as JSON bodies: what the load generator sends."""

from __future__ import annotations

import json
import random

SYSTEM = "You are the assistant of a shop. Answer what is asked, in a friendly way, and say so when you do not know."
QUESTIONS = (
    "Where is my parcel? I ordered two weeks ago and have not heard from you since.",
    "Can I return the shoes when I wore them once, inside the house, on a carpet?",
    "What is the difference between the blue one and the green one, apart from the colour?",
    "Please explain how the warranty works when something was a present from someone else.",
)
ANSWERS = (
    "I am sorry that you had to wait. Could you tell me the number of your order, please?",
    "Yes, that is fine as long as they can be sold again. You have thirty days for it.",
)


def bodies(
    count: int, *, stream: bool, max_tokens: int | None = None, num_users: int = 200, seed: int = 0
) -> tuple[str, ...]:
    """`count` requests to the model `chat`, about 0.8 kB each, with one to three turns of history."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        messages = [{"role": "system", "content": SYSTEM}]
        for _ in range(rng.randint(1, 3)):
            messages.append({"role": "user", "content": rng.choice(QUESTIONS)})
            messages.append({"role": "assistant", "content": rng.choice(ANSWERS)})
        messages.append({"role": "user", "content": rng.choice(QUESTIONS)})
        body: dict[str, object] = {"model": "chat", "messages": messages, "user": f"user-{rng.randrange(num_users)}"}
        if stream:
            body["stream"] = True
        if max_tokens is not None:
            body |= {"max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
        result.append(json.dumps(body))
    return tuple(result)
