"""vLLM's real API server over an engine that answers at once: all of the server process is real except generation.

The FastAPI application, its middleware, the chat template, the tokenizer, request validation, the response objects,
uvicorn with uvloop and httptools, and the plugin when VLLM_PLUGINS names it: all are what `vllm serve` runs. Only the
engine process is missing. Takes vLLM's own command line plus --stub-tokens and --stub-chunks.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncGenerator
from typing import Any

import uvloop
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.entry import build_and_serve
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

SENTENCE = "the answer to that question is known to everyone who has ever asked it with some patience"


class StubEngine:
    """The parts of vLLM's EngineClient that the API server and the plugin use, without an engine behind them."""

    errored = False
    is_running = True
    is_stopped = False
    dead_error = RuntimeError("the stub engine does not die")

    def __init__(self, engine_args: AsyncEngineArgs, *, num_tokens: int, num_chunks: int) -> None:
        self.vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        self.model_config = self.vllm_config.model_config
        self.renderer = renderer_from_config(self.vllm_config)
        self.input_processor = InputProcessor(self.vllm_config, self.renderer)
        sentence = SENTENCE.split()
        words = [sentence[i % len(sentence)] + " " for i in range(num_tokens)]
        size = -(-num_tokens // num_chunks)
        self._chunks = [("".join(words[i : i + size]), len(words[i : i + size])) for i in range(0, num_tokens, size)]
        self._text = "".join(words)
        self._num_tokens = num_tokens
        self._loras: dict[int, LoRARequest] = {}

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **_: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        prompt_token_ids = list(prompt["prompt_token_ids"]) if isinstance(prompt, dict) else []
        if sampling_params.output_kind is RequestOutputKind.DELTA:
            for number, (text, num_tokens) in enumerate(self._chunks, 1):
                await asyncio.sleep(0)  # the engine's outputs arrive in separate turns of the event loop
                last = number == len(self._chunks)
                yield _output(request_id, prompt_token_ids, text, num_tokens, last, lora_request)
            return
        await asyncio.sleep(0)
        yield _output(request_id, prompt_token_ids, self._text, self._num_tokens, True, lora_request)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        self._loras[lora_request.lora_int_id] = lora_request
        return True

    async def remove_lora(self, lora_id: int) -> bool:
        return self._loras.pop(lora_id, None) is not None

    async def list_loras(self) -> set[int]:
        return set(self._loras)

    async def pin_lora(self, lora_id: int) -> bool:
        return lora_id in self._loras

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None: ...
    async def abort(self, request_id: Any) -> None: ...
    async def do_log_stats(self) -> None: ...
    async def check_health(self) -> None: ...
    async def is_tracing_enabled(self) -> bool:
        return False

    async def is_sleeping(self) -> bool:
        return False

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None: ...


def _output(
    request_id: str, prompt: list[int], text: str, num_tokens: int, finished: bool, lora_request: LoRARequest | None
) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text=text,
        token_ids=[7] * num_tokens,
        cumulative_logprob=None,
        logprobs=None,
        finish_reason="stop" if finished else None,
        lora_request=lora_request,
    )
    return RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=prompt,
        prompt_logprobs=None,
        outputs=[completion],
        finished=finished,
        lora_request=lora_request,
    )


async def serve(args: argparse.Namespace) -> None:
    address, sock = setup_server(args, reuse_port=False)
    engine = StubEngine(AsyncEngineArgs.from_cli_args(args), num_tokens=args.stub_tokens, num_chunks=args.stub_chunks)
    shutdown = await build_and_serve(engine, address, sock, args)  # the engine is duck-typed on purpose
    await shutdown
    sock.close()


def main() -> None:
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(description=__doc__))
    parser.add_argument("--stub-tokens", type=int, default=96, help="tokens in every answer")
    parser.add_argument("--stub-chunks", type=int, default=16, help="pieces of a streamed answer")
    args = parser.parse_args(sys.argv[1:])
    validate_parsed_serve_args(args)
    uvloop.run(serve(args))


if __name__ == "__main__":
    main()
