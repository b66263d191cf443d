from __future__ import annotations

import asyncio
import gc
import inspect
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from scion_adapters.routing import Routing, bucket
from scion_feedback.privacy import UserHasher
from tests.helpers.routing import make_line, make_routing
from vllm_scion.gateway import EVALUATION_HEADER, Gateway
from vllm_scion.handover import Handover
from vllm_scion.metrics import Metrics
from vllm_scion.serving import Published, Serving

KEY = b"a key of more than sixteen bytes"


@dataclass
class World:
    """A gateway whose versions all are loaded, and what it handed to the recorder."""

    routing: Routing
    resident: frozenset[int] = frozenset({11, 12})
    builds: list[Callable[[], Any]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {lora_id: f"secret-{lora_id}" for lora_id in self.resident}
        self.serving = Serving(Published(self.routing, self.resident, names))
        self.metrics = Metrics(CollectorRegistry())
        self.gateway = Gateway(self.serving, self.metrics, "base", Handover(self), KEY)

    def submit(self, build: Callable[[], Any]) -> bool:
        self.builds.append(build)
        return True

    def flush(self) -> None:
        pass

    def endpoint(self, respond: Callable[[str], Any], route: str = "chat", *, is_recorded: bool = True) -> Any:
        async def original(request: Any, raw_request: Request) -> Any:
            self.asked.append(request.model)
            answer = respond(request.model)
            return await answer if inspect.isawaitable(answer) else answer

        return self.gateway.wrap(original, route, is_recorded=is_recorded)

    def outcomes(self) -> dict[tuple[str, str], float]:
        samples = self.metrics["scion_requests_total"].collect()[0].samples
        return {
            (s.labels["version"], s.labels["outcome"]): s.value
            for s in samples
            if s.name.endswith("_total") and s.value
        }


def one_version(**changes: Any) -> World:
    return World(make_routing(make_line(accepted={1: 11, 2: 12}, **{"champion": 1, **changes})))


async def ask(endpoint: Any, model: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
    content = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}], **body}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    raw = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": raw}, receive)
    response = await endpoint(SimpleNamespace(model=model), request)
    await asyncio.sleep(0)  # what was put off until the answer has left
    return response


def chat_answer(model: str) -> JSONResponse:
    message = {"role": "assistant", "content": f"I am {model}"}
    return JSONResponse({"id": "chatcmpl-1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def chat_stream(model: str) -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        for word in ("I ", "am"):
            delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            yield f"data: {json.dumps({'id': 'chatcmpl-1', 'choices': [delta]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(chunks())


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("chat", "secret-11"),  # the champion
        ("chat:1", "secret-11"),
        ("chat@previous", "secret-12"),
        ("chat:0", "base"),  # the base itself
        ("base", "base"),  # not ours: left alone
        ("other", "other"),  # vLLM's own 404
    ],
)
async def test_names_are_routed_to_what_is_loaded(model: str, asked: str) -> None:
    world = one_version(previous=2, aliases={"previous": 2})
    await ask(world.endpoint(chat_answer), model)
    assert world.asked == [asked]


async def test_a_wrapped_endpoint_shows_the_signature_of_the_original() -> None:
    async def original(request: JSONResponse, raw_request: Request) -> Any: ...

    wrapped = one_version().gateway.wrap(original, "chat")
    assert inspect.signature(wrapped) == inspect.signature(original)


async def test_what_is_not_ours_is_neither_counted_nor_recorded() -> None:
    world = one_version()
    response = chat_answer("base")
    assert await ask(world.endpoint(lambda _: response), "base") is response
    assert world.outcomes() == {}
    assert world.builds == []


async def test_an_answer_is_recorded_after_it_left_with_its_version() -> None:
    world = one_version()
    response = await ask(world.endpoint(chat_answer), "chat", {"x-conversation-id": "c1"}, user="ann")
    assert json.loads(response.body)["choices"][0]["message"]["content"] == "I am secret-11"
    (build,) = world.builds
    record = build()
    assert (record.adapter, record.number, record.probability) == ("chat", 1, 1.0)
    assert (record.user_hash, record.conversation, record.stream) == (UserHasher(KEY).hash("ann"), "c1", False)
    assert world.outcomes() == {("1", "ok"): 1.0}


async def test_the_split_follows_the_user_and_its_probability_is_recorded() -> None:
    world = one_version(challenger=2, weight=0.3)
    endpoint = world.endpoint(chat_answer)
    for user in [f"user-{i}" for i in range(40)]:
        world.asked.clear()
        await ask(endpoint, "chat", user=user)
        await ask(endpoint, "chat", user=user)
        expected = "secret-12" if bucket("rollout-2", f"user:{user}") < 0.3 else "secret-11"
        assert world.asked == [expected, expected]
    probabilities = {(r.number, r.probability) for r in (build() for build in world.builds)}
    assert probabilities == {(1, 0.7), (2, 0.3)}


@pytest.mark.parametrize(
    ("body", "headers", "is_recorded", "records"),
    [
        ({}, {}, True, 1),
        ({"store": True}, {}, True, 1),
        ({"store": None}, {}, True, 1),
        ({"store": False}, {}, True, 0),  # the client asks not to be recorded
        ({}, {EVALUATION_HEADER: "key-9"}, True, 0),  # the gates' own questions
        ({}, {}, False, 0),  # a route that gives no answers, such as /tokenize
    ],
)
async def test_what_is_recorded(body: dict[str, Any], headers: dict[str, str], is_recorded: bool, records: int) -> None:
    world = one_version()
    await ask(world.endpoint(chat_answer, is_recorded=is_recorded), "chat", headers, **body)
    assert len(world.builds) == records
    assert world.outcomes() == {("1", "ok"): 1.0}


async def test_recording_can_be_off() -> None:
    world = one_version()
    world.gateway.handover = None
    await ask(world.endpoint(chat_answer), "chat")
    await drain(await ask(world.endpoint(chat_stream), "chat"))
    assert world.outcomes() == {("1", "ok"): 2.0}


@pytest.mark.parametrize("model", ["chat:99", "chat@nope", "chat:9"])
async def test_an_unknown_version_gets_vllms_own_404_with_our_explanation(model: str) -> None:
    line = make_line(accepted={1: 11}, candidates={9: 12}, champion=1)
    world = World(make_routing(line))

    def refuse(name: str) -> JSONResponse:
        return JSONResponse({"error": {"message": f"The model `{name}` does not exist.", "code": 404}}, status_code=404)

    response = await ask(world.endpoint(refuse), model)
    assert world.asked == [model]  # a candidate's real name in vLLM's table stays secret
    error = json.loads(response.body)["error"]
    assert response.status_code == error["code"] == 404
    assert error["message"].startswith(f"The model `{model}` does not exist. {model} is not served")
    assert world.outcomes() == {("", "unknown"): 1.0}


async def test_a_candidate_answers_only_to_its_evaluation_key() -> None:
    world = World(make_routing(make_line(accepted={1: 11}, candidates={9: 12}, champion=1)))
    await ask(world.endpoint(chat_answer), "chat:9", {EVALUATION_HEADER: "key-9"})
    await ask(world.endpoint(chat_answer), "chat:9", {EVALUATION_HEADER: "guess"})
    assert world.asked == ["secret-12", "chat:9"]
    assert world.builds == []


@pytest.mark.parametrize(
    ("route", "shape"),
    [("chat", {"error"}), ("messages", {"type", "error"})],  # OpenAI's shape, Anthropic's
)
async def test_nothing_loaded_yet_means_come_back_soon(route: str, shape: set[str]) -> None:
    world = World(make_routing(make_line(accepted={1: 11}, champion=1)), resident=frozenset())
    response = await ask(world.endpoint(chat_answer, route), "chat")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert set(json.loads(response.body)) == shape
    assert world.asked == []
    assert world.outcomes() == {("", "unavailable"): 1.0}


async def drain(response: StreamingResponse) -> list[Any]:
    return [chunk async for chunk in response.body_iterator]


async def test_a_stream_passes_unchanged_and_is_recorded_at_its_end() -> None:
    world = one_version()
    response = await ask(world.endpoint(chat_stream), "chat")
    assert world.builds == []
    assert world.serving.in_flight[11] == 1
    chunks = await drain(response)
    assert chunks == await drain(chat_stream("x"))
    record = world.builds[0]()
    assert record.choices[0]["message"]["content"] == "I am"
    assert record.stream
    assert record.first_token_ms <= record.latency_ms
    assert world.serving.in_flight[11] == 0
    assert world.outcomes() == {("1", "ok"): 1.0}


async def test_a_client_that_leaves_in_mid_stream_is_recorded_as_cancelled() -> None:
    world = one_version()
    response = await ask(world.endpoint(chat_stream), "chat")
    stream = response.body_iterator
    await anext(stream)
    await stream.aclose()
    record = world.builds[0]()
    assert (record.choices[0]["message"]["content"], record.finish_reason) == ("I ", "cancelled")
    assert world.serving.in_flight[11] == 0
    assert world.outcomes() == {("1", "cancelled"): 1.0}


async def test_a_stream_that_is_never_read_does_not_stay_in_flight() -> None:
    world = one_version()
    response = await ask(world.endpoint(chat_stream), "chat")
    assert world.serving.in_flight[11] == 1
    del response
    gc.collect()
    assert world.serving.in_flight[11] == 0


async def test_a_stream_that_breaks_is_an_error_and_lands() -> None:
    async def broken() -> AsyncIterator[str]:
        yield 'data: {"id": "chatcmpl-1", "choices": []}\n\n'
        raise RuntimeError("engine died")

    world = one_version()
    response = await ask(world.endpoint(lambda _: StreamingResponse(broken())), "chat")
    with pytest.raises(RuntimeError, match="engine died"):
        await drain(response)
    assert world.serving.in_flight[11] == 0
    assert world.outcomes() == {("1", "error"): 1.0}


class FakeError(Exception):
    pass


@pytest.mark.parametrize(
    ("respond", "outcome", "raised"),
    [
        (lambda _: JSONResponse({}, status_code=400), "rejected", None),
        (lambda _: JSONResponse({}, status_code=500), "error", None),
        (lambda _: None, "cancelled", None),  # vLLM's with_cancellation: the client left
        (lambda _: _raise(ValueError("bad")), "rejected", ValueError),  # vLLM's handlers make a 400 of it
        (lambda _: _raise(FakeError()), "error", FakeError),
        (lambda _: _raise(asyncio.CancelledError()), "cancelled", asyncio.CancelledError),
    ],
)
async def test_failures_are_counted_never_recorded_and_land(
    respond: Callable[[str], Any], outcome: str, raised: type[BaseException] | None
) -> None:
    world = one_version()
    endpoint = world.endpoint(respond)
    if raised is None:
        await ask(endpoint, "chat")
    else:
        with pytest.raises(raised):
            await ask(endpoint, "chat")
    assert world.outcomes() == {("1", outcome): 1.0}
    assert world.builds == []
    assert world.serving.in_flight[11] == 0


def _raise(error: BaseException) -> Any:
    raise error


async def test_a_failed_stream_response_is_passed_on_as_it_is() -> None:
    world = one_version()
    refused = StreamingResponse(iter(()), status_code=429)
    assert await ask(world.endpoint(lambda _: refused), "chat") is refused
    assert world.outcomes() == {("1", "rejected"): 1.0}
    assert world.serving.in_flight[11] == 0
