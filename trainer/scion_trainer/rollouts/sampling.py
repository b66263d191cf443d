"""Sampling by token ids over vLLM's `/v1/completions`: what is asked, what must come back, and what it means.

Owns the request's body and the reading of the answer, both pure, and the check that a server can be sampled from at
all. Knows nothing of which adapter is behind a model name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.steps import ROLLOUT_PRIORITY
from scion_trainer.rollouts.types import Rollout

PROBE_PROMPT = (1, 2, 3, 5, 8)
"""Ids that every vocabulary has. One alone could be padding, whose embedding is 0, so that all tokens are as likely."""
PROBE_TEMPERATURE = 0.5
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: nothing else shapes the distribution, so that log-probs are the policy's own."""

    max_new_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()  # tokens that end an answer, beside the model's own EOS
    priority: int = ROLLOUT_PRIORITY

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 < self.temperature < math.inf:
            raise InvalidInputError(
                f"sampling {self.max_new_tokens} tokens at temperature {self.temperature}: expected at least 1 token "
                "and a temperature above 0"
            )


class Completions(Protocol):
    """What sampling needs of a server; `ServerClient` has it."""

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The answer of `/v1/completions` to each body, in their order."""
        ...


def request_body(model: str, prompt: Sequence[int], sampling: Sampling, *, seed: int) -> dict[str, Any]:
    """One answer to `prompt`. Every parameter that a model's generation_config.json could set is set here.

    Raises InvalidInputError for an empty prompt.
    """
    if not prompt:
        raise InvalidInputError("a rollout needs at least one prompt token")
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "stop_token_ids": list(sampling.stop_ids),
        "seed": seed,
        "logprobs": 0,  # 0 = the sampled token, and no alternatives
        "return_token_ids": True,
        "priority": sampling.priority,
    }


def read_rollout(body: Any, prompt: Sequence[int]) -> Rollout:
    """The answer as the token ids that were sampled. Raises UnavailableError when it is not what was asked for."""
    try:
        choice = body["choices"][0]
        sent, response = choice["prompt_token_ids"], choice["token_ids"]
        log_probs, reason = choice["logprobs"]["token_logprobs"], choice["finish_reason"]
    except (KeyError, TypeError, IndexError) as error:
        raise UnavailableError(
            f"the server's answer has no {error}: it must be vLLM that returns token ids, started by `scion serve`"
        ) from error
    if list(sent or ()) != list(prompt):
        raise UnavailableError(
            f"the server read {len(sent or ())} prompt tokens where {len(prompt)} were sent: it tokenized them again"
        )
    if not response or len(log_probs) != len(response) or not all(_is_log_prob(value) for value in log_probs):
        raise UnavailableError(
            f"the server gave {len(response or ())} tokens with the log-probs {log_probs!s:.80}: expected one number "
            "at most 0 for each"
        )
    if reason not in ("stop", "length"):
        raise UnavailableError(f"an answer ended with finish_reason {reason!r}: expected stop or length")
    # vLLM's -9999 stands for minus infinity; rounding may put the log-prob of a certain token above 0.
    return Rollout(tuple(prompt), tuple(response), tuple(min(0.0, value) for value in log_probs), reason == "stop")


def sample(
    server: Completions, model: str, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int
) -> list[Rollout]:
    """One rollout for each prompt, in order; the i-th is drawn with a seed of its own, made of `seed` and i."""
    bodies = [request_body(model, prompt, sampling, seed=own_seed(seed, i)) for i, prompt in enumerate(prompts)]
    answers = server.complete(bodies)
    return [read_rollout(answer, prompt) for answer, prompt in zip(answers, prompts, strict=True)]


def own_seed(seed: int, index: int) -> int:
    """A seed for one request. Neighbouring seeds of steps must not meet: (seed, i + 1) is not (seed + 1, i)."""
    return (seed * 1_000_003 + index) % (1 << 63)


def check_server(server: Completions, model: str) -> None:
    """Raises UnavailableError when the server was not started for rollouts: priorities, processed log-probs.

    Log-probs are processed when they change with the temperature.
    """

    def top(temperature: float) -> dict[str, float]:
        body = request_body(model, PROBE_PROMPT, Sampling(1, temperature), seed=0) | {"logprobs": 5}
        try:
            (answer,) = server.complete([body])
        except InvalidInputError as error:
            raise UnavailableError(f"{error}; {REMEDY}") from error
        found: dict[str, float] = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return found

    plain, sharpened = top(1.0), top(PROBE_TEMPERATURE)
    shared = plain.keys() & sharpened.keys()
    if all(abs(plain[token] - sharpened[token]) < PROBE_TOLERANCE for token in shared):
        raise UnavailableError(f"the server reports log-probs before temperature; {REMEDY}")


REMEDY = "start it with server.ppo_rollouts = true"


def _is_log_prob(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value <= 1e-3
