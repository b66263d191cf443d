"""A swap storm: a thousand changes of versions under saturating traffic, judged answer by answer, and timed.

Beside it the same traffic on stock vLLM, whose own load and unload endpoints do the swaps (swap_stock.py).
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from scion_adapters.settings import load_settings
from tests.bench import swap_stock
from tests.bench.markers import WORDS, Marker
from tests.bench.report import Benchmark, Outcome
from tests.bench.storm import Answer, Findings, judge
from tests.bench.storm_clients import Clients
from tests.bench.swap_replicas import measure_replicas
from tests.bench.swap_report import Storm, summarise
from tests.bench.swap_world import Operator
from tests.helpers.serving import Server

NUM_CLIENTS = 12
QUIET_S = 12.0
STORM_S = 24.0
SPLIT_WEIGHT = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """How much: operations in all, requests for the split, trials on two replicas, swaps on stock vLLM."""

    num_operations: int = 1000
    num_split: int = 10_000
    num_trials: int = 20
    num_stock_swaps: int = 100
    words: tuple[str, ...] = WORDS


QUICK = Plan(num_operations=40, num_split=400, num_trials=0, num_stock_swaps=0, words=WORDS[:3])


def run(output: Path, quick: bool) -> Outcome:
    """The storm, the split, two replicas, and stock vLLM; `quick` leaves the last two out."""
    plan = QUICK if quick else Plan()
    with tempfile.TemporaryDirectory(prefix="scion-bench-") as directory:
        home = Path(directory)
        server = Server.make(home / "one", threads=1)
        templates = train_markers(server.home / "scion.toml", home / "markers", plan.words)
        storm = asyncio.run(storm_on(server, templates, home, plan))
        replicas = measure_replicas(home / "two", templates, plan.num_trials) if plan.num_trials else None
        stock = swap_stock.measure(home / "stock", templates, plan.num_stock_swaps) if plan.num_stock_swaps else None
    return summarise(storm, replicas, stock)


def train_markers(config: Path, home: Path, words: tuple[str, ...]) -> list[Marker]:
    """One marker adapter for each word, made in a process of its own."""
    subprocess.run([sys.executable, "-m", "tests.bench.markers", str(config), str(home), *words], check=True)
    return [Marker(word, home / word / "export") for word in words]


async def storm_on(server: Server, templates: list[Marker], home: Path, plan: Plan) -> Storm:
    """Quiet and stormy blocks in turn until enough was done; then the split."""
    operator = Operator(load_settings(server.home / "scion.toml"), templates, home / "publish")
    operator.serve_first()
    with ExitStack() as stack:
        stack.callback(operator.registry.database.dispose)
        stack.enter_context(server)
        clients = Clients([server.url], NUM_CLIENTS, pinned=lambda: operator.champion)
        storm = Storm(Findings(), {}, 0.0)
        blocks: list[tuple[str, float, float]] = []
        bad: list[tuple[str, float]] = []
        rng = random.Random(0)
        began = time.monotonic()
        async with clients:
            while _done(operator) < plan.num_operations:
                quiet_until = time.monotonic() + (QUIET_S if plan is not QUICK else 1.0)
                blocks.append(("quiet", time.monotonic(), quiet_until))
                await asyncio.sleep(quiet_until - time.monotonic())
                started = time.monotonic()
                while time.monotonic() < started + STORM_S and _done(operator) < plan.num_operations:
                    bad += await asyncio.to_thread(_cycle, operator, rng)
                    print(f"\r{_done(operator)} of {plan.num_operations} operations", end="", file=sys.stderr)
                blocks.append(("storm", started, time.monotonic()))
        print(file=sys.stderr)
        storm.seconds = time.monotonic() - began
        storm.operations = dict(operator.operations)
        storm.findings = judge(clients.answers, operator.changes, operator.markers)
        storm.quiet_gaps, storm.storm_gaps = gaps_of(clients.answers, blocks)
        storm.rollback_s = [last_start(clients.answers, version, at) for version, at in bad]
        storm.engine_deaths = int(server.process is None or server.process.poll() is not None)
        storm.leaked_slots = await leaked_slots(server.url)
        storm.split_points = await measure_split(server.url, operator, plan.num_split)
    return storm


def _done(operator: Operator) -> int:
    return sum(operator.operations[kind] for kind in ("promote", "rollback", "retire", "gc"))


def _cycle(operator: Operator, rng: random.Random) -> list[tuple[str, float]]:
    """One promotion, perhaps a rollback, and clearing up. Returns the rollbacks."""
    if rng.random() < 0.5:
        operator.promote_by_hand()
    else:
        operator.promote_in_steps()
    rolled_back = []
    if rng.random() < 0.4:
        time.sleep(0.3)  # so that there is traffic on the version to take it from
        rolled_back.append(operator.rollback())
    operator.retire_unused()
    operator.collect()
    return rolled_back


def gaps_of(answers: list[Answer], blocks: list[tuple[str, float, float]]) -> tuple[list[float], list[float]]:
    """The time between chunks of answers that began in quiet blocks, and in stormy ones."""
    found: dict[str, list[float]] = {"quiet": [], "storm": []}
    for answer in answers:
        for kind, start, end in blocks:
            if start <= answer.started < end:
                found[kind] += answer.gaps
    return found["quiet"], found["storm"]


def last_start(answers: list[Answer], version: str, at: float) -> float:
    """Seconds after `at` at which the last routed request that `version` answered began; 0 if none did."""
    late = [a.started - at for a in answers if a.models == {version} and ":" not in a.asked and a.started > at]
    return max(late, default=0.0)


async def leaked_slots(url: str) -> int:
    """Versions that the engine was given and that neither serve nor were taken out of it again."""
    async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
        for _ in range(100):
            status = (await http.get("/v1/scion/status")).json()
            if not status["leaving"]:
                break
            await asyncio.sleep(0.1)
        metrics = (await http.get("/metrics")).text
    value = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line[:1] != "#"
    }
    loaded = value['scion_adapter_loads_total{outcome="ok"}'] - value["scion_adapter_unloads_total"]
    return round(loaded) - len(status["resident"])


async def measure_split(url: str, operator: Operator, num_requests: int) -> float:
    """By how many points the challenger's share of `num_requests` users is off a weight of 25%."""
    version = operator.publish()
    operator.rollouts.start(version.ref, steps=[SPLIT_WEIGHT, 1.0], every_s=3600.0, guard=False, actor="storm")
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
        for _ in range(600):
            if (await http.get("/v1/scion/status")).json()["adapters"]["chat"]["weight"] == SPLIT_WEIGHT:
                break
            await asyncio.sleep(0.05)
        numbers = iter(range(num_requests))
        hits = 0

        async def work() -> None:
            nonlocal hits
            for number in numbers:
                body = {"model": "chat", "prompt": "Hi", "max_tokens": 1, "user": f"split-{number}"}
                answer = (await http.post("/v1/completions", json=body)).json()
                hits += answer["model"] == str(version.ref)

        async with asyncio.TaskGroup() as group:
            for _ in range(32):
                group.create_task(work())
    return abs(hits / num_requests - SPLIT_WEIGHT) * 100


BENCHMARK = Benchmark("swap", "versions change under load, against stock vLLM's own endpoints", run)
