"""What a user's application does: asks through the official OpenAI client, and rates with one plain POST.

Owns the two requests and what counts as an answer. It knows nothing of facts, manners or votes' reasons. Nothing is
retried: a failure that a retry hides is a failure that nobody sees.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from scion_demo.errors import DemoError

TIMEOUT_S = 60.0
MAX_TOKENS = 48
TEMPERATURE = 1.0


class IncompleteAnswerError(DemoError):
    """The server answered 2xx but not with a whole answer, such as a stream that just ends."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `version` is the response's `model`, the exact version that gave it."""

    completion_id: str
    version: str
    text: str


@dataclass(frozen=True, slots=True)
class Rating:
    """The body of a feedback request, but for the completion and the user; `value` is "up" or "down"."""

    value: str
    comment: str | None = None
    correction: str | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """Both requests against one server. Anything but a whole 2xx answer raises."""

    openai: AsyncOpenAI
    http: httpx.AsyncClient
    root: str
    api_key: str

    async def ask(
        self,
        model: str,
        question: str,
        *,
        user: str,
        streamed: bool = False,
        seed: int | None = None,
        extra_body: dict[str, object] | None = None,
    ) -> Answer:
        """One single-turn chat completion at temperature 1, whole or streamed."""
        message = ChatCompletionUserMessageParam(role="user", content=question)
        if streamed:
            return await self._ask_streamed(model, message, user=user, seed=seed, extra_body=extra_body)
        completion = await self.openai.chat.completions.create(
            model=model,
            messages=[message],
            user=user,
            seed=seed,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            extra_body=extra_body,
        )
        if not completion.choices:
            raise IncompleteAnswerError(f"completion {completion.id} has no choices: see the server's log")
        return Answer(completion.id, completion.model, completion.choices[0].message.content or "")

    async def _ask_streamed(
        self,
        model: str,
        message: ChatCompletionUserMessageParam,
        *,
        user: str,
        seed: int | None,
        extra_body: dict[str, object] | None,
    ) -> Answer:
        stream = await self.openai.chat.completions.create(
            model=model,
            messages=[message],
            user=user,
            seed=seed,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            extra_body=extra_body,
            stream=True,
        )
        completion_id, version, pieces, finished = "", "", list[str](), False
        async for chunk in stream:
            completion_id, version = chunk.id, chunk.model
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finished = finished or choice.finish_reason is not None
        if not finished:
            raise IncompleteAnswerError(
                f"stream {completion_id!r} ended unfinished after {len(pieces)} chunks: see the server's log"
            )
        return Answer(completion_id, version, "".join(pieces))

    async def rate(self, completion_id: str, rating: Rating, *, user: str) -> None:
        """Posts a rating; the idempotency key names the completion, so that one answer has one vote."""
        body = {"completion_id": completion_id, "value": rating.value, "user": user}
        if rating.comment is not None:
            body["comment"] = rating.comment
        if rating.correction is not None:
            body["correction"] = rating.correction
        headers = {"Idempotency-Key": f"vote-{completion_id}", "Authorization": f"Bearer {self.api_key}"}
        response = await self.http.post(f"{self.root}/v1/feedback", json=body, headers=headers)
        if not response.is_success:
            raise httpx.HTTPStatusError(
                f"{response.status_code} {response.text[:200]}", request=response.request, response=response
            )


@asynccontextmanager
async def connect(base_url: str, *, api_key: str, transport: httpx.AsyncBaseTransport | None) -> AsyncIterator[Client]:
    """A client of the server at `base_url`, with or without a trailing `/v1`; `transport` replaces the network."""
    root = base_url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(timeout=TIMEOUT_S, transport=transport) as http:
        # The cast: openai 3 takes this client but is typed for httpx2's, earlier ones are typed for it.
        openai = AsyncOpenAI(base_url=f"{root}/v1", api_key=api_key, http_client=cast("Any", http), max_retries=0)
        yield Client(openai=openai, http=http, root=root, api_key=api_key)
