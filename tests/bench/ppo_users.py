"""Does PPO's sampling on the live server hurt its users? Chat requests beside rollouts at low priority, and without.

Blocks in turn on one server: an open loop of chat requests, in every other block while a source samples without a
pause. Ratios of neighbours are compared, as engines on a CPU are noisy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scion_adapters.fingerprint import base_info
from scion_adapters.registry import open_registry
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.server import ServerSource
from tests.bench import conversations
from tests.bench.figures import Interval, median_ratio, percentile
from tests.bench.load import Generator, Load
from tests.helpers.adapters import make_adapter
from tests.helpers.serving import Server

RATE = 2.0
MAX_TOKENS = 16
ANSWERS = 64
ANSWER_TOKENS = 64
PAUSE_S = 1.0  # between blocks, so that the last rollouts have ended


@dataclass(slots=True)
class Users:
    """Latencies of users' requests in ms, block by block: pair i is alone[i] and beside[i]."""

    alone: list[list[float]] = field(default_factory=list)
    beside: list[list[float]] = field(default_factory=list)
    num_failed: int = 0
    num_answers: int = 0
    sampled_s: float = 0.0
    num_tokens: int = 0

    def ratio(self, q: float) -> Interval:
        """A block's q-th percentile beside rollouts over its neighbour's without, median of the pairs."""
        return median_ratio(
            [percentile([block], q) for block in self.alone], [percentile([block], q) for block in self.beside]
        )

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "failed": self.num_failed,
            "rollouts": self.num_answers,
            "tokens_per_s": self.num_tokens / max(self.sampled_s, 1e-9),
        }
        for q in (50, 99):
            found[f"p{q}_alone_ms"] = percentile(self.alone, q)
            found[f"p{q}_beside_ms"] = percentile(self.beside, q)
            found[f"p{q}_ratio"] = str(self.ratio(q))
        return found


def measure(home: Path, *, num_pairs: int, block_s: float, threads: int | None = None) -> Users:
    """Start a server on the demo's base, and measure."""
    server = Server.make(home, threads=threads, config={"server": {"ppo_rollouts": True}})
    settings = server.settings
    registry, base, users = open_registry(settings), base_info(settings), Users()
    bodies = conversations.bodies(200, stream=False, max_tokens=MAX_TOKENS)
    load = Load(
        host="127.0.0.1",
        port=server.port,
        path="/v1/chat/completions",
        bodies=bodies,
        num_requests=max(4, int(RATE * block_s)),
        rate=RATE,
        warmup_s=0.0,
        timeout_s=60.0,
    )
    with server, Generator(()) as generator:
        source = ServerSource(settings, registry, base, Sampling(ANSWER_TOKENS), actor="bench")
        source.update(make_adapter(home / "policy", base, rank=16, alpha=32, seed=1), 0)
        source.sample([[1, 2, 3]] * 8, seed=0)
        generator.measure(load)
        for pair in range(num_pairs):
            for is_beside in (False, True) if pair % 2 == 0 else (True, False):
                if is_beside:
                    with _sampling(source, users):
                        measured = generator.measure(load)
                else:
                    measured = generator.measure(load)
                (users.beside if is_beside else users.alone).append(measured.latency_ms)
                users.num_failed += measured.failed
                time.sleep(PAUSE_S)
        source.close()
    registry.database.dispose()
    return users


@contextmanager
def _sampling(source: ServerSource, users: Users) -> Iterator[None]:
    """A source that samples batch after batch while this is open; the last one is waited for."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            began = time.monotonic()
            prompts = [[5 + i, 6, 7, 8 + users.num_answers % 900] for i in range(ANSWERS)]
            rollouts = source.sample(prompts, seed=users.num_answers)
            users.sampled_s += time.monotonic() - began
            users.num_answers += len(rollouts)
            users.num_tokens += sum(len(rollout.response_ids) for rollout in rollouts)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
