"""vLLM's `/v1/completions` by token ids, without a model: tokens are drawn from a fixed distribution by the seed.

`FakeVllm()` is the handler of an `httpx.MockTransport`. What it can be told to do wrong is what servers do wrong.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import httpx

EOS = 0
WEIGHTS = {EOS: 0.5, 1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0, 5: 0.5}
"""Unnormalised probabilities of the six tokens that there are."""


def log_probs(temperature: float) -> dict[int, float]:
    """The distribution at a temperature, in nats."""
    powers = {token: weight ** (1 / temperature) for token, weight in WEIGHTS.items()}
    return {token: math.log(power / sum(powers.values())) for token, power in powers.items()}


@dataclass
class FakeVllm:
    """`models` are the names that it knows (None: all). `edit` changes the answers."""

    models: Container[str] | None = None
    has_priorities: bool = True
    has_processed_log_probs: bool = True
    edit: Any = None
    is_away: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if self.is_away:
            raise httpx.ConnectError("refused")
        body = json.loads(request.content)
        self.bodies.append(body)
        self.headers.append(request.headers)
        if self.models is not None and body["model"] not in self.models:
            return _refused(404, f"The model {body['model']} does not exist.")
        if body["priority"] and not self.has_priorities:
            return _refused(400, "Got priority but the server does not use priority scheduling")
        answer = self._answer(body)
        if self.edit is not None:
            self.edit(answer)
        return httpx.Response(200, json=answer)

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        drawn_from = log_probs(body["temperature"])
        shown = drawn_from if self.has_processed_log_probs else log_probs(1.0)
        rng = random.Random(f"{body['seed']} {body['prompt']}")
        tokens: list[int] = []
        while len(tokens) < body["max_tokens"] and (not tokens or tokens[-1] != EOS):
            tokens += rng.choices(list(drawn_from), [math.exp(value) for value in drawn_from.values()])
        best = sorted(shown, key=lambda token: -shown[token])[: max(1, body["logprobs"])]
        choice = {
            "index": 0,
            "text": "".join(chr(97 + token) for token in tokens),
            "prompt_token_ids": body["prompt"],
            "token_ids": tokens,
            "finish_reason": "stop" if tokens[-1] == EOS else "length",
            "logprobs": {
                "token_logprobs": [shown[token] for token in tokens],
                "top_logprobs": [{str(token): shown[token] for token in best}] * len(tokens),
            },
        }
        return {"choices": [choice], "model": body["model"]}


def _refused(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})
