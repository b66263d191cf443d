"""Sampling by token ids: the body that is sent, what is refused of an answer, and the probe of a server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.settings import Settings
from scion_adapters.steps import ROLLOUT_PRIORITY
from scion_trainer.rollouts.sampling import Sampling, check_server, own_seed, read_rollout, sample
from scion_trainer.server_client import ServerClient
from tests.helpers.fake_vllm import EOS, FakeVllm, log_probs

SETTINGS = Settings.model_validate({"trainer": {"server_url": "http://model-server:8000"}})
PROMPTS = [[7, 8, 9 + i] for i in range(12)]


def client(fake: FakeVllm) -> ServerClient:
    return ServerClient(SETTINGS, evaluation_keys={"steps-1:1": "the-key"}, transport=fake.transport())


def test_nothing_but_the_temperature_shapes_the_distribution() -> None:
    fake = FakeVllm()
    with client(fake) as server:
        sample(server, "steps-1:1", PROMPTS[:1], Sampling(16, 0.7, stop_ids=(3,)), seed=5)
    assert fake.bodies == [
        {
            "model": "steps-1:1",
            "prompt": PROMPTS[0],
            "max_tokens": 16,
            "temperature": 0.7,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "stop_token_ids": [3],
            "seed": own_seed(5, 0),
            "logprobs": 0,
            "return_token_ids": True,
            "priority": ROLLOUT_PRIORITY,
        }
    ]
    assert fake.headers[0]["x-scion-evaluation"] == "the-key"


def test_log_probs_are_those_of_the_sampled_ids_at_the_temperature() -> None:
    with client(FakeVllm()) as server:
        rollouts = sample(server, "m", PROMPTS, Sampling(8, 0.5), seed=1)
    expected = log_probs(0.5)
    assert [r.log_probs for r in rollouts] == [tuple(expected[t] for t in r.response_ids) for r in rollouts]
    assert {r.finished for r in rollouts} == {True, False}
    assert all(r.finished == (r.response_ids[-1] == EOS) for r in rollouts)


def test_seeds_of_neighbouring_steps_do_not_meet() -> None:
    seeds = {own_seed(step, index) for step in range(50) for index in range(200)}
    assert len(seeds) == 50 * 200
    assert all(0 <= own_seed(2**62 + step, 1) < 2**63 for step in range(3))


def drop(*path: Any) -> Callable[[Any], None]:
    def edit(answer: Any) -> None:
        for key in path[:-1]:
            answer = answer[key]
        del answer[path[-1]]

    return edit


def put(key: str, value: Any) -> Callable[[Any], None]:
    return lambda answer: answer["choices"][0].update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("choices", 0, "token_ids"), "token_ids"),  # an OpenAI-compatible server that is not vLLM
        (drop("choices", 0, "logprobs", "token_logprobs"), "token_logprobs"),
        (put("prompt_token_ids", [1, 7, 8, 9]), "tokenized them again"),  # a BOS was put in front
        (put("token_ids", []), "gave 0 tokens"),
        (put("logprobs", {"token_logprobs": [float("-inf")]}), "expected one number"),
        (put("logprobs", {"token_logprobs": [0.5]}), "expected one number"),  # raw logits, not log-probs
        (put("logprobs", {"token_logprobs": [-1.0] * 99}), "expected one number"),
        (put("finish_reason", "abort"), "abort"),
        (put("finish_reason", "repetition"), "repetition"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_refused(edit: Callable[[Any], None], message: str) -> None:
    fake = FakeVllm()
    answer: dict[str, Any] = {}
    with client(fake) as server:
        sample(server, "m", PROMPTS[:1], Sampling(4), seed=0)
    answer = fake._answer(fake.bodies[0])
    read_rollout(answer, PROMPTS[0])
    edit(answer)
    with pytest.raises(UnavailableError, match=message):
        read_rollout(answer, PROMPTS[0])


def test_a_server_is_probed_for_priorities_and_processed_log_probs() -> None:
    with client(FakeVllm()) as server:
        check_server(server, "base")
    for unfit in (FakeVllm(has_priorities=False), FakeVllm(has_processed_log_probs=False)):
        with client(unfit) as server, pytest.raises(UnavailableError, match=r"server\.ppo_rollouts = true"):
            check_server(server, "base")


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 1.0), (4, 0.0), (4, float("inf")), (4, float("nan"))])
def test_impossible_sampling_is_refused(tokens: int, temperature: float) -> None:
    with pytest.raises(InvalidInputError, match="temperature"):
        Sampling(tokens, temperature)


def test_an_empty_prompt_is_refused() -> None:
    with client(FakeVllm()) as server, pytest.raises(InvalidInputError, match="prompt token"):
        sample(server, "m", [[]], Sampling(4), seed=0)
