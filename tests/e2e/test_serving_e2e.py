"""Real vLLM on the NF4 base: names, routes, streams, batches and what is recorded of them."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conftest import ADAPTERS, ServerWorld
from tests.helpers.waiting import wait_for
from vllm_scion.gateway import EVALUATION_HEADER

pytestmark = pytest.mark.e2e

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


def named(body: dict[str, Any]) -> tuple[str | None, str | None]:
    """(id, model) of a body or of an event, wherever the route puts them."""
    holder = body.get("message") or body.get("response") or body
    return holder.get("id"), holder.get("model")


def without_identity(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created", "model")}


async def test_a_mixed_batch_answers_each_with_its_own_version(world: ServerWorld) -> None:
    names = {name: f"{name}:{world.champion(name)}" for name in ADAPTERS} | {"base": "base", "chat:0": "base"}
    names["chat2@champion"] = names["chat2"]
    async with openai.AsyncOpenAI(base_url=f"{world.server.url}/v1", api_key="none", timeout=120) as client:

        async def ask(name: str, turn: int) -> tuple[str, set[str]]:
            asked: Any = {"model": name, "messages": QUESTION, "max_tokens": 4 + turn % 3, "user": f"user-{turn}"}
            if turn % 2:
                return name, {(await client.chat.completions.create(**asked)).model}
            chunks = await client.chat.completions.create(**asked, stream=True)
            return name, {chunk.model async for chunk in chunks}

        answers = await asyncio.gather(*(ask(name, turn) for turn in range(4) for name in names))
    assert {(name, *models) for name, models in answers} == set(names.items())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", list(ROUTES))
def test_every_route_routes_and_records(world: ServerWorld, path: str, stream: bool) -> None:
    response = world.ask("chat", path, stream=stream, temperature=0, user="ann", metadata={"conversation_id": "c-1"})
    assert response.status_code == 200, response.text
    bodies = events_of(response) if stream else [response.json()]
    ids, models = zip(*map(named, bodies), strict=True)
    assert set(filter(None, models)) == {"chat:1"}

    row = world.completion(next(filter(None, ids)))
    assert (row["adapter"], row["number"], row["probability"], row["rollout_id"]) == ("chat", 1, 1.0, None)
    assert (row["requested_model"], row["route"], row["stream"]) == ("chat", ROUTES[path], stream)
    assert row["user_hash"]
    assert row["conversation"] == "c-1"
    assert row["finish_reason"] in ("stop", "length")
    assert 1 <= row["completion_tokens"] <= 8
    assert row["prompt_tokens"] > 3
    assert row["latency_ms"] > 0
    assert (row["first_token_ms"] is not None) == stream
    (choice,) = row["choices"]
    answer = choice["text"] if "text" in choice else choice["message"]["content"]
    assert answer.strip()
    asked = json.dumps(row["request"])
    assert "capital of France" in asked
    assert "ann" not in asked.replace("France", "")
    if not stream and path == "/v1/chat/completions":
        assert answer == response.json()["choices"][0]["message"]["content"]


def test_the_adapter_is_really_applied(world: ServerWorld) -> None:
    def logprobs(model: str) -> list[float]:
        body = world.ask(model, temperature=0, logprobs=True, max_tokens=1).json()
        return [token["logprob"] for token in body["choices"][0]["logprobs"]["content"]]

    base, first, again, other = (logprobs(name) for name in ("chat:0", "chat:1", "chat:1", "chat2:1"))
    assert math.isclose(first[0], again[0], abs_tol=0.02)
    assert not math.isclose(first[0], base[0], abs_tol=1e-4)
    assert not math.isclose(first[0], other[0], abs_tol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "temperature": 1.0},  # several choices
        {"logprobs": True, "top_logprobs": 2},
        {
            "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}],
            "tool_choice": "none",
        },
        {"stop": ["."], "max_tokens": 16},
        {"return_token_ids": True},  # a vLLM extension
    ],
)
def test_options_pass_through_untouched(world: ServerWorld, options: dict[str, Any]) -> None:
    """`chat:0` goes through routing and recording, `base` past both: the same request gets the same answer."""
    asked = {"temperature": 0, "max_tokens": 6, **options}
    routed, direct = world.ask("chat:0", **asked), world.ask("base", **asked)
    assert routed.status_code == direct.status_code == 200, routed.text

    def shape(value: Any) -> Any:
        """Keys and types: the text itself may differ in a batch of another size."""
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return [shape(item) for item in value[:1]] if isinstance(value, list) else type(value).__name__

    assert shape(without_identity(routed.json())) == shape(without_identity(direct.json()))
    assert len(routed.json()["choices"]) == options.get("n", 1)
    assert len(world.completion(routed.json()["id"])["choices"]) == options.get("n", 1)


def test_a_badly_formed_request_is_vllms_business(world: ServerWorld) -> None:
    routed, direct = world.ask("chat", temperature=-1), world.ask("base", temperature=-1)
    assert routed.status_code == direct.status_code == 400
    assert routed.json() == direct.json()


def test_models_lists_names_aliases_and_versions(world: ServerWorld) -> None:
    cards = {card["id"]: card for card in world.client.get("/v1/models").json()["data"]}
    assert {"base", *ADAPTERS, "chat@champion", "chat:1", "chat2:1"} <= cards.keys()
    assert cards["chat"]["parent"] == "base"
    assert cards["chat"]["root"] == f"chat:{world.champion('chat')}"
    assert "#" not in "".join(cards)  # names in vLLM's table are nobody's business


@pytest.mark.parametrize("path", list(ROUTES))
def test_an_unknown_version_gets_vllms_404(world: ServerWorld, path: str) -> None:
    stock, ours = world.ask("nope", path), world.ask("chat:99", path)
    assert stock.status_code == ours.status_code == 404
    assert "does not exist" in stock.json()["error"]["message"]

    def shape(response: httpx.Response) -> Any:
        body = response.json()
        return {**body, "error": {**body["error"], "message": ""}}

    assert shape(ours) == shape(stock)
    assert "ask chat, a loaded version" in ours.json()["error"]["message"]


def test_store_false_is_respected(world: ServerWorld) -> None:
    declined = world.ask("chat", store=False).json()["id"]
    recorded = world.ask("chat").json()["id"]
    world.completion(recorded)  # written after the other would have been
    ids = {row["completion_id"] for row in world.client.get(f"/v1/feedback?completion_id={declined}").json()["data"]}
    assert ids == set()
    with pytest.raises(AssertionError, match="is recorded"):
        world.completion(declined, timeout_s=0.3)


def test_a_client_that_leaves_is_recorded_and_frees_its_version(world: ServerWorld) -> None:
    prompt = {"model": "chat", "prompt": "Tell me", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with world.client.stream("POST", "/v1/completions", json=prompt) as response:
        first = next(line for line in response.iter_lines() if line.startswith("data: {"))
    row = world.completion(json.loads(first[6:])["id"], timeout_s=30)
    assert (row["finish_reason"], row["choices"][0]["finish_reason"]) == ("cancelled", "cancelled")
    wait_for(lambda: all(v["in_flight"] == 0 for v in world.status()["resident"]), what="nothing in flight")


def test_a_candidate_is_there_for_the_gates_alone(world: ServerWorld) -> None:
    version = world.publish("chat")
    assert world.ask(str(version.ref)).status_code == 404
    world.registry.request_evaluation(version.ref)
    world.wait_loaded(version)
    key = {EVALUATION_HEADER: version.evaluation_key}
    evaluated = world.ask(str(version.ref), headers=key)
    assert (evaluated.status_code, evaluated.json()["model"]) == (200, str(version.ref))
    assert world.ask(str(version.ref)).status_code == 404
    assert str(version.ref) not in world.client.get("/v1/models").text

    scored = world.ask(str(version.ref), "/v1/completions", headers=key, prompt_logprobs=0, max_tokens=1)
    assert scored.status_code == 200, scored.text
    assert scored.json()["choices"][0]["prompt_logprobs"]

    world.registry.finish_evaluation(version.ref)
    world.registry.reject(version.ref, actor="test", reason="bad")
    world.wait_followed()
    assert world.ask(str(version.ref), headers=key).status_code == 404


def test_votes_about_a_real_answer(world: ServerWorld) -> None:
    answer = world.ask("chat", user="ann").json()
    row = world.completion(answer["id"])
    created = world.client.post("/v1/feedback", json={"completion_id": answer["id"], "value": "up", "id": "vote-1"})
    assert created.status_code == 201, created.text
    assert created.json()["completion_known"] is True
    again = world.client.post("/v1/feedback", json={"completion_id": answer["id"], "value": "up", "id": "vote-1"})
    assert (again.status_code, again.json()["id"]) == (200, "vote-1")
    listed = world.client.get("/v1/feedback", params={"completion_id": answer["id"]}).json()["data"]
    assert [vote["value"] for vote in listed] == [1.0]
    assert row["user_hash"]
    assert world.client.delete("/v1/feedback/vote-1").status_code == 200


def test_our_metrics_stand_beside_vllms(world: ServerWorld) -> None:
    before = world.metric("scion_requests_total", adapter="chat", outcome="ok", route="chat", version="1")
    world.ask("chat:1")
    after = world.metric("scion_requests_total", adapter="chat", outcome="ok", route="chat", version="1")
    assert after == before + 1
    assert world.metric("scion_capture_lost_total", reason="queue_full") == 0
    assert world.metric("scion_resident_versions") >= len(ADAPTERS)
    assert "vllm:num_requests_running" in world.client.get("/metrics").text
