"""Who says which of two answers is better: the reward model that passed its gate, or a model behind an endpoint.

Owns the question and the reading of the answer. It knows nothing of verdicts: that is the win-rate gate's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from scion_adapters.errors import UnavailableError
from scion_adapters.settings import Settings

TIE = 0.5
TIMEOUT_S = 300.0
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
    ) -> None:
        self.name = f"{model} at {url}"
        self._url, self._model, self._concurrency = url.rstrip("/"), model, concurrency
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, timeout=TIMEOUT_S, transport=transport, trust_env=False)

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="judge") as pool:
            return list(pool.map(self._ask, pairs))

    def close(self) -> None:
        self._http.close()

    def _ask(self, pair: Pair) -> float | None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question(pair)}],
            "max_tokens": 8,
            "temperature": 0.0,
        }
        try:
            response = self._http.post(f"{self._url}/chat/completions", json=body)
            response.raise_for_status()
            return read_letter(str(response.json()["choices"][0]["message"]["content"]))
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UnavailableError(
                f"the judge {self.name} gave no answer ({type(error).__name__}: {error}); see that it runs, or correct "
                "gates.judge_url and gates.judge_model"
            ) from error


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
