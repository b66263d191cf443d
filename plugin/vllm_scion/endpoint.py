"""The entry point that vLLM loads (`vllm.endpoint_plugins`): wraps its completion routes and adds ours.

Thin on purpose: which routes there are, and when what is opened. `SCION_CONFIG` names the configuration.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from scion_adapters.errors import ScionError
from scion_adapters.settings import Settings, load_settings
from scion_feedback.recorder_process import open_recorder_process
from vllm_scion import private_vllm
from vllm_scion.authority import AuthorityMiddleware, Gatekeeper
from vllm_scion.gateway import Gateway
from vllm_scion.metrics import Metrics, process_metrics
from vllm_scion.routes_adapters import attach_adapters
from vllm_scion.routes_feedback import attach_feedback
from vllm_scion.routes_models import attach_status, wrap_models
from vllm_scion.runtime import EngineFacts, OpenRecorder, Runtime, open_runtime
from vllm_scion.serving import Serving

logger = logging.getLogger("vllm_scion")

RECORDED_ROUTES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
}
ROUTED_ROUTES = {"/tokenize": "tokenize", "/v1/messages/count_tokens": "count_tokens"}
"""Not answers, so nothing to record; but clients that count tokens ask for the same model name."""


class ScionEndpointPlugin:
    """vLLM's EndpointPlugin protocol."""

    name = "scion"
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(
        self,
        settings: Settings | None = None,
        metrics: Metrics | None = None,
        open_recorder: OpenRecorder = open_recorder_process,
    ) -> None:
        self._settings = settings
        self._open_recorder = open_recorder
        self.gateway = Gateway(Serving(), metrics or process_metrics())
        self.gatekeeper = Gatekeeper()
        self.runtime: Runtime | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Replace the completion routes by wrapped ones and add ours. vLLM removes what a plugin's route replaces."""
        for path, route_name in RECORDED_ROUTES.items():
            self._wrap(app, path, route_name, is_recorded=True)
        for path, route_name in ROUTED_ROUTES.items():
            self._wrap(app, path, route_name, is_recorded=False)
        if (models := private_vllm.find_route(app, "/v1/models", "GET")) is not None:
            _replace(app, models, wrap_models(models.endpoint, self.gateway))
        attach_status(app, self._running)
        attach_feedback(app, self._running, self.gateway.metrics)
        attach_adapters(app, self._running)
        app.add_middleware(AuthorityMiddleware, gatekeeper=self.gatekeeper)
        private_vllm.on_shutdown(app, self._close)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Open the database, follow the routing and load its versions; vLLM listens only after this returned."""
        private_vllm.share_log("vllm_scion", "scion_adapters", "scion_feedback")
        models = state.openai_serving_models
        table = private_vllm.LoraTable(engine_client, models)
        max_loras, max_cpu_loras, max_lora_rank = private_vllm.lora_limits(state)
        engine_name, is_engine_shared = private_vllm.engine_name(state)
        if is_engine_shared:
            private_vllm.finish_answers_first(engine_client)
        engine = EngineFacts(
            table=table,
            base_names=table.base_names,
            max_loras=max_loras,
            max_cpu_loras=max_cpu_loras,
            max_lora_rank=max_lora_rank,
            url=_url(args),
            engine=engine_name,
            is_engine_shared=is_engine_shared,
            host=getattr(args, "host", None) or "",
            has_api_key=any(getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]),
        )
        try:
            settings = self._settings or load_settings()
            self.runtime = await open_runtime(settings, self.gateway, self.gatekeeper, engine, self._open_recorder)
        except ScionError as error:
            logger.error("vllm-scion cannot start: %s", error)  # above the traceback that vLLM prints
            raise

    def _wrap(self, app: FastAPI, path: str, route_name: str, *, is_recorded: bool) -> None:
        route = private_vllm.find_route(app, path, "POST")
        if route is not None:  # a server may lack one, such as a model without a chat template
            _replace(app, route, self.gateway.wrap(route.endpoint, route_name, is_recorded=is_recorded))

    def _running(self) -> Runtime:
        assert self.runtime is not None, "requests come only after init_state"
        return self.runtime

    async def _close(self) -> None:
        if self.runtime is not None:
            runtime, self.runtime = self.runtime, None
            await runtime.close()


def _replace(app: FastAPI, route: APIRoute, endpoint: Any) -> None:
    """Register `endpoint` with the path, dependencies and documentation of `route`."""
    app.add_api_route(
        route.path,
        endpoint,
        methods=sorted(route.methods),
        dependencies=route.dependencies,
        responses={**route.responses},
        status_code=route.status_code or HTTPStatus.OK,
        name=route.name,
        summary=route.summary,
        description=route.description,
        tags=route.tags,
        include_in_schema=route.include_in_schema,
        response_class=route.response_class,
        response_model=route.response_model,
    )


def _url(args: Namespace) -> str:
    scheme = "https" if getattr(args, "ssl_certfile", None) else "http"
    return f"{scheme}://{getattr(args, 'host', None) or '0.0.0.0'}:{getattr(args, 'port', 0)}"  # noqa: S104 - what vLLM binds
