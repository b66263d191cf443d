"""vLLM's real HTTP application (routes, middleware, errors) with stubs for handlers: no engine, no weights.

The stubs resolve `model` with vLLM's own code and answer `I am <LoRA name>`, so a test sees which version it reached.
`VllmApp` is started through vLLM's own hooks, so a plugin is attached and initialised as in a server.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpx

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of vLLM's own imports
    import vllm.plugins
    from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock, AnthropicMessagesResponse, AnthropicUsage
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.openai.responses.protocol import ResponsesResponse
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeResponse
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
_numbers = count(1)
OUR_LOGGERS = ("vllm_scion", "scion_adapters", "scion_feedback")


class FakeEngine:
    """EngineClient as far as LoRA goes: what was added and removed, in order."""

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(max_model_len=512, model="/base")
        self.renderer = None
        self.input_processor = None
        self.calls: list[str] = []
        self.loras: dict[int, Any] = {}

    async def add_lora(self, request: Any) -> bool:
        assert not request.load_inplace
        self.calls.append(f"add {request.lora_name}")
        self.loras[request.lora_int_id] = request
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        self.calls.append(f"remove {self.loras.pop(lora_id).lora_name}")
        return True


class StubHandler(BaseServing):  # type: ignore[misc]  # vLLM is untyped to us
    """Stands for all of vLLM's serving classes."""

    async def _model(self, request: Any) -> tuple[str | None, ErrorResponse | None]:
        if (error := await self._check_model(request)) is not None:
            return None, error
        return self.models.model_name(self._maybe_get_adapters(request)), None

    async def create_chat_completion(self, request: Any, raw_request: Any) -> Any:
        model, error = await self._model(request)
        if error is not None:
            return error
        raw_request.state.request_metadata = SimpleNamespace(final_usage_info=SimpleNamespace(**USAGE))
        head = {"id": f"chatcmpl-{self._base_request_id(raw_request)}", "created": 1, "model": model}
        if not request.stream:
            message = {"role": "assistant", "content": f"I am {model}"}
            choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(request.n or 1)]
            return ChatCompletionResponse(**head, choices=choices, usage=USAGE)
        deltas = [({"role": "assistant", "content": ""}, None), ({"content": f"I am {model}"}, None), ({}, "stop")]
        return _sse(
            {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas
        )

    async def create_completion(self, request: Any, raw_request: Any) -> Any:
        model, error = await self._model(request)
        if error is not None:
            return error
        head = {"id": f"cmpl-{self._base_request_id(raw_request)}", "created": 1, "model": model}
        choice = {"index": 0, "text": f"I am {model}", "finish_reason": "length"}
        if not request.stream:
            return CompletionResponse(**head, choices=[choice], usage=USAGE)
        return _sse([{**head, "choices": [choice]}])

    async def create_responses(self, request: Any, raw_request: Any) -> Any:
        model, error = await self._model(request)
        if error is not None:
            return error
        content = [{"type": "output_text", "text": f"I am {model}", "annotations": []}]
        body: dict[str, Any] = {
            "id": request.request_id,
            "model": model,
            "status": "completed",
            "output": [
                {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content}
            ],
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": 16,
            "service_tier": "auto",
            "truncation": "disabled",
        }
        if not request.stream:
            return ResponsesResponse(**body)
        created = {"type": "response.created", "response": {"id": request.request_id}}
        return _events([created, {"type": "response.completed", "response": body}])

    async def create_messages(self, request: Any, raw_request: Any) -> Any:
        model, error = await self._model(request)
        if error is not None:
            return error
        usage = AnthropicUsage(input_tokens=5, output_tokens=3)
        if not request.stream:
            block = AnthropicContentBlock(type="text", text=f"I am {model}")
            return AnthropicMessagesResponse(
                id=f"msg-{next(_numbers)}", content=[block], model=model, stop_reason="end_turn", usage=usage
            )
        start = {"id": f"msg-{next(_numbers)}", "model": model, "usage": {"input_tokens": 5, "output_tokens": 0}}
        block_start = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": f"I am {model}"}}
        end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}}
        return _sse([{"type": "message_start", "message": start}, block_start, delta, end, {"type": "message_stop"}])

    async def create_batch_chat_completion(self, request: Any, raw_request: Any) -> Any:
        _, error = await self._model(request)
        assert error is not None, "tests only ask what must not be found here"
        return error

    async def create_tokenize(self, request: Any, raw_request: Any) -> Any:
        _, error = await self._model(request)
        return error or TokenizeResponse(count=2, max_model_len=512, tokens=[1, 2])


class VllmApp:
    """The application with `plugins` attached; `running` initialises and ends it as vLLM does."""

    def __init__(
        self,
        plugins: Sequence[Any] = (),
        arguments: Sequence[str] = (),
        *,
        max_cpu_loras: int = 8,
        served_names: Sequence[str] = ("base",),
    ) -> None:
        self.args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "/base", *arguments])
        with patch.object(vllm.plugins, "load_endpoint_plugins", lambda _: list(plugins)):
            self.app = build_app(self.args, ("generate",))
        self.engine = FakeEngine()
        self.models = OpenAIServingModels(self.engine, [BaseModelPath(name, "/base") for name in served_names])
        state = self.app.state
        lora = SimpleNamespace(max_loras=4, max_cpu_loras=max_cpu_loras, max_lora_rank=16) if max_cpu_loras else None
        state.vllm_config = SimpleNamespace(lora_config=lora, parallel_config=SimpleNamespace())
        state.engine_client = self.engine
        state.log_stats = False
        state.openai_serving_models = self.models
        stub = StubHandler(self.models, self.engine.model_config)
        for name in ("chat", "chat_batch", "completion", "responses"):
            setattr(state, f"openai_serving_{name}", stub)
        state.anthropic_serving_messages = state.serving_tokenization = stub

    @asynccontextmanager
    async def running(self, **client_options: Any) -> AsyncIterator[httpx.AsyncClient]:
        """From initialisation to shutdown, with a client."""
        loggers = [logging.getLogger(name) for name in OUR_LOGGERS]
        before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
        try:
            await init_endpoint_plugins_state(self.engine, self.app.state, self.args)
            async with self.app.router.lifespan_context(self.app):
                transport = httpx.ASGITransport(self.app)
                async with httpx.AsyncClient(transport=transport, base_url="http://test", **client_options) as client:
                    yield client
        finally:
            for logger, values in zip(loggers, before, strict=True):
                logger.handlers, logger.level, logger.propagate = values


async def _sse(events: Any) -> AsyncIterator[str]:
    for event in events:
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"


async def _events(events: Sequence[dict[str, Any]]) -> AsyncIterator[Any]:
    """Objects as the Responses handler yields them; vLLM's route makes the event stream."""
    for event in events:
        text = json.dumps(event)
        yield SimpleNamespace(type=event["type"], model_dump_json=lambda text=text, **_: text)
