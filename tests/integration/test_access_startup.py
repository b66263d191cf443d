"""Every route of vLLM's application has a scope that somebody decided on; an open server says so; gates have a key."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.keys import Scope, create_key
from scion_adapters.settings import load_settings
from scion_trainer.server_client import ServerClient
from tests.helpers.access import CHAT, bearer, server_log, status
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.vllm_app import VllmApp
from tests.helpers.waiting import until
from vllm_scion.authority import required_scope


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with server_log(caplog):
        yield caplog


# --- every route of vLLM's application --------------------------------------------------------------------------------

OPEN_ROUTES = {"GET /health", "GET /ping", "POST /ping", "GET /metrics", "GET /version", "GET /load"}
CHAT_ROUTES = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "GET /v1/responses/{response_id}",
    "POST /v1/responses/{response_id}/cancel",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "POST /v1/feedback",
    "GET /v1/feedback",
    "GET /v1/feedback/{feedback_id}",
    "DELETE /v1/feedback/{feedback_id}",
}
OPS_ROUTES = {
    # ours
    "GET /v1/scion/status",
    "GET /v1/adapters",
    "GET /v1/adapters/{name}",
    "GET /v1/adapters/{name}/versions",
    "GET /v1/adapters/{name}/versions/{number}",
    "POST /v1/adapters/{name:path}/versions",
    # vLLM's that ask a model past the routing
    "POST /invocations",
    "POST /inference/v1/generate",
    "POST /v1/chat/completions/batch",
    "POST /generative_scoring",
    "POST /v1/systemone",
    # vLLM's that render and parse: for servers in front of engines
    "POST /v1/chat/completions/render",
    "POST /v1/completions/render",
    "POST /v1/messages/render",
    "POST /v1/responses/render",
    "POST /v1/chat/completions/derender",
    "POST /v1/completions/derender",
    # vLLM's that act on the engine or tell of it
    "POST /inference/v1/abort_requests",
    "POST /scale_elastic_ep",
    "POST /is_scaling_elastic_ep",
    "GET /kv_event_sources",
    # FastAPI's
    "GET /docs",
    "GET /docs/oauth2-redirect",
    "GET /redoc",
    "GET /openapi.json",
}


def routes_of(app: VllmApp) -> set[str]:
    """`METHOD /path` of each; HEAD comes with GET."""
    found = set()
    for route in app.app.routes:
        methods = getattr(route, "methods", None) or {"GET"}  # a mounted application names none
        found |= {f"{method} {route.path}" for method in methods if method != "HEAD"}
    return found


def scope_of(route: str) -> Scope | None:
    return required_scope(*re.sub(r"{\w+(:path)?}", "x", route).split(" "))


def test_somebody_decided_on_every_route(tmp_path: Path) -> None:
    world = PluginWorld(tmp_path)
    routes = routes_of(VllmApp([world.plugin()]))
    assert routes == OPEN_ROUTES | CHAT_ROUTES | OPS_ROUTES, "decide on it: here, and in authority.py"
    scopes: dict[str, Scope | None] = {
        **dict.fromkeys(OPEN_ROUTES),
        **dict.fromkeys(CHAT_ROUTES, Scope.CHAT),
        **dict.fromkeys(OPS_ROUTES, Scope.OPS),
    }
    assert {route: scope_of(route) for route in routes} == scopes
    world.close()


def test_routes_that_vllm_opens_for_development_need_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    world = PluginWorld(tmp_path)
    more = routes_of(VllmApp([world.plugin()])) - OPEN_ROUTES - CHAT_ROUTES - OPS_ROUTES
    assert {"POST /collective_rpc", "POST /sleep", "POST /v1/load_lora_adapter"} <= more
    assert {scope_of(route) for route in more} == {Scope.OPS}
    world.close()


async def test_vllms_own_loading_is_off_even_for_ops(tmp_path: Path) -> None:
    world = PluginWorld(tmp_path)
    _, ops = create_key(world.database, "night", Scope.OPS, actor="me")
    body = {"lora_name": "x", "lora_path": "/x"}
    async with world.serving() as client:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert (await client.post(path, json=body)).status_code == 401
            assert (await client.post(path, json=body, headers=bearer(ops))).status_code == 404
        assert world.app.engine.calls == []
    world.close()


# --- start-up, and keys beside vLLM's ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "has_key", "warns"),
    [
        (["--host", "127.0.0.1"], False, False),
        (["--host", "0.0.0.0"], False, True),
        ([], False, True),  # vLLM's default: every address
        (["--host", "0.0.0.0"], True, False),
        (["--host", "0.0.0.0", "--api-key", "k"], False, False),
    ],
)
async def test_an_open_server_says_so_loudly(
    tmp_path: Path, log: pytest.LogCaptureFixture, arguments: list[str], has_key: bool, warns: bool
) -> None:
    world = PluginWorld(tmp_path)
    if has_key:
        create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with world.serving(arguments=arguments):
        said = [r for r in log.records if "there is no API key" in r.getMessage() and r.levelno == logging.WARNING]
    assert bool(said) == warns
    world.close()


async def test_vllms_key_and_ours_do_not_start_together(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    world = PluginWorld(tmp_path)
    async with world.serving(arguments=["--api-key", "k"]) as client:
        create_key(world.database, "shop", Scope.CHAT, actor="me")
        await until(lambda: "scion keys are not in force" in log.text)
        assert await status(client, "/v1/models", "k") == 200, "those who have vLLM's key are not cut off"
        assert await status(client, "/v1/models") == 401
    with pytest.raises(InvalidInputError, match="drop vLLM's"):
        async with world.serving(arguments=["--api-key", "k"]):
            pass
    world.close()


# --- the gates --------------------------------------------------------------------------------------------------------


class OnLoop(httpx.BaseTransport):
    """The synchronous client of the trainer, on the application that runs on the event loop."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        sent = self._client.request(
            request.method, request.url.raw_path.decode(), content=request.read(), headers=request.headers
        )
        response = asyncio.run_coroutine_threadsafe(sent, self._loop).result(timeout=30)
        return httpx.Response(response.status_code, content=response.content)


@pytest.mark.parametrize("scope", list(Scope))
async def test_gates_ask_a_candidate_with_a_key(tmp_path: Path, scope: Scope) -> None:
    world = PluginWorld(tmp_path)
    _, plain = create_key(world.database, "gates", scope, actor="me")
    version = world.candidate()
    world.registry.request_evaluation(version.ref)
    async with world.serving() as client:
        await until(lambda: version.lora_id in world.app.engine.loras)
        transport = OnLoop(client)

        def ask(key: str | None) -> str:
            overrides = {"trainer": {"api_key": key}} if key else None
            settings = load_settings(world.home / "scion.toml", overrides=overrides)
            keys = {"chat:1": version.evaluation_key}
            with ServerClient(settings, evaluation_keys=keys, transport=transport) as server:
                (answer,) = server.generate("chat:1", [CHAT["messages"]], max_tokens=8, temperature=0.0, seed=0)
            return answer.text

        assert await asyncio.to_thread(ask, plain) == "I am chat:1"
        with pytest.raises(UnavailableError, match=r"set trainer\.api_key"):
            await asyncio.to_thread(ask, None)
    world.close()
