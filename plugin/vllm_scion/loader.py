"""Which versions the engine should hold, and carrying it out: load first, route then; drain first, unload then.

`plan` decides, purely. `Loader` applies a plan through the LoRA table (private_vllm.LoraTable) and publishes the result
for requests (serving.Published). It knows nothing of the database: routing comes in, reports go out (reporter.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from scion_adapters.records import VersionRef
from scion_adapters.routing import Routing
from vllm_scion.metrics import Metrics, labels_of
from vllm_scion.serving import Published, Serving

logger = logging.getLogger("vllm_scion")

RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class WantedVersion:
    """A version that should be resident. When slots are short, `rank` 0 is loaded first."""

    ref: VersionRef
    lora_id: int
    digest: str
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a version could not be loaded, how often that happened, and when to try again (on the loader's clock)."""

    reason: str
    attempts: int
    retry_at: float


@dataclass(frozen=True, slots=True)
class Plan:
    load: tuple[WantedVersion, ...]
    unload: tuple[int, ...]  # not wanted and drained
    refused: Mapping[int, str]  # wanted, and there is no room: why


async def _always(_: int) -> bool:
    return True


class Table(Protocol):
    """What the loader needs of the engine. `forget`: requests no longer find it. `remove`: its slot is free."""

    async def load(self, *, key: str, lora_name: str, lora_id: int, path: str) -> None: ...
    def forget(self, *, key: str) -> None: ...
    async def remove(self, *, lora_id: int) -> None: ...


class Store(Protocol):
    """What the loader needs of the artifact store."""

    def verify(self, digest: str) -> None: ...
    def path(self, digest: str) -> Path: ...


def wanted_versions(routing: Routing) -> tuple[WantedVersion, ...]:
    """Every version that servers should hold, the most needed first."""
    found = []
    for line in routing.adapters.values():
        ranks = {line.champion: 0, line.previous: 1, line.challenger: 2}
        for version in line.versions.values():
            if version.lora_id in routing.wanted:
                rank = ranks.get(version.number, 3)
                found.append(
                    WantedVersion(VersionRef(line.adapter, version.number), version.lora_id, version.digest, rank)
                )
    return tuple(sorted(found, key=lambda v: (v.rank, v.lora_id)))


def plan(
    wanted: Collection[WantedVersion],
    loaded: Collection[int],
    in_flight: Mapping[int, int],
    failures: Mapping[int, Failure],
    *,
    slots: int,
    now: float,
) -> Plan:
    """What to do next, given LoRA ids `loaded` in an engine with `slots` places.

    A version that is no longer wanted keeps its place until its last request has ended. Failed loads wait for
    `retry_at`.
    """
    wanted_ids = {v.lora_id for v in wanted}
    leaving = sorted(set(loaded) - wanted_ids)
    unload = tuple(lora_id for lora_id in leaving if in_flight.get(lora_id, 0) == 0)
    free = slots - (len(set(loaded)) - len(unload))
    load: list[WantedVersion] = []
    refused: dict[int, str] = {}
    for version in wanted:
        if version.lora_id in loaded:
            continue
        if free <= 0:
            draining = len(leaving) - len(unload)
            waits = f", {draining} of them still answering" if draining else ""
            refused[version.lora_id] = (
                f"no free slot: all {slots} (server.max_cpu_loras) are taken{waits}; raise it and restart"
            )
            continue
        free -= 1  # a failed one keeps its claim, so that a less needed version does not take its place
        failure = failures.get(version.lora_id)
        if failure is None or failure.retry_at <= now:
            load.append(version)
    return Plan(tuple(load), unload, refused)


@dataclass(slots=True)
class Loader:
    """Keeps the engine's versions in step with the routing. One task at a time calls `step`."""

    table: Table
    store: Store
    serving: Serving
    metrics: Metrics
    run_in_thread: Callable[[Callable[[], str]], Awaitable[str]]
    slots: int
    approve: Callable[[VersionRef], None] = lambda _: None
    """Raises when the version must not be served by this engine; called in a thread before each load."""
    may_remove: Callable[[int], Awaitable[bool]] = field(default=_always)
    """Whether the engine may forget a LoRA id that this process does not use any more: others may share the engine."""
    monotonic: Callable[[], float] = time.monotonic
    routing: Routing = field(init=False)
    loaded: dict[int, WantedVersion] = field(default_factory=dict)
    leaving: dict[int, WantedVersion] = field(default_factory=dict)  # unused here, and still in the engine
    failures: dict[int, Failure] = field(default_factory=dict)
    _secret: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self.routing = self.serving.published.routing

    def follow(self, routing: Routing) -> None:
        """Act on `routing` from the next request on, with what is loaded already. Loads follow in `step`."""
        self.routing = routing
        self._publish()

    async def step(self) -> bool:
        """Load what is missing, unload what is drained. True if the engine's versions, or the failures, changed."""
        wanted = wanted_versions(self.routing)
        wanted_ids = {v.lora_id for v in wanted}
        before = self._state()
        for lora_id in [i for i in self.failures if i not in wanted_ids]:
            del self.failures[lora_id]
        todo = plan(
            wanted,
            self.loaded,
            self.serving.in_flight,
            self.failures,
            slots=self.slots - len(self.leaving),
            now=self.monotonic(),
        )
        for version in list(self.leaving.values()):
            await self._remove(version)
        for lora_id in todo.unload:
            # Asked again: while the one before it was removed, a new routing may have given this one traffic.
            if lora_id not in self.routing.wanted and self.serving.in_flight.get(lora_id, 0) == 0:
                self._retire(self.loaded[lora_id])
                await self._remove(self.leaving[lora_id])
        for lora_id, reason in todo.refused.items():
            self.failures[lora_id] = Failure(reason, 0, 0.0)
        for version in todo.load:
            await self._load(version)
        return before != self._state()

    def _state(self) -> tuple[object, ...]:
        return frozenset(self.loaded), frozenset(self.leaving), {i: f.reason for i, f in self.failures.items()}

    @property
    def is_settled(self) -> bool:
        """Nothing to load, unload or retry."""
        is_complete = self.loaded.keys() == {v.lora_id for v in wanted_versions(self.routing)}
        return is_complete and not self.failures and not self.leaving

    async def _load(self, version: WantedVersion) -> None:
        def prepare() -> str:
            self.approve(version.ref)
            self.store.verify(version.digest)
            return str(self.store.path(version.digest))

        started = self.monotonic()
        try:
            path = await self.run_in_thread(prepare)
            await self.table.load(
                key=self._key(version.ref), lora_name=str(version.ref), lora_id=version.lora_id, path=path
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(version, error)
            return
        seconds = self.monotonic() - started
        self.failures.pop(version.lora_id, None)
        self.loaded[version.lora_id] = version
        self.leaving.pop(version.lora_id, None)
        self.metrics["scion_adapter_loads_total"].labels("ok").inc()
        self.metrics["scion_adapter_load_seconds"].observe(seconds)
        logger.info("loaded %s (LoRA id %d) in %.3f s", version.ref, version.lora_id, seconds)
        self._publish()

    def _retire(self, version: WantedVersion) -> None:
        """No request finds the version any more, and none is left that does. The engine still holds it."""
        del self.loaded[version.lora_id]
        self.leaving[version.lora_id] = version
        self._publish()
        self.serving.in_flight.pop(version.lora_id, None)
        self.table.forget(key=self._key(version.ref))
        self.metrics["scion_in_flight_requests"].labels(*labels_of(version.ref)).set(0)

    async def _remove(self, version: WantedVersion) -> None:
        try:
            if not await self.may_remove(version.lora_id) or version.lora_id in self.loaded:
                return
            del self.leaving[version.lora_id]
            await self.table.remove(lora_id=version.lora_id)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("%s: the engine did not remove it; its slot stays taken until it is evicted", version.ref)
            return
        self.metrics["scion_adapter_unloads_total"].inc()
        logger.info("unloaded %s (LoRA id %d)", version.ref, version.lora_id)

    def _failed(self, version: WantedVersion, error: Exception) -> None:
        last = self.failures.get(version.lora_id)
        attempts = (last.attempts if last else 0) + 1
        wait = min(RETRY_FIRST_S * 2 ** (attempts - 1), RETRY_LONGEST_S)
        reason = f"{type(error).__name__}: {error}"[:500]
        self.failures[version.lora_id] = Failure(reason, attempts, self.monotonic() + wait)
        self.metrics["scion_adapter_loads_total"].labels("failed").inc()
        logger.error("%s could not be loaded, next try in %.0f s: %s", version.ref, wait, reason)

    def _publish(self) -> None:
        """Let requests see the routing, with those of its versions that are loaded."""
        resident = frozenset(self.routing.wanted & self.loaded.keys())
        names = {lora_id: self._key(self.loaded[lora_id].ref) for lora_id in resident}
        self.serving.published = Published(self.routing, resident, MappingProxyType(names))

    def _key(self, ref: VersionRef) -> str:
        """The version's name in vLLM's own table: unguessable, so that only routed requests reach an adapter.

        Routes that we do not wrap (batches, tokens in and out, SageMaker's) would neither be counted nor recorded, nor
        kept from candidates.
        """
        return f"{ref}#{self._secret}"
