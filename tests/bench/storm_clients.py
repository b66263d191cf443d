"""Clients of a swap storm: they keep a server busy without a pause and note what they saw of each answer.

Half of them stream; chat and completions; most ask for the adapter, some for an exact version that they were told.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import httpx

from tests.bench.storm import Answer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
MAX_TOKENS = (8, 16, 32)
PINNED_SHARE = 0.15


@dataclass(slots=True)
class Clients:
    """`num_clients` users; `pinned` names an exact version that may be asked for now, or None."""

    urls: list[str]
    num_clients: int
    pinned: Callable[[], str | None] = lambda: None
    model: str = "chat"
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)
    _prompt: list[int] = field(default_factory=list)  # MESSAGES in the chat template, for the completions route
    _stopping: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Clients:
        async with httpx.AsyncClient(timeout=60.0) as http:
            body = {"model": "base", "messages": MESSAGES}
            self._prompt = (await http.post(f"{self.urls[0]}/tokenize", json=body)).json()["tokens"]
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.num_clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        limits = httpx.Limits(max_keepalive_connections=2)
        async with httpx.AsyncClient(timeout=60.0, limits=limits) as http:
            for turn in count():
                if self._stopping:
                    return
                url = self.urls[turn % len(self.urls)]
                pinned = self.pinned() if rng.random() < PINNED_SHARE else None
                body = {
                    "model": pinned or self.model,
                    "max_tokens": rng.choice(MAX_TOKENS),
                    "temperature": 0.0,
                    "user": f"user-{number}",
                    "stream": rng.random() < 0.5,
                }
                is_chat = rng.random() < 0.5
                body |= {"messages": MESSAGES} if is_chat else {"prompt": self._prompt}
                path = "/v1/chat/completions" if is_chat else "/v1/completions"
                self.answers.append(await ask(http, url + path, body))


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, object]) -> Answer:
    """One request, noted as it was seen; a failure is an answer, too."""
    started = time.monotonic()
    models: set[str] = set()
    text, gaps, status, error = "", [], 0, ""
    try:
        async with http.stream("POST", url, json=body) as response:
            status = response.status_code
            if status != 200 or not body["stream"]:
                content = json.loads(await response.aread())
                if status == 200:
                    models.add(content["model"])
                    text = _text(content["choices"][0])
                else:
                    error = str(content)[:300]
            else:
                last: float | None = None
                async for line in response.aiter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    now = time.monotonic()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        error = str(chunk)[:300]
                        continue
                    models.add(chunk["model"])
                    text += "".join(_text(choice) for choice in chunk["choices"])
    except (httpx.HTTPError, ValueError, KeyError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    return Answer(
        user=str(body["user"]),
        asked=str(body["model"]),
        started=started,
        ended=time.monotonic(),
        status=status,
        models=frozenset(models),
        words=frozenset(text.split()[:-1]),
        gaps=tuple(gaps),
        error=error,
    )


def _text(choice: dict[str, object]) -> str:
    if "text" in choice:
        return str(choice["text"])
    part = choice.get("message") or choice.get("delta") or {}
    return str(part.get("content") or "") if isinstance(part, dict) else ""
