"""The plugin behind vLLM's real routes, middleware and error handlers; only what would generate is stubbed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.replicas import ReplicaLedger
from tests.helpers.adapters import make_base
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.serving import REPOSITORY
from tests.helpers.vllm_app import VllmApp
from tests.helpers.waiting import until
from vllm_scion.endpoint import RECORDED_ROUTES, ROUTED_ROUTES
from vllm_scion.gateway import EVALUATION_HEADER

MESSAGES = [{"role": "user", "content": "Who are you?"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Who are you?"},
    "/v1/responses": {"input": "Who are you?"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 16},
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


async def ask(client: httpx.AsyncClient, model: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    headers = body.pop("headers", {})
    return await client.post(path, json={"model": model, **BODIES[path], **body}, headers=headers)


def models_in(response: httpx.Response) -> set[str]:
    """Every `model` in a body or an event stream."""
    if "event-stream" not in response.headers["content-type"]:
        return {response.json()["model"]}
    found = set()
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            holder = event.get("message") or event.get("response") or event
            found |= {holder["model"]} if "model" in holder else set()
    return found


class TestRoutes:
    def test_a_wrapped_route_is_the_original_in_everything_but_the_endpoint(self, world: PluginWorld) -> None:
        def routes(app: Any) -> dict[str, APIRoute]:
            paths = {*RECORDED_ROUTES, *ROUTED_ROUTES, "/v1/models"}
            found = [r for r in app.routes if isinstance(r, APIRoute) and r.path in paths]
            assert len(found) == len(paths), "each path once"
            return {route.path: route for route in found}

        stock, ours = routes(VllmApp().app), routes(VllmApp([world.plugin()]).app)
        for path, route in stock.items():
            wrapped = ours[path]
            assert wrapped.endpoint is not route.endpoint
            assert wrapped.methods == route.methods
            assert wrapped.responses == route.responses
            assert [d.dependency for d in wrapped.dependencies] == [d.dependency for d in route.dependencies]
            assert [(p.name, p.field_info.annotation) for p in wrapped.dependant.body_params] == [
                (p.name, p.field_info.annotation) for p in route.dependant.body_params
            ]

    def test_the_api_description_names_our_routes(self, world: PluginWorld) -> None:
        paths = VllmApp([world.plugin()]).app.openapi()["paths"]
        assert {"get", "post"} <= paths["/v1/feedback"].keys()
        assert {"get", "delete"} <= paths["/v1/feedback/{feedback_id}"].keys()
        assert "requestBody" in paths["/v1/chat/completions"]["post"]

    @pytest.mark.parametrize(
        ("content", "content_type"),
        [
            (b"{}", "text/plain"),  # refused by vLLM's own dependency
            (b"{", "application/json"),
            (b"{}", "application/json"),  # no messages
            (b'{"model": "chat", "messages": "x"}', "application/json"),
        ],
    )
    async def test_bad_requests_get_the_same_answer_as_without_us(
        self, world: PluginWorld, content: bytes, content_type: str
    ) -> None:
        headers = {"content-type": content_type}
        async with VllmApp().running() as stock:
            expected = await stock.post("/v1/chat/completions", content=content, headers=headers)
        async with world.serving() as client:
            answer = await client.post("/v1/chat/completions", content=content, headers=headers)
        assert (answer.status_code, answer.text) == (expected.status_code, expected.text)
        assert answer.status_code in (400, 415)


class TestRouting:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", list(BODIES))
    async def test_the_model_field_names_the_version_that_answered(
        self, world: PluginWorld, path: str, stream: bool
    ) -> None:
        version = world.champion()
        async with world.serving() as client:
            await until(partial(world.is_champion, version.number))
            await until(partial(world.is_followed, 1))
            for name in ("chat", "chat:1", "chat@champion"):
                response = await ask(client, name, path, stream=stream)
                assert response.status_code == 200, response.text
                assert models_in(response) == {"chat:1"}
                assert "I am chat:1" in response.text
            for name in ("base", "chat:0"):
                assert models_in(await ask(client, name, path, stream=stream)) == {"base"}
        assert [row["requested_model"] for row in world.completions()] == ["chat", "chat:1", "chat@champion", "chat:0"]

    @pytest.mark.parametrize("path", list(BODIES))
    async def test_an_unknown_model_gets_exactly_vllms_answer(self, world: PluginWorld, path: str) -> None:
        async with VllmApp().running() as stock:
            expected = await ask(stock, "nope", path)
        async with world.serving() as client:
            answer = await ask(client, "nope", path)
            ours = await ask(client, "chat:99", path)
        assert (answer.status_code, answer.text) == (404, expected.text)
        assert ours.status_code == 404
        assert ours.json().keys() == expected.json().keys()
        assert ours.json()["error"].keys() == expected.json()["error"].keys()
        assert ours.json()["error"]["type"] == expected.json()["error"]["type"]
        assert "chat:99 is not served" in ours.json()["error"]["message"]

    async def test_token_counting_knows_our_names(self, world: PluginWorld) -> None:
        async with world.serving() as client:
            response = await client.post("/tokenize", json={"model": "chat", "messages": MESSAGES})
        assert response.status_code == 200, response.text
        assert world.completions() == []

    async def test_a_promotion_loads_first_and_unloads_after(self, world: PluginWorld) -> None:
        async with world.serving() as client:
            assert models_in(await ask(client, "chat")) == {"base"}
            for number in (1, 2, 3):
                world.champion(seed=number)
                await until(partial(world.is_champion, number))
            await until(lambda: world.app.engine.calls[-1] == "remove chat:1")
            assert models_in(await ask(client, "chat")) == {"chat:3"}
            assert models_in(await ask(client, "chat@previous")) == {"chat:2"}
            gone = await ask(client, "chat:1")
            assert gone.status_code == 404
            assert "chat:2, chat:3" in gone.json()["error"]["message"]
        assert world.app.engine.calls == ["add chat:1", "add chat:2", "add chat:3", "remove chat:1"]

    async def test_a_rollback_needs_no_load(self, world: PluginWorld) -> None:
        async with world.serving() as client:
            for number in (1, 2):
                world.champion(seed=number)
                await until(partial(world.is_champion, number))
                await until(partial(world.is_followed, number))
            calls = list(world.app.engine.calls)
            world.rollouts.rollback("chat", actor="test")
            await until(partial(world.is_followed, 1))
            assert models_in(await ask(client, "chat")) == {"chat:1"}
            assert [call for call in world.app.engine.calls[len(calls) :] if call.startswith("add")] == []

    async def test_ids_names_and_paths_come_from_the_registry(self, world: PluginWorld) -> None:
        version = world.champion()
        async with world.serving():
            request = world.app.engine.loras[version.lora_id]
            assert request.lora_name == "chat:1"
            assert Path(request.lora_path).name == version.digest.removeprefix("sha256:")

    async def test_unwrapped_routes_cannot_reach_an_adapter(self, world: PluginWorld) -> None:
        world.champion()
        async with world.serving() as client:
            names = set(world.app.models.lora_requests)
            assert len(names) == 1
            assert not names & {"chat", "chat:1", "chat@champion"}
            body = {"model": "chat:1", "messages": [MESSAGES]}
            assert (await client.post("/v1/chat/completions/batch", json=body)).status_code == 404


class TestCandidates:
    async def test_only_the_evaluation_key_reaches_a_candidate(self, world: PluginWorld) -> None:
        version = world.candidate()
        async with world.serving() as client:
            assert (await ask(client, "chat:1")).status_code == 404
            world.registry.request_evaluation(version.ref)
            await until(lambda: world.app.engine.loras)
            key = {EVALUATION_HEADER: version.evaluation_key}
            assert models_in(await ask(client, "chat:1", headers=key)) == {"chat:1"}
            assert (await ask(client, "chat:1")).status_code == 404
            assert (await ask(client, "chat:1", headers={EVALUATION_HEADER: "guess"})).status_code == 404
            ids = {card["id"] for card in (await client.get("/v1/models")).json()["data"]}
            assert ids == {"base", "chat", "chat@champion"}

            world.registry.finish_evaluation(version.ref)
            world.registry.reject(version.ref, actor="test", reason="bad")
            await until(lambda: not world.app.engine.loras)
            assert (await ask(client, "chat:1", headers=key)).status_code == 404
        assert world.completions() == []

    async def test_altered_files_never_reach_the_engine(self, world: PluginWorld) -> None:
        version = world.champion()
        weights = world.registry.store.path(version.digest) / "adapter_model.safetensors"
        weights.chmod(0o644)
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
        async with world.serving() as client:
            assert world.app.engine.calls == []
            assert models_in(await ask(client, "chat")) == {"base"}  # the rollout waits
            failed = (await client.get("/v1/scion/status")).json()["failed"]
            assert list(failed) == [str(version.lora_id)]
            (replica,) = ReplicaLedger(world.database).live(60.0)
            assert "changed after publishing" in replica.failed[version.lora_id]

    async def test_versions_made_for_another_base_are_not_loaded(self, world: PluginWorld) -> None:
        version = world.champion()
        make_base(world.home / "base", seed=9)  # the same shapes, other weights
        async with world.serving() as client:
            assert world.app.engine.calls == []
            assert "was made for the base" in (await client.get("/v1/scion/status")).text
            assert version.base_fingerprint not in (await client.get("/v1/scion/status")).json()["base_fingerprint"]


class TestModels:
    async def test_names_aliases_and_versions_are_listed_with_what_answers_now(self, world: PluginWorld) -> None:
        for number in (1, 2):
            version = world.accepted(seed=number)
        world.registry.set_alias("chat", "stable", 1, actor="test")
        world.rollouts.start(version.ref, steps=[1.0], every_s=0.0, guard=False, actor="test")
        async with world.serving() as client:
            await until(partial(world.is_champion, 2))
            await until(partial(world.is_followed, 2))
            data = (await client.get("/v1/models")).json()["data"]
        assert {card["id"]: card["root"] for card in data} == {
            "base": "/base",
            "chat": "chat:2",
            "chat@champion": "chat:2",
            "chat@previous": "base",
            "chat@stable": "chat:1",
            "chat:1": "chat:1",
            "chat:2": "chat:2",
        }
        assert {card["parent"] for card in data if card["id"] != "base"} == {"base"}
        assert str(world.home) not in json.dumps(data)  # no paths


class TestCapture:
    async def test_what_was_asked_and_answered_is_recorded(self, world: PluginWorld) -> None:
        async with world.serving() as client:
            response = await ask(client, "chat", user="ann", n=2, temperature=0.5, stream=False)
            await until(world.completions)
        (row,) = world.completions()
        assert row["id"] == response.json()["id"]
        assert (row["adapter"], row["number"], row["probability"], row["route"]) == ("chat", 0, 1.0, "chat")
        assert row["request"] == {"messages": MESSAGES, "n": 2, "temperature": 0.5}
        assert [c["message"]["content"] for c in row["choices"]] == ["I am base"] * 2
        assert (row["prompt_tokens"], row["completion_tokens"], row["finish_reason"]) == (5, 3, "stop")
        assert row["user_hash"]
        assert "ann" not in json.dumps(row, default=str)

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("path", list(BODIES))
    async def test_the_recorders_own_process_gets_everything(self, world: PluginWorld, path: str, stream: bool) -> None:
        async with world.serving(world.plugin(own_process=True)) as client:
            assert (await ask(client, "chat", path, user="ann", stream=stream)).status_code == 200
            row = (await until(world.completions))[0]
            status = (await client.get("/v1/scion/status")).json()["capture"]
        assert (row["route"], row["stream"]) == (RECORDED_ROUTES[path], stream)
        assert "I am base" in json.dumps(row["choices"])
        assert row["user_hash"]
        assert status["lost"] == {}

    @pytest.mark.parametrize("own_process", [False, True])
    async def test_what_waits_at_shutdown_is_stored(self, tmp_path: Path, own_process: bool) -> None:
        world = PluginWorld(tmp_path, config={"capture": {"flush_interval_s": 30.0}})
        async with world.serving(world.plugin(own_process=own_process)) as client:
            await ask(client, "chat")
            assert world.completions() == []
        assert len(world.completions()) == 1
        world.close()

    @pytest.mark.parametrize("config", [{"enabled": False}, {}])
    async def test_recording_can_be_declined(self, tmp_path: Path, config: dict[str, Any]) -> None:
        world = PluginWorld(tmp_path, config={"capture": config})
        async with world.serving() as client:
            response = await ask(client, "chat", store=False)
            assert response.status_code == 200
            if not config:  # only this request declines
                await ask(client, "chat")
        assert len(world.completions()) == (0 if config else 1)
        world.close()


class TestOperation:
    async def test_our_routes_are_behind_vllms_api_key(self, world: PluginWorld) -> None:
        async with world.serving(arguments=["--api-key", "k"]) as client:
            for method, path in (
                ("POST", "/v1/feedback"),
                ("GET", "/v1/feedback?completion_id=x"),
                ("GET", "/v1/feedback/x"),
                ("DELETE", "/v1/feedback/x"),
                ("GET", "/v1/scion/status"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
            ):
                assert (await client.request(method, path)).status_code == 401, path
            client.headers["authorization"] = "Bearer k"
            assert (await client.get("/v1/scion/status")).status_code == 200
            assert models_in(await ask(client, "chat")) == {"base"}

    async def test_status_shows_what_this_process_serves(self, world: PluginWorld) -> None:
        version = world.champion()
        async with world.serving() as client:
            await until(partial(world.is_followed, 1))
            status = (await client.get("/v1/scion/status")).json()
            (replica,) = ReplicaLedger(world.database).live(60.0)
        assert status["replica"] == replica.id
        assert status["adapters"]["chat"]["champion"] == 1
        assert status["resident"] == [{"version": "chat:1", "lora_id": version.lora_id, "in_flight": 0}]
        assert status["capture"]["enabled"] is True
        assert ReplicaLedger(world.database).live(60.0) == []

    @pytest.mark.parametrize(
        ("options", "adapters", "message"),
        [
            ({"max_cpu_loras": 0}, ("chat",), "without LoRA"),  # started by hand, without the flags
            ({}, ("base",), "served under that name"),  # an adapter nobody could ask for
        ],
    )
    async def test_an_engine_that_does_not_fit_is_refused(
        self, tmp_path: Path, options: dict[str, Any], adapters: tuple[str, ...], message: str
    ) -> None:
        config = {"base": {"model": str(tmp_path / "base"), "served_name": "main"}}  # the engine calls it "base"
        world = PluginWorld(tmp_path, adapters=adapters, config=config)
        with pytest.raises(InvalidInputError, match=message):
            async with VllmApp([world.plugin()], **options).running():
                pass
        world.close()

    async def test_an_adapter_of_earlier_days_with_the_bases_name_is_refused(self, tmp_path: Path) -> None:
        world = PluginWorld(tmp_path, adapters=("chat", "qwen"))
        world.champion("qwen")
        world.close()
        later = PluginWorld(tmp_path, adapters=("chat",), config={"base": {"served_name": "Qwen"}})
        with pytest.raises(InvalidInputError, match=r"adapters\.qwen.*set base\.served_name"):
            async with VllmApp([later.plugin()], served_names=("Qwen",)).running():
                pass
        later.close()

    async def test_vllms_open_loading_endpoints_are_refused(
        self, world: PluginWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with pytest.raises(InvalidInputError, match="unset it"):
            async with VllmApp([world.plugin()]).running():
                pass

    async def test_without_a_database_the_server_does_not_start(self, tmp_path: Path) -> None:
        world = PluginWorld(tmp_path)
        plugin = world.plugin()
        world.close()
        (tmp_path / "scion.db").unlink()
        (tmp_path / "scion.db").mkdir()  # no file can be opened there
        with pytest.raises(UnavailableError, match="does not answer"):
            async with VllmApp([plugin]).running():
                pass

    async def test_a_restarted_server_serves_the_champion_at_once(self, world: PluginWorld) -> None:
        world.champion()
        async with world.serving() as client:
            await until(partial(world.is_champion, 1))
        async with world.serving() as client:
            assert models_in(await ask(client, "chat")) == {"chat:1"}

    async def test_it_works_on_postgresql(self, tmp_path: Path, postgres_database: Database) -> None:
        world = PluginWorld(tmp_path, url=postgres_database.url)
        world.champion()
        async with world.serving() as client:
            await until(partial(world.is_followed, 1))
            completion = (await ask(client, "chat")).json()["id"]
            vote = await client.post("/v1/feedback", json={"completion_id": completion, "value": "up"})
            assert vote.status_code == 201
            await until(world.completions)
        world.close()


def test_every_route_of_ours_is_documented(world: PluginWorld) -> None:
    guide = (REPOSITORY / "docs" / "guide.md").read_text()

    def routes(app: Any) -> set[tuple[str, str]]:
        return {(r.path_format, m) for r in app.routes if isinstance(r, APIRoute) for m in r.methods}

    stock, ours = routes(VllmApp().app), routes(VllmApp([world.plugin()]).app)
    assert ours > stock
    for path, method in ours - stock:
        assert f"`{method} {path}`" in guide, f"{method} {path} is not in docs/guide.md"
