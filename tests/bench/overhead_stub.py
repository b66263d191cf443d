"""Added latency with generation stubbed out: stock vLLM, vLLM with the plugin recording, and stock vLLM again.

All three servers are up on the same cores and get short blocks of load in turn, from a generator on another core. The
second stock server is the control: what it "adds" is the noise of the method.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from scion_adapters.database import open_database
from scion_adapters.settings import load_settings
from scion_adapters.tables import completions
from tests.bench import conversations
from tests.bench.figures import Interval, added, paired, percentile
from tests.bench.load import Generator, Load, Measured
from tests.bench.world import Server, Spec, World, free_port, get_json, make_world, running

STOCK, OURS, CONTROL = SERVERS = ("stock", "scion", "control")
HOLD_P99_MS = 10.0
"""A rate is held when every request is answered and 99 in 100 within this time: no queue builds up."""
AGREE_P99_MS = 1.0
"""Where two equal servers may differ by more at p99 (95% interval), nothing shows what a third one adds."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure: per kind of request and share of its highest rate, so many blocks per server.

    Blocks are short, so that a second or two in which the machine is slow falls on all servers alike.
    """

    block_s: float = 0.7
    num_rounds: tuple[tuple[float, int], ...] = ((1.0, 60), (0.5, 30))
    probe_s: float = 2.0
    num_probes: int = 5
    first_rate: float = 100.0
    growth: float = 1.2
    max_rate: float = 5000.0
    num_tries: int = 5
    kinds: tuple[str, ...] = ("plain", "stream")


QUICK = Plan(
    block_s=0.6,
    num_rounds=((1.0, 2),),
    probe_s=0.4,
    num_probes=1,
    first_rate=40.0,
    growth=4.0,
    max_rate=40.0,
    num_tries=1,
)


@dataclass(slots=True)
class Series:
    """The blocks of one kind of request at one rate: latencies in milliseconds by server, one list per block."""

    kind: str
    rate: float
    share: float
    blocks: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in SERVERS})
    first_bytes: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in SERVERS})
    cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SERVERS, 0.0))
    children_cpu_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SERVERS, 0.0))
    num_sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SERVERS, 0))
    num_failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SERVERS, 0))
    lag_p99_ms: float = 0.0
    is_held: bool = True

    def added(self, q: float, server: str = OURS) -> Interval:
        return added(self.blocks[STOCK], self.blocks[server], q)

    def paired(self, q: float, server: str = OURS) -> Interval:
        return paired(self.blocks[STOCK], self.blocks[server], q)

    def cpu_ms(self, server: str) -> float:
        """CPU time of the server process per request, all its threads."""
        return 1e3 * self.cpu_s[server] / self.num_sent[server]

    def children_cpu_ms(self, server: str) -> float:
        """CPU time per request of the processes that the server started: they take no time from its event loop."""
        return 1e3 * self.children_cpu_s[server] / self.num_sent[server]

    def is_steady(self) -> bool:
        """Whether both stock servers held the rate for as long as the series lasted, and agree. Ours has no say.

        Near saturation bursts of the machine decide who has the longer tail, so that rate measures nothing.
        """
        held = not any(self.num_failed[name] for name in (STOCK, CONTROL)) and all(
            self.percentile(name, 99) <= HOLD_P99_MS for name in (STOCK, CONTROL)
        )
        apart = self.added(99, CONTROL)
        return held and max(abs(apart.low), abs(apart.high)) <= AGREE_P99_MS

    def added_first_byte(self, q: float) -> Interval:
        return added(self.first_bytes[STOCK], self.first_bytes[OURS], q)

    def percentile(self, server: str, q: float) -> float:
        return percentile(self.blocks[server], q)


@dataclass(frozen=True, slots=True)
class StubOutcome:
    series: tuple[Series, ...]
    dropped: tuple[Series, ...]
    """Series at rates that the stock servers did not hold, or at which they disagreed: lower ones followed."""
    num_sent: int
    num_recorded: int
    num_lost: int
    own_overhead_us: float
    """What the plugin itself reports: mean time on the event loop per request (scion_request_overhead_seconds)."""
    has_recorder_core: bool
    """Whether the recorder had a core of its own (capture.cores)."""


def cores() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(server's, generator's, recorder's): two, one and one; empty = not pinned, the recorder's: as the server's."""
    if not hasattr(os, "sched_getaffinity"):
        return (), (), ()
    usable = tuple(sorted(os.sched_getaffinity(0)))
    if len(usable) < 3:
        return (), (), ()
    return usable[:2], usable[-1:], usable[2:3] if len(usable) > 3 else ()


def measure(home: Path, plan: Plan) -> StubOutcome:
    """Run all servers and all series."""
    server_cores, generator_cores, recorder_cores = cores()
    capture = {"cores": ",".join(map(str, recorder_cores))} if recorder_cores else {}
    world = make_world(home / "world", settings={"capture": capture})
    with contextlib.ExitStack() as stack:
        specs = [_spec(name, world, server_cores) for name in SERVERS]
        servers = stack.enter_context(running(specs, home))
        generator = stack.enter_context(Generator(generator_cores))
        traffic = _Traffic(generator, servers)
        series: list[Series] = []
        dropped: list[Series] = []
        for kind in plan.kinds:
            kept, not_sustained = traffic.measure(kind, plan)
            series += kept
            dropped += not_sustained
        sent = traffic.num_answered[OURS]
        recorded, lost = _recorded(world, servers[OURS], sent)
        overhead_us = _own_overhead_us(servers[OURS])
    return StubOutcome(tuple(series), tuple(dropped), sent, recorded, lost, overhead_us, bool(recorder_cores))


def _spec(name: str, world: World, on: Sequence[int]) -> Spec:
    port = free_port()
    ready = "/health"
    command = [
        *("-m", "tests.bench.stub_server", "--model", str(world.base), "--served-model-name", "base"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-log-stats", "--disable-uvicorn-access-log"),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "8", "--max-lora-rank", "16"),
        *("--hf-overrides", '{"max_position_embeddings": 4096}'),  # room for prompts of ordinary length
    ]
    if name == OURS:
        environment = {"VLLM_PLUGINS": "scion", "SCION_CONFIG": str(world.config)}
        ready = "/v1/scion/status"  # vLLM goes on without a plugin that cannot be loaded
    else:
        command += ["--lora-modules", f"chat={world.adapter}"]
        environment = {"VLLM_PLUGINS": ""}
    return Spec(name, command, port, environment, cores=on, ready_path=ready)


class _Traffic:
    """Sends blocks to the servers and counts what the plugin should have recorded."""

    def __init__(self, generator: Generator, servers: dict[str, Server]) -> None:
        self._generator = generator
        self._servers = servers
        self._bodies = {kind: conversations.bodies(500, stream=kind == "stream") for kind in ("plain", "stream")}
        self.num_answered = dict.fromkeys(servers, 0)

    def measure(self, kind: str, plan: Plan) -> tuple[list[Series], list[Series]]:
        """(the series of the plan, those that were dropped because stock did not sustain their rate)"""
        self.warm_up(kind, plan)
        highest = self.highest_rate(kind, plan)
        rate = highest or plan.first_rate
        kept: list[Series] = []
        dropped: list[Series] = []
        for share, num_rounds in plan.num_rounds:
            while True:
                one = Series(kind, rate * share, share, is_held=bool(highest))
                self.fill(one, plan.block_s, num_rounds)
                if share < 1.0 or one.is_steady() or len(dropped) + 1 >= plan.num_tries:
                    break
                dropped.append(one)
                rate /= plan.growth**2
            kept.append(one)
        return kept, dropped

    def send(self, server: str, kind: str, rate: float, seconds: float) -> Measured:
        target = self._servers[server]
        count = max(1, round(rate * seconds))
        load = Load("127.0.0.1", target.port, "/v1/chat/completions", self._bodies[kind], count, rate)
        measured = self._generator.measure(load)
        self.num_answered[server] += measured.sent - measured.failed
        if not target.is_running() or not measured.latency_ms:
            raise RuntimeError(f"{server} answered none of {measured.sent} requests:\n{target.tail()}")
        return measured

    def _cpu_s(self, server: str) -> tuple[float, float]:
        """(the server process's, its children's)"""
        process = psutil.Process(self._servers[server].process.pid)
        own, *children = (p.cpu_times() for p in (process, *process.children(recursive=True)))
        return own.user + own.system, sum(times.user + times.system for times in children)

    def warm_up(self, kind: str, plan: Plan) -> None:
        for server in self._servers:
            measured = self.send(server, kind, plan.first_rate / 2, plan.probe_s)
            if measured.failed:
                raise RuntimeError(
                    f"{server} failed {measured.failed} of {measured.sent} requests before any load; its log ends:\n"
                    f"{self._servers[server].tail()}"
                )

    def highest_rate(self, kind: str, plan: Plan) -> float | None:
        """The highest rate of the ladder that stock and ours hold for long; None: not even the first one."""
        rate = plan.first_rate
        while rate <= plan.max_rate and all(self._holds(server, kind, rate, plan) for server in (STOCK, OURS)):
            rate *= plan.growth
        while (rate := rate / plan.growth) > 0.99 * plan.first_rate:
            if all(self._lasts(server, kind, rate, plan) for server in (STOCK, OURS)):
                return rate
        return None

    def _lasts(self, server: str, kind: str, rate: float, plan: Plan) -> bool:
        """Several probes together: what a burst of speed of the machine allows is not held."""
        probes = [self.send(server, kind, rate, plan.probe_s) for _ in range(plan.num_probes)]
        return (
            not any(probe.failed for probe in probes)
            and percentile([probe.latency_ms for probe in probes], 99) <= HOLD_P99_MS
        )

    def _holds(self, server: str, kind: str, rate: float, plan: Plan) -> bool:
        """Two tries: a neighbour on the machine may spoil one."""
        for _ in range(2):
            measured = self.send(server, kind, rate, plan.probe_s)
            if not measured.failed and percentile([measured.latency_ms], 99) <= HOLD_P99_MS:
                return True
        return False

    def fill(self, series: Series, block_s: float, num_rounds: int) -> None:
        """Measure `num_rounds` blocks per server, in every order of the servers equally often."""
        lags: list[float] = []
        orders = itertools.cycle(itertools.permutations(self._servers))
        for order in itertools.islice(orders, num_rounds):
            for server in order:
                before, children_before = self._cpu_s(server)
                measured = self.send(server, series.kind, series.rate, block_s)
                after, children_after = self._cpu_s(server)
                series.cpu_s[server] += after - before
                series.children_cpu_s[server] += children_after - children_before
                series.num_sent[server] += measured.sent
                series.blocks[server].append(measured.latency_ms)
                series.first_bytes[server].append(measured.first_byte_ms)
                series.num_failed[server] += measured.failed
                lags += measured.lag_ms
        series.lag_p99_ms = percentile([lags], 99)


def _own_overhead_us(server: Server) -> float:
    totals = {"sum": 0.0, "count": 0.0}
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as response:
        for family in text_string_to_metric_families(response.read().decode()):
            for sample in family.samples:
                name, _, end = sample.name.rpartition("_")
                if name == "scion_request_overhead_seconds" and end in totals:
                    totals[end] += sample.value
    return 1e6 * totals["sum"] / totals["count"]


def _recorded(world: World, server: Server, expected: int) -> tuple[int, int]:
    """(answers in the database, answers lost), once the recorder has caught up or ten seconds have passed."""
    database = open_database(load_settings(world.config))
    statement = sa.select(sa.func.count()).select_from(completions)
    deadline = time.monotonic() + 10
    while True:
        with database.read() as connection:
            stored = int(connection.execute(statement).scalar_one())
        if stored >= expected or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    database.dispose()
    lost = get_json(f"{server.url}/v1/scion/status")["capture"]["lost"]
    return stored, sum(lost.values()) if isinstance(lost, dict) else int(lost)
