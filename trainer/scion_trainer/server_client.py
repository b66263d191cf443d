"""The trainer's view of the model server: answers and log-probs, by model name, over the server's own HTTP API.

Owns requests, concurrency and retries. It knows nothing of gates, of the chat template or of the tokenizer: prompts to
be scored come as token ids, so what is scored is exactly what was trained. `ModelServer` is what the gates depend on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import httpx

from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_adapters.settings import Settings

EVALUATION_HEADER = "X-Scion-Evaluation"
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 300.0
MAX_TRIES = 6
RETRY_WAIT_S = 0.25
"""Doubled after every 503, so that a candidate which is still being loaded gets about 8 seconds."""

Message = Mapping[str, Any]
Scored = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and of the answer whose log-probs are wanted."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer. `num_tokens` counts the end token, if the model said it."""

    text: str
    finish_reason: str
    num_tokens: int


class ModelServer(Protocol):
    """What the gates need of a server; `ServerClient` is the real one."""

    def generate(
        self, model: str, messages_list: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        """One answer for each list of messages, in order; temperature 0 is greedy.

        The i-th answer is drawn with `seed` + i: one seed for all would draw the same manner for every prompt.
        """
        ...

    def score(self, model: str, items: Sequence[Scored]) -> list[list[float]]:
        """For each item the log-prob (nats) of every answer token, given the prompt and the tokens before it."""
        ...

    def max_length(self) -> int | None:
        """Longest prompt plus answer in tokens; None when the server does not say."""
        ...


class ServerClient:
    """`ModelServer` over HTTP. Thread-safe; close it, or use it as a context manager.

    `evaluation_keys` maps exact model names (`chat:8`) to the key that lets us, and nobody else, ask that version;
    requests that carry one are not recorded as users' traffic. `concurrency` None: as the gates ask.

    Raises UnavailableError when the server does not answer, NotFoundError when it does not know the model,
    InvalidInputError when it refuses a request.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        evaluation_keys: Mapping[str, str] | None = None,
        concurrency: int | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._keys = dict(evaluation_keys or {})
        self._url = settings.trainer.server_url.rstrip("/")
        self._sleep = sleep
        concurrency = concurrency or settings.gates.concurrency
        key = settings.trainer.api_key
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport,
            trust_env=False,  # a proxy of the environment must not come between us and the server's address
        )
        self._pool = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="server-client")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._http.close()

    def generate(
        self, model: str, messages_list: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        def ask(item: tuple[int, Sequence[Message]]) -> Answer:
            index, messages = item
            body = {
                "model": model,
                "messages": [dict(message) for message in messages],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed + index,
            }
            return _read_answer(self._post("/v1/chat/completions", body))

        return self._map(ask, list(enumerate(messages_list)))

    def score(self, model: str, items: Sequence[Scored]) -> list[list[float]]:
        def ask(item: Scored) -> list[float]:
            prompt, answer = item
            if not prompt or not answer:
                raise InvalidInputError("scoring needs at least one prompt token and one answer token")
            # vLLM always generates at least one token; it is thrown away.
            body = {
                "model": model,
                "prompt": [*prompt, *answer],
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,  # 0 = the token that stands there, and no alternatives
            }
            return _read_logprobs(self._post("/v1/completions", body), answer)

        return self._map(ask, items)

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """What `/v1/completions` answers to each body, in order: for callers that need more than text."""
        return self._map(lambda body: self._post("/v1/completions", dict(body)), bodies)

    def max_length(self) -> int | None:
        lengths = [card.get("max_model_len") for card in self._get("/v1/models")["data"]]
        return min((length for length in lengths if isinstance(length, int)), default=None)

    def models(self) -> list[str]:
        """Every model name that the server answers to."""
        return [str(card["id"]) for card in self._get("/v1/models")["data"]]

    def _map(self, ask: Callable[[_In], _Out], items: Sequence[_In]) -> list[_Out]:
        futures = [self._pool.submit(ask, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after the first failure the rest is not worth asking
                future.cancel()

    def _get(self, path: str) -> Any:
        return self._request("GET", path, None)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        key = self._keys.get(str(body["model"])) if body else None
        headers = {EVALUATION_HEADER: key} if key else {}
        wait_s = RETRY_WAIT_S
        for attempt in range(1, MAX_TRIES + 1):
            try:
                response = self._http.request(method, path, json=body, headers=headers)
            except httpx.HTTPError as error:
                raise UnavailableError(
                    f"the server at {self._url} does not answer ({type(error).__name__}: {error}); start it with "
                    f"`scion serve`, or correct trainer.server_url"
                ) from error
            if response.status_code != 503 or attempt == MAX_TRIES:
                break
            self._sleep(wait_s)
            wait_s *= 2
        if response.status_code != 200:
            raise _refusal(response, self._url, model=str(body["model"]) if body else None)
        return response.json()


def _read_answer(body: Any) -> Answer:
    choice = body["choices"][0]
    return Answer(
        text=choice["message"].get("content") or "",
        finish_reason=choice.get("finish_reason") or "",
        num_tokens=int(body["usage"]["completion_tokens"]),
    )


def _read_logprobs(body: Any, answer: Sequence[int]) -> list[float]:
    """vLLM's shape: one entry per prompt token, {"<token id>": {"logprob": …}}, and null for the first token."""
    entries = body["choices"][0].get("prompt_logprobs")
    if not entries:
        raise UnavailableError("the server's answer has no prompt_logprobs; it must be vLLM, started by `scion serve`")
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(entries[-len(answer) :], answer, strict=True)]


def _refusal(response: httpx.Response, url: str, *, model: str | None) -> Exception:
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    about = f"the server at {url} answered {response.status_code}" + (f" for model {model!r}" if model else "")
    match response.status_code:
        case 404 if model:
            return NotFoundError(f"{about}: {said}; is the version loaded (`scion status`), and is the name right?")
        case 401 | 403:
            return UnavailableError(f"{about}: {said}; set trainer.api_key (SCION_TRAINER__API_KEY)")
        case status if status < 500 and status != 429:
            return InvalidInputError(f"{about}: {said}")
        case _:
            return UnavailableError(f"{about}: {said}; see the server's log")
