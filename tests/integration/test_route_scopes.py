"""Every route of the installed vLLM, and of ours, has a scope that somebody decided; unknown ones fail, and are closed.

The table is vLLM's own, with everything switched on that it can serve. A route that a later vLLM adds belongs into
`CHAT` or `OPS` below once somebody has looked at what it does; until then vllm_scion.authority closes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import vllm.plugins
from fastapi import FastAPI
from starlette.routing import Mount, WebSocketRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
from vllm.utils.argparse_utils import FlexibleArgumentParser

from scion_adapters.keys import Scope, create_key
from tests.helpers.access import bearer
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.vllm_app import VllmApp
from vllm_scion.authority import required_scope

OPEN = """
GET /health  GET /ping  POST /ping  GET /metrics  GET /metrics/  GET /version  GET /load
"""
CHAT = """
POST /v1/chat/completions  POST /v1/completions  POST /v1/responses  POST /v1/messages  POST /v1/messages/count_tokens
GET /v1/responses/{response_id}  POST /v1/responses/{response_id}/cancel
POST /tokenize  POST /detokenize  GET /v1/models
POST /v1/feedback  GET /v1/feedback  GET /v1/feedback/{feedback_id}  DELETE /v1/feedback/{feedback_id}
"""
OPS = """
GET /openapi.json  HEAD /openapi.json  GET /docs  HEAD /docs  GET /docs/oauth2-redirect  HEAD /docs/oauth2-redirect
GET /redoc  HEAD /redoc  GET /static/  GET /static/{path}  GET /metrics/{path}
POST /v1/chat/completions/batch  POST /v1/chat/completions/render  POST /v1/chat/completions/derender
POST /v1/completions/render  POST /v1/completions/derender  POST /v1/responses/render  POST /v1/messages/render
POST /invocations  POST /generative_scoring  POST /inference/v1/generate  POST /inference/v1/abort_requests
POST /abort_requests  POST /v1/systemone  GET /kv_event_sources
POST /v1/load_lora_adapter  POST /v1/unload_lora_adapter  POST /adapters  DELETE /adapters/{adapter_name}
POST /v1/audio/transcriptions  POST /v1/audio/translations  WEBSOCKET /v1/realtime
POST /classify  POST /pooling  POST /score  POST /rerank  POST /v1/embeddings  POST /v1/score  POST /v1/rerank
POST /v2/embed  POST /v2/rerank
POST /scale_elastic_ep  POST /is_scaling_elastic_ep  GET /fault_tolerance/status  POST /fault_tolerance/apply
POST /start_profile  POST /stop_profile  POST /collective_rpc  GET /server_info
POST /reset_prefix_cache  POST /reset_mm_cache  POST /reset_encoder_cache  POST /release_kv_cache_memory
POST /sleep  POST /wake_up  GET /is_sleeping  POST /pause  POST /resume  GET /is_paused
POST /init_weight_transfer_engine  POST /shutdown_weight_transfer_engine  POST /start_weight_update
POST /start_draft_weight_update  POST /update_weights  POST /finish_weight_update  POST /update_weight_version
GET /weight_info  POST /weight_checker  GET /get_world_size
GET /v1/scion/status  GET /v1/adapters  GET /v1/adapters/{name}  GET /v1/adapters/{name}/versions
GET /v1/adapters/{name}/versions/{number}  POST /v1/adapters/{name:path}/versions
"""


def decided(table: str) -> set[tuple[str, str]]:
    method_and_path = table.split()
    return set(zip(method_and_path[::2], method_and_path[1::2], strict=True))


DECIDED = {None: decided(OPEN), Scope.CHAT: decided(CHAT), Scope.OPS: decided(OPS)}


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Each method and path of the application; what is mounted also answers below its path."""
    for route in app.routes:
        match route:
            case Mount():
                yield from (("GET", f"{route.path}/"), ("GET", f"{route.path}/{{path}}"))
            case WebSocketRoute():
                yield "WEBSOCKET", route.path
            case _:
                methods, path = getattr(route, "methods", None), getattr(route, "path", None)
                assert methods, f"{route} is of a kind that this test does not know"
                assert path
                yield from ((method, path) for method in methods)


def scope_of(method: str, path: str) -> Scope | None:
    """As the middleware sees it: a WebSocket is opened by GET."""
    return required_scope("GET" if method == "WEBSOCKET" else method, re.sub(r"\{[^}]*\}", "x", path))


def undecided(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """What is in no table, and what has another scope than its table says."""
    return {route for route in found if route not in DECIDED[scope_of(*route)]}


class PoolingModel:
    """vLLM's model configuration as far as the routes of pooling models ask it."""

    io_processor_plugin = pooler_config = None
    architecture, is_cross_encoder, score_type = "", True, "bi-encoder"
    hf_config = SimpleNamespace(num_labels=1)

    def __init__(self, task: str) -> None:
        self._task = task

    def get_pooling_task(self, _: Any) -> str:
        return self._task


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def everything(world: PluginWorld, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> set[tuple[str, str]]:
    """The routes of a server with every task and every switch, and of one as it is."""
    for switch in ("VLLM_SERVER_DEV_MODE", "VLLM_ENABLE_COHERE_API", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.setenv(switch, "1")
    profiler = f'{{"profiler": "torch", "torch_profiler_dir": "{tmp_path}"}}'
    flags = ["--model", "/base", "--enable-offline-docs", "--profiler-config", profiler]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    args.enable_fault_tolerance = True
    found = set(routes(VllmApp([world.plugin()]).app))
    for task in POOLING_TASKS:
        with patch.object(vllm.plugins, "load_endpoint_plugins", lambda _: [world.plugin()]):
            app = build_app(args, (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS), PoolingModel(task))
        found |= set(routes(app))
    return found


def test_every_route_has_the_scope_that_was_decided(everything: set[tuple[str, str]]) -> None:
    assert undecided(everything) == set(), "look at what it does, and decide"
    gone = set.union(*DECIDED.values()) - everything
    assert gone == set(), "a decision about a route that there is not"
    assert len(everything) > 80, "the table was not read"


def test_a_route_that_nobody_thought_of_is_found_and_closed(world: PluginWorld) -> None:
    app = VllmApp([world.plugin()]).app
    assert undecided(set(routes(app))) == set()
    app.add_api_route("/v1/chat/completions/{id}/replay", lambda: None, methods=["POST"])
    app.add_api_route("/v1/models", lambda: None, methods=["DELETE"])
    app.add_api_websocket_route("/v1/chat/live", lambda: None)
    app.mount("/health/details", FastAPI())
    new = undecided(set(routes(app)))
    assert {path for _, path in new} == {
        "/v1/chat/completions/{id}/replay",
        "/v1/models",
        "/v1/chat/live",
        "/health/details/",
        "/health/details/{path}",
    }
    assert {scope_of(*route) for route in new} == {Scope.OPS}


async def test_the_server_refuses_by_these_scopes(world: PluginWorld) -> None:
    _, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with world.serving() as client:
        found = sorted(set(routes(world.app.app)))
        closed = [(method, path, scope) for method, path in found if (scope := scope_of(method, path)) is not None]
        for method, template, scope in closed:
            path = re.sub(r"\{[^}]*\}", "x", template)
            without = await client.request(method, path)
            assert without.status_code == 401, f"{method} {path} without a key"
            if scope is Scope.OPS:
                narrow = await client.request(method, path, headers=bearer(chat))
                assert narrow.status_code == 403, f"{method} {path} with a key of scope chat"
    assert len(closed) > 30
