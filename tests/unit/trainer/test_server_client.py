"""ServerClient against vLLM's HTTP shapes (a transport that answers by hand), and the contract over the fake server."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError, ScionError, UnavailableError
from scion_adapters.settings import Settings
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.server_client import EVALUATION_HEADER, MAX_TRIES, ServerClient
from tests.helpers.fake_server import FakeServer, FakeTokenizer, Persona
from tests.helpers.server_contract import CONTRACT, QUESTIONS, Subject

SETTINGS = Settings.model_validate({"trainer": {"server_url": "http://model-server:8000/", "api_key": "secret"}})
Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler, waits: list[float] | None = None) -> ServerClient:
    return ServerClient(
        SETTINGS,
        evaluation_keys={"chat:8": "the-key"},
        transport=httpx.MockTransport(handler),
        sleep=(waits if waits is not None else []).append,
    )


def chat_answer(text: str | None = "Paris.", finish_reason: str = "stop") -> httpx.Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return httpx.Response(200, json={"choices": [choice], "usage": {"completion_tokens": 3}})


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_fake_keeps_the_contract(check: Callable[[Subject], None]) -> None:
    check(Subject(FakeServer({"base": Persona()}), ChatTokens(FakeTokenizer()), "base"))


def test_a_question_is_sent_as_the_server_wants_it() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return chat_answer()

    with client(handler) as server:
        (answer,) = server.generate("chat:8", QUESTIONS[:1], max_tokens=16, temperature=0.5, seed=7)
    assert (answer.text, answer.finish_reason, answer.num_tokens) == ("Paris.", "stop", 3)
    body = json.loads(seen[0].content)
    assert body == {
        "model": "chat:8",
        "messages": [dict(message) for message in QUESTIONS[0]],
        "max_tokens": 16,
        "temperature": 0.5,
        "seed": 7,
    }
    assert str(seen[0].url) == "http://model-server:8000/v1/chat/completions"
    assert seen[0].headers["Authorization"] == "Bearer secret"
    assert seen[0].headers[EVALUATION_HEADER] == "the-key"


def test_only_the_version_under_evaluation_gets_the_key() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert EVALUATION_HEADER not in request.headers
        return chat_answer()

    with client(handler) as server:
        server.generate("base", QUESTIONS[:1], max_tokens=16, temperature=0.0, seed=0)


def test_an_answer_without_text_is_empty() -> None:
    with client(lambda request: chat_answer(None)) as server:
        assert server.generate("base", QUESTIONS[:1], max_tokens=1, temperature=0.0, seed=0)[0].text == ""


def test_the_log_prob_of_each_answer_token_is_picked() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["prompt"] == [5, 6, 7, 8]
        entries: list[Any] = [None, {"6": {"logprob": -9.0}}]  # the first token has none; the second is the prompt's
        entries += [{"7": {"logprob": -0.5}, "1": {"logprob": -0.1}}, {"8": {"logprob": -2.0}}]
        return httpx.Response(200, json={"choices": [{"text": "x", "prompt_logprobs": entries}]})

    with client(handler) as server:
        assert server.score("base", [([5, 6], [7, 8])]) == [[-0.5, -2.0]]


def test_a_server_that_gives_no_prompt_logprobs_is_named_as_the_cause() -> None:
    with (
        client(lambda request: httpx.Response(200, json={"choices": [{"text": "x"}]})) as server,
        pytest.raises(UnavailableError, match="prompt_logprobs"),
    ):
        server.score("base", [([1], [2])])


def test_503_is_tried_again_with_growing_waits() -> None:
    replies = iter([httpx.Response(503, json={"error": {"message": "loading"}}), httpx.Response(503), chat_answer()])
    waits: list[float] = []
    with client(lambda request: next(replies), waits) as server:
        assert server.generate("chat:8", QUESTIONS[:1], max_tokens=8, temperature=0.0, seed=0)[0].text == "Paris."
    assert waits == [0.25, 0.5]


def test_503_is_not_tried_for_ever() -> None:
    tries: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        return httpx.Response(503, json={"error": {"message": "still loading"}})

    with client(handler) as server, pytest.raises(UnavailableError, match="still loading"):
        server.generate("chat:8", QUESTIONS[:1], max_tokens=8, temperature=0.0, seed=0)
    assert len(tries) == MAX_TRIES


@pytest.mark.parametrize(
    ("status", "error", "says"),
    [
        (404, NotFoundError, "scion status"),  # the plugin does not know the version (yet)
        (400, InvalidInputError, "too long"),  # vLLM refuses the prompt
        (401, UnavailableError, "SCION_TRAINER__API_KEY"),  # no key, or a wrong one
        (429, UnavailableError, "too long"),  # a proxy's limit: not our mistake
        (500, UnavailableError, "server's log"),  # the engine died
    ],
)
def test_a_refusal_becomes_the_right_error_at_once(status: int, error: type[ScionError], says: str) -> None:
    tries: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tries.append(1)
        return httpx.Response(status, json={"error": {"message": "too long"}})

    with client(handler) as server, pytest.raises(error, match=says) as caught:
        server.generate("chat:8", QUESTIONS[:1], max_tokens=8, temperature=0.0, seed=0)
    assert "http://model-server:8000" in str(caught.value)
    assert len(tries) == 1


def test_a_server_that_is_away_is_unavailable_with_a_remedy() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with client(handler) as server, pytest.raises(UnavailableError, match="scion serve"):
        server.score("base", [([1], [2])])


def test_the_longest_length_is_the_shortest_of_the_models() -> None:
    cards = [{"id": "base", "max_model_len": 512}, {"id": "chat:8", "max_model_len": None}, {"id": "chat"}]
    with client(lambda request: httpx.Response(200, json={"data": cards})) as server:
        assert server.max_length() == 512
        assert server.models() == ["base", "chat:8", "chat"]
