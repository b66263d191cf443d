"""Throughput on the real engine: stock vLLM and `scion serve` with the same adapter, both up, loaded in turn.

Answers of a CPU engine take hundreds of noisy milliseconds, so only ratios of neighbouring blocks are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scion_adapters.settings import load_settings
from tests.bench import conversations
from tests.bench.figures import Interval, added, median_ratio, percentile
from tests.bench.load import Generator, Load, Measured
from tests.bench.overhead_stub import OURS, STOCK
from tests.bench.world import Server, Spec, World, free_port, make_world, running
from vllm_scion.serve import available_cores, is_cpu_build, plan_launch

MAX_TOKENS = 16
NUM_CLIENTS = 16
BASE_PLUGINS = "bitsandbytes"


@dataclass(frozen=True, slots=True)
class Plan:
    """`num_pairs` neighbouring blocks of `num_requests` per server."""

    num_pairs: int = 24
    num_requests: int = 96


@dataclass(slots=True)
class EngineOutcome:
    """Blocks of both servers in the order in which they were measured: pair i is stock[i] and scion[i]."""

    throughput: dict[str, list[float]] = field(default_factory=lambda: {STOCK: [], OURS: []})
    latency_ms: dict[str, list[list[float]]] = field(default_factory=lambda: {STOCK: [], OURS: []})
    num_failed: int = 0

    @property
    def ratio(self) -> Interval:
        """Requests per second of ours over stock's, median of the pairs."""
        return median_ratio(self.throughput[STOCK], self.throughput[OURS])

    def added_ms(self, q: float) -> Interval:
        return added(self.latency_ms[STOCK], self.latency_ms[OURS], q)

    def percentile(self, server: str, q: float) -> float:
        return percentile(self.latency_ms[server], q)


def measure(home: Path, plan: Plan) -> EngineOutcome:
    """Start both servers and measure."""
    num_cores = len(available_cores())
    port = free_port()
    world = make_world(home / "world", settings={"server": {"port": port, "threads": max(1, num_cores - 1)}})
    outcome = EngineOutcome()
    with contextlib.ExitStack() as stack:
        servers = stack.enter_context(running([_stock(world), _ours(world, port)], home))
        generator = stack.enter_context(Generator(()))
        bodies = conversations.bodies(200, stream=False, max_tokens=MAX_TOKENS)
        for server in servers.values():
            _block(generator, server, bodies, plan.num_requests)
        for pair in range(plan.num_pairs):
            for name in (STOCK, OURS) if pair % 2 == 0 else (OURS, STOCK):
                measured = _block(generator, servers[name], bodies, plan.num_requests)
                outcome.throughput[name].append((measured.sent - measured.failed) / measured.seconds)
                outcome.latency_ms[name].append(measured.latency_ms)
                outcome.num_failed += measured.failed
    return outcome


def _block(generator: Generator, server: Server, bodies: Sequence[str], count: int) -> Measured:
    load = Load(
        host="127.0.0.1",
        port=server.port,
        path="/v1/chat/completions",
        bodies=tuple(bodies),
        num_requests=count,
        rate=None,
        warmup_s=0.0,
        max_connections=NUM_CLIENTS,
        timeout_s=60.0,
    )
    measured = generator.measure(load)
    if not server.is_running():
        raise RuntimeError(f"{server.name} died under load:\n{server.tail()}")
    return measured


def _ours(world: World, port: int) -> Spec:
    command = ["-m", "scion_adapters.cli.main", "--config", str(world.config), "serve"]
    return Spec(OURS, command, port, environment={})


def _stock(world: World) -> Spec:
    """The flags and the environment that `scion serve` works out, without our plugin and with vLLM's own LoRA flag."""
    port = free_port()
    settings = load_settings(
        world.config, overrides={"server": {"port": port, "threads": max(1, len(available_cores()) - 1)}}
    )
    launch = plan_launch(settings, config_file=None, environ={}, cores=available_cores(), is_cpu=is_cpu_build())
    command = ["-m", "vllm.entrypoints.openai.api_server", *launch.arguments, "--lora-modules", f"chat={world.adapter}"]
    environment = {**launch.environment, "VLLM_PLUGINS": BASE_PLUGINS}
    return Spec(STOCK, command, port, environment)
