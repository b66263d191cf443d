"""Does PPO on the live server hurt its users? Their requests alone, beside rollouts, and beside unmarked rollouts.

Blocks in turn on one server, an open loop of users' requests in each: alone; while a run samples without a pause, at
low priority and few at once as it does; and while it samples all at once, as if its requests were users' own. Ratios of
neighbouring blocks are compared, as engines on a CPU are noisy.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scion_adapters.fingerprint import base_info
from scion_adapters.registry import Registry, limits_of, open_registry
from scion_adapters.rollouts import Rollouts
from scion_adapters.settings import Settings
from scion_adapters.steps import ROLLOUT_PRIORITY
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.server import ServerSource
from tests.bench import conversations
from tests.bench.figures import Interval, median_ratio, percentile
from tests.bench.load import Generator, Load
from tests.bench.report import Bar, Benchmark, Outcome
from tests.helpers.adapters import make_adapter
from tests.helpers.serving import Server

ALONE, BESIDE, EQUAL = CONDITIONS = ("alone", "beside rollouts", "beside unbridled rollouts")
USERS_PRIORITY = 0
MAX_TOKENS = 16
ANSWERS = 64
ANSWER_TOKENS = 64
PAUSE_S = 1.0  # between blocks, so that the last rollouts have ended
P50_BAR, P99_BAR = 1.1, 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """`rate`: users' requests per second."""

    num_rounds: int = 12
    block_s: float = 8.0
    rate: float = 4.0


QUICK = Plan(num_rounds=1, block_s=2.0)


@dataclass(slots=True)
class Sampled:
    """What rollouts gave beside the users, in one condition."""

    seconds: float = 0.0
    num_answers: int = 0
    num_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / max(self.seconds, 1e-9)


@dataclass(slots=True)
class Users:
    """Latencies of users' requests in ms by condition, block by block; block i of all conditions are neighbours."""

    blocks: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in CONDITIONS})
    num_failed: int = 0
    sampled: dict[str, Sampled] = field(default_factory=dict)

    def ratio(self, condition: str, q: float) -> Interval:
        """A block's q-th percentile over its neighbour's without rollouts, median of the rounds."""
        alone, beside = ([percentile([block], q) for block in self.blocks[name]] for name in (ALONE, condition))
        return median_ratio(alone, beside)


def run(output: Path, quick: bool) -> Outcome:
    """Start a server on the demo's base, and measure."""
    with tempfile.TemporaryDirectory(prefix="scion-bench-") as directory:
        return summarise(measure(Path(directory) / "server", QUICK if quick else Plan()))


def measure(home: Path, plan: Plan) -> Users:
    server = Server.make(home, config={"server": {"ppo_rollouts": True}})
    settings = server.settings
    registry, base, users = open_registry(settings), base_info(settings), Users()
    load = Load(
        host="127.0.0.1",
        port=server.port,
        path="/v1/chat/completions",
        bodies=conversations.bodies(200, stream=False, max_tokens=MAX_TOKENS),
        num_requests=max(4, int(plan.rate * plan.block_s)),
        rate=plan.rate,
        warmup_s=0.0,
        timeout_s=60.0,
    )
    _champion(settings, registry, home / "champion")
    policy = make_adapter(home / "policy", base, rank=16, alpha=32, seed=1)
    with server, Generator(()) as generator:
        sources = {
            name: ServerSource(
                settings,
                registry,
                base,
                Sampling(ANSWER_TOKENS, priority=priority),
                actor="bench",
                concurrency=concurrency,
            )
            for name, priority, concurrency in (
                (BESIDE, ROLLOUT_PRIORITY, settings.trainer.ppo.server_concurrency),
                (EQUAL, USERS_PRIORITY, ANSWERS),
            )
        }
        for source in sources.values():
            source.update(policy, 0)
            source.sample([[1, 2, 3]] * 8, seed=0)
        generator.measure(load)
        orders = itertools.cycle(itertools.permutations(CONDITIONS))
        for done, order in enumerate(itertools.islice(orders, plan.num_rounds), start=1):
            for condition in order:
                if condition == ALONE:
                    measured = generator.measure(load)
                else:
                    with _sampling(sources[condition], users.sampled.setdefault(condition, Sampled())):
                        measured = generator.measure(load)
                users.blocks[condition].append(measured.latency_ms)
                users.num_failed += measured.failed
                time.sleep(PAUSE_S)
            print(f"rollouts: {done} of {plan.num_rounds} rounds", file=sys.stderr, flush=True)
        for source in sources.values():
            source.close()
    registry.database.dispose()
    return users


def _champion(settings: Settings, registry: Registry, directory: Path) -> None:
    """The version that users talk to: the base alone would be cheaper than any adapter."""
    base = base_info(settings)
    adapter = make_adapter(directory, base, rank=16, alpha=32, seed=2)
    registry.ensure_adapter("chat")
    version = registry.publish(
        "chat", adapter, parent=0, base=base, limits=limits_of(settings), actor="bench", reason="users' own"
    )
    registry.accept(version.ref, actor="bench", reason="users' own")
    Rollouts(registry.database).start(version.ref, steps=[1.0], every_s=0.0, guard=False, actor="bench")


@contextmanager
def _sampling(source: ServerSource, found: Sampled) -> Iterator[None]:
    """A source that samples batch after batch while this is open; the last one is waited for."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            began = time.monotonic()
            prompts = [[5 + i, 6, 7, 8 + found.num_answers % 900] for i in range(ANSWERS)]
            rollouts = source.sample(prompts, seed=found.num_answers)
            found.seconds += time.monotonic() - began
            found.num_answers += len(rollouts)
            found.num_tokens += sum(len(rollout.response_ids) for rollout in rollouts)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def summarise(users: Users) -> Outcome:
    """The table of conditions; the bars are those of rollouts at low priority."""
    figures: dict[str, Any] = {
        "failed": users.num_failed,
        "sampled": {name: asdict(sampled) for name, sampled in users.sampled.items()},
    }
    rows = []
    for name in CONDITIONS:
        found = {f"p{q}_ms": percentile(users.blocks[name], q) for q in (50, 99)}
        ratios = {f"p{q}_ratio": users.ratio(name, q) for q in (50, 99)}
        figures[name] = found | {key: asdict(ratio) for key, ratio in ratios.items()}
        rows.append((name, *(f"{value:.0f}" for value in found.values()), *map(str, ratios.values())))
    return Outcome(
        figures,
        (
            Bar("users' p50 beside rollouts over alone", users.ratio(BESIDE, 50).value, P50_BAR),
            Bar("users' p99 beside rollouts over alone", users.ratio(BESIDE, 99).value, P99_BAR),
            Bar("failed requests", float(users.num_failed), 0.0),
        ),
        ("users' requests", "p50 ms", "p99 ms", "p50 over alone", "p99 over alone"),
        tuple(rows),
        tuple(
            f"{name}: {sampled.num_answers} answers, {sampled.tokens_per_s:.0f} tokens/s"
            for name, sampled in users.sampled.items()
        ),
    )


BENCHMARK = Benchmark("rollouts", "users of a live server beside PPO's sampling at low priority", run)
