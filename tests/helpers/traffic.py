"""Clients that ask a real server without a pause, half of them streaming, and remember every answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tests.helpers.waiting import until


@dataclass
class Answer:
    """`started` and `ended` by the monotonic clock; `models`: all that the answer named."""

    started: float
    ended: float
    status: int
    models: set[str]
    text: str


@dataclass
class Traffic:
    """Every user always has the same name."""

    url: str
    model: str
    num_clients: int = 6
    answers: list[Answer] = field(default_factory=list)
    stopping: bool = False

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            while not self.stopping:
                body = {
                    "model": self.model,
                    "prompt": f"User {number} says",
                    "max_tokens": 4 + number,
                    "user": f"u{number}",
                }
                started = time.monotonic()
                if number % 2:
                    response = await http.post("/v1/completions", json=body)
                    models = {response.json().get("model", "")} if response.status_code == 200 else set()
                else:
                    response = await http.post("/v1/completions", json={**body, "stream": True})
                    models = {part.split('"')[0] for part in response.text.split('"model":"')[1:]}
                self.answers.append(Answer(started, time.monotonic(), response.status_code, models, response.text))

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Ask during the block; every client was answered at least once before it begins, on average."""
        tasks = [asyncio.create_task(self.client(number)) for number in range(self.num_clients)]
        try:
            await self.until_more(self.num_clients)
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)

    async def until_more(self, num_answers: int) -> None:
        """Until so many more answers came."""
        goal = len(self.answers) + num_answers
        await until(lambda: len(self.answers) >= goal, timeout_s=120)

    @property
    def failed(self) -> list[Answer]:
        """Answers that are errors, by status or inside a stream."""
        return [answer for answer in self.answers if answer.status != 200 or '"error"' in answer.text]

    def models_since(self, started: float) -> set[str]:
        """What answered the requests that were sent from then on."""
        return {model for answer in self.answers if answer.started >= started for model in answer.models}
