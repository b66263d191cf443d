"""Who says which of two answers is better: the reward model that passed its gate, or a model behind an endpoint.

Owns the question and the reading of the answer. It knows nothing of verdicts: that is the win-rate gate's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from scion_adapters.errors import UnavailableError
from scion_adapters.settings import Settings

TIE = 0.5
TIMEOUT_S = 300.0
MAX_TRIES = 6
RETRY_WAIT_S = 0.5
"""Doubled after every refusal for load: about 15 seconds in all."""
_LOAD = (429, 500, 502, 503, 504)
_OF_ALL = (401, 403, 404)
"""What is wrong with the settings, and not with one pair."""
_INSTRUCTION = (
    "Two assistants answered the same user. Decide which answer serves that user better: is it right, does it do what "
    "was asked, is it clear? Length by itself is no merit, and neither is coming first.\n"
    "Reply with one letter: A if answer A is better, B if answer B is better, T if neither is."
)
_LETTER = re.compile(r"\b([ABT])\b")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one conversation, in the order in which they are shown."""

    messages: Sequence[Mapping[str, Any]]
    first: str
    second: str


class Judge(Protocol):
    """`name` is shown in the report."""

    @property
    def name(self) -> str: ...

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """For each pair 1 if the first answer is better, 0 if the second is, TIE for neither; None when no verdict
        could be had. Raises UnavailableError when the judge is away.
        """
        ...

    def close(self) -> None: ...


class EndpointJudge:
    """A model behind an OpenAI-compatible endpoint, asked greedily (Zheng et al., 2023, arXiv 2306.05685).

    Such judges favour a position, so callers ask in both orders.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self.name = f"{model} at {url}"
        self._url, self._model, self._concurrency = url.rstrip("/"), model, concurrency
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=transport, trust_env=False)

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        """As in Judge. A pair that the endpoint refuses costs its own verdict; where it refuses all, it is away."""
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge") as pool:
            replies = list(pool.map(self._ask, pairs))
        faults = [reply for reply in replies if isinstance(reply, str)]
        if faults and len(faults) == len(replies):
            raise self._away(faults[0])
        return [None if isinstance(reply, str) else reply for reply in replies]

    def close(self) -> None:
        self._http.close()

    def _ask(self, pair: Pair) -> float | str | None:
        """The verdict, None for a reply without one, or in words why there is no reply."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question(pair)}],
            "max_tokens": 8,
            "temperature": 0.0,
        }
        response = self._post(body)
        if response.status_code in _OF_ALL:
            raise self._away(f"status {response.status_code}: {response.text[:200]}")
        if response.status_code != 200:
            return f"status {response.status_code}: {response.text[:200]}"
        try:
            return read_letter(str(response.json()["choices"][0]["message"]["content"]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return f"no chat completion ({type(error).__name__}: {error})"

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        """The last response, after trying again where the endpoint has too much to do."""
        wait_s = RETRY_WAIT_S
        for attempt in range(1, MAX_TRIES + 1):
            try:
                response = self._http.post(f"{self._url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise self._away(f"{type(error).__name__}: {error}") from error
            if response.status_code not in _LOAD or attempt == MAX_TRIES:
                break
            self._sleep(wait_s)
            wait_s *= 2
        return response

    def _away(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"the judge {self.name} gave no answer ({why}); see that it runs, or correct gates.judge_url and "
            "gates.judge_model"
        )


def question(pair: Pair) -> str:
    """What the judge is asked. The texts are fenced, so that what they say is not mistaken for instructions."""
    said = "\n".join(f"{message['role']}: {message.get('content', '')}" for message in pair.messages)
    return (
        f"{_INSTRUCTION}\n\n<conversation>\n{said}\n</conversation>\n\n<answer_A>\n{pair.first}\n</answer_A>\n\n"
        f"<answer_B>\n{pair.second}\n</answer_B>\n\nBetter answer (A, B or T):"
    )


def read_letter(text: str) -> float | None:
    """The verdict in a judge's reply; None when it has no lone A, B or T."""
    found = _LETTER.search(text.strip().upper() if len(text.strip()) <= 2 else text)
    return None if found is None else {"A": 1.0, "B": 0.0, "T": TIE}[found[1]]


def endpoint_judge(settings: Settings) -> EndpointJudge | None:
    """The configured one, or None when `gates.judge_url` is unset."""
    gates = settings.gates
    if gates.judge_url is None:
        return None
    return EndpointJudge(gates.judge_url, gates.judge_model, api_key=gates.judge_api_key, concurrency=gates.concurrency)
