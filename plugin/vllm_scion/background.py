"""What a server process does beside answering: follow the routing, load versions, report itself, look after rollouts.

Small loops on the event loop, each with its database work in threads, so that a slow heartbeat delays no routing.
A database that does not answer is logged once, counted, and tried again: the last routing stays in force. Decisions are
made elsewhere (loader.plan, scion_adapters.controller).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from scion_adapters import controller
from scion_adapters.clock import Clock, new_id, now
from scion_adapters.database import Database
from scion_adapters.errors import ScionError
from scion_adapters.keys import KeyRing, load_key_ring
from scion_adapters.leases import release, try_acquire
from scion_adapters.notifications import listen
from scion_adapters.records import Replica, is_step_line
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import Routing, load_routing, read_revision
from scion_adapters.sections.serving import RolloutSection
from scion_adapters.timekeeping import Timekeeper
from vllm_scion.authority import Gatekeeper
from vllm_scion.loader import Loader, WantedVersion
from vllm_scion.metrics import Metrics, labels_of
from vllm_scion.refusals import CountedRefusal, Refusals, write_refusals

logger = logging.getLogger("vllm_scion")

CONTROLLER_LEASE = "controller"
SILENT_INTERVALS = 5
"""A server that has not reported for so many heartbeats stops counting (RolloutSection.heartbeat_s)."""

STUMBLE_PAUSE_S = 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """What this server process says of itself in the ledger."""

    url: str
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    base_fingerprint: str
    started_at: float
    engine: str  # the same for all API server processes in front of one engine
    is_engine_shared: bool = False
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    id: str = field(default_factory=lambda: new_id("server"))


@dataclass(slots=True)
class Background:
    """The loops. `start` returns once the routing is followed and its versions are loaded."""

    database: Database
    ledger: ReplicaLedger
    loader: Loader
    metrics: Metrics
    settings: RolloutSection
    identity: Identity
    check_files: Callable[[Collection[WantedVersion]], None] = lambda _: None
    """Quarantines resident versions whose files are gone; called in a thread now and then (file_watch.py)."""
    gatekeeper: Gatekeeper = field(default_factory=Gatekeeper)
    refusals: Refusals = field(default_factory=Refusals)
    clock: Clock | None = None  # for the rollouts' steps; None: the database's own
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=4, thread_name_prefix="scion-db")
    )
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _look: asyncio.Event = field(default_factory=asyncio.Event)
    _load: asyncio.Event = field(default_factory=asyncio.Event)
    _tell: asyncio.Event = field(default_factory=asyncio.Event)
    _broken: set[str] = field(default_factory=set)
    _untold: list[CountedRefusal] = field(default_factory=list)  # refusals that are not written yet
    _holds_lease: bool = False
    _lease_due: float = 0.0
    _timekeeper: Timekeeper = field(default_factory=Timekeeper)

    @property
    def ttl_s(self) -> float:
        """How long a silent server still counts, and the length of the controller's lease."""
        return self.settings.heartbeat_s * SILENT_INTERVALS

    async def start(self) -> None:
        """Raises when the database does not answer: without a first routing there is nothing to serve."""
        if self.identity.is_engine_shared:
            self.loader.may_remove = self._may_remove
        self._follow(*await self._in_thread(self._read))
        await self.loader.step()
        await self._in_thread(lambda: self.ledger.report(self.replica()))
        serving = (self._watch, self._listen, self._keep_loaded, self._report, self._control)
        for loop in (*serving, self._watch_files, self._tell_refusals):
            self._tasks.append(asyncio.create_task(self._forever(loop), name=f"scion-{loop.__name__.strip('_')}"))

    async def close(self) -> None:
        """Stop, and leave the ledger, so that rollouts no longer wait for this server."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        # A report that is still being written would bring the row back after its removal: let it end first.
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        try:
            await asyncio.to_thread(self._leave, [*self._untold, *self.refusals.take_all()])
        except ScionError as error:
            logger.warning("could not leave the ledger (it is forgotten after %g s): %s", self.ttl_s, error)

    def wake(self) -> None:
        """The routing may have changed: look now instead of at the next poll."""
        self._look.set()

    def replica(self) -> Replica:
        """This process as the ledger shows it."""
        return Replica(
            id=self.identity.id,
            host=self.identity.host,
            pid=self.identity.pid,
            url=self.identity.url,
            started_at=self.identity.started_at,
            heartbeat_at=now(),  # the ledger puts the database's time
            max_loras=self.identity.max_loras,
            max_cpu_loras=self.identity.max_cpu_loras,
            max_lora_rank=self.identity.max_lora_rank,
            loaded=frozenset(self.loader.loaded),
            failed={lora_id: failure.reason for lora_id, failure in self.loader.failures.items()},
            in_flight={i: n for i, n in self.loader.serving.in_flight.items() if n > 0},
            routing_revision=self.loader.routing.revision,
            base_fingerprint=self.identity.base_fingerprint,
            engine=self.identity.engine,
        )

    # --- the loops ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Follow the routing: requests obey a new one from here on; what it needs loaded is the next loop's work."""
        self._show_levels()
        revision = await self._attempt("routing", lambda: read_revision(self.database))
        if revision is not None and revision != self.loader.routing.revision:
            found = await self._attempt("routing", self._read)
            if found is not None:
                self._follow(*found)
                self._load.set()
                self._tell.set()
        is_told = self._broken.isdisjoint(("listen", "routing"))
        await _wait(self._look, self.settings.heartbeat_s if is_told else self.settings.poll_interval_s)

    async def _listen(self) -> None:
        """Hear of changes at once. When that breaks, `_watch` still finds them at its next poll."""

        def heard() -> None:
            self._works("listen")
            self.wake()

        try:
            await listen(self.database, heard)
        except Exception as error:  # every driver has its own
            self._fails("listen", error)
            await asyncio.sleep(self.settings.heartbeat_s)

    async def _keep_loaded(self) -> None:
        if await self.loader.step():
            self._tell.set()
        await _wait(self._load, None if self.loader.is_settled else self.settings.poll_interval_s)

    async def _report(self) -> None:
        await _wait(self._tell, self.settings.heartbeat_s)
        replica = self.replica()
        await self._attempt("report", lambda: self.ledger.report(replica))

    async def _control(self) -> None:
        """Look after active rollouts, if this process holds the lease; one process of all does."""
        if any(line.rollout_id is not None for line in self.loader.routing.adapters.values()):
            if self._monotonic() >= self._lease_due:  # a write: not at every poll
                asked_at = self._monotonic()
                self._holds_lease = await self._attempt("lease", self._hold_lease) is True
                self._lease_due = asked_at + (self.ttl_s / 3 if self._holds_lease else self.settings.heartbeat_s)
            if self._holds_lease:
                self.metrics["scion_controller_ticks_total"].inc()
                await self._attempt("controller", self._tick)
                self.wake()
        self.metrics["scion_controller_lease_held"].set(1 if self._holds_lease else 0)
        await asyncio.sleep(self.settings.poll_interval_s)

    async def _tell_refusals(self) -> None:
        """Write down who was refused."""
        await asyncio.sleep(self.settings.heartbeat_s)
        self._untold = self._untold or self.refusals.take_due()
        if self._untold:
            await self._attempt("refusals", self._tell_untold)

    async def _watch_files(self) -> None:
        """Take versions whose files were lost out of traffic."""
        await asyncio.sleep(self.settings.heartbeat_s)
        resident = tuple(self.loader.loaded.values())
        await self._attempt("files", lambda: self.check_files(resident))

    # --- shared -------------------------------------------------------------------------------------------------------

    async def _may_remove(self, lora_id: int) -> bool:
        """Whether no other process in front of this engine uses the version any more; what we use is told them first.

        False when the database does not answer: a slot stays taken for a while, and nobody's answer is endangered.
        """
        replica = self.replica()

        def look() -> bool:
            self.ledger.report(replica)
            others = (r for r in self.ledger.live(self.ttl_s) if r.engine == replica.engine and r.id != replica.id)
            return not any(lora_id in other.loaded or lora_id in other.in_flight for other in others)

        return await self._attempt("report", look) is True

    def _leave(self, refusals: list[CountedRefusal]) -> None:
        if self._holds_lease:
            release(self.database, CONTROLLER_LEASE, self.identity.id)
        self.ledger.remove(self.identity.id)
        if refusals:
            write_refusals(self.database, refusals, actor=self.identity.id)

    def _tell_untold(self) -> None:
        write_refusals(self.database, self._untold, actor=self.identity.id)
        self._untold = []

    def _hold_lease(self) -> bool:
        return try_acquire(self.database, CONTROLLER_LEASE, self.identity.id, self.ttl_s)

    def _read(self) -> tuple[Routing, KeyRing]:
        return load_routing(self.database), load_key_ring(self.database)

    def _follow(self, routing: Routing, ring: KeyRing) -> None:
        self.loader.follow(routing)
        self.gatekeeper.follow(ring)

    def _tick(self) -> None:
        controller.tick(self.database, self.clock, heartbeat_ttl_s=self.ttl_s, timekeeper=self._timekeeper)

    def _show_levels(self) -> None:
        self.metrics["scion_routing_revision"].set(self.loader.routing.revision)
        self.metrics["scion_resident_versions"].set(len(self.loader.loaded))
        self.metrics["scion_failed_versions"].set(len(self.loader.failures))
        active, weight = self.metrics["scion_rollout_active"], self.metrics["scion_rollout_weight"]
        for name, line in self.loader.routing.adapters.items():
            if is_step_line(name):
                continue
            active.labels(name).set(1 if line.rollout_id is not None else 0)
            weight.labels(name).set(line.weight)
        in_flight: Counter[tuple[str, str]] = Counter()
        for lora_id, version in self.loader.loaded.items():
            in_flight[labels_of(version.ref)] += self.loader.serving.in_flight.get(lora_id, 0)
        for labels, count in in_flight.items():
            self.metrics["scion_in_flight_requests"].labels(*labels).set(count)

    async def _forever(self, loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            try:
                await loop()
            except asyncio.CancelledError:
                raise
            except Exception:  # a mistake in one round must not end the loop, nor the server
                logger.exception("%s stumbled; it goes on", loop.__name__)
                await asyncio.sleep(STUMBLE_PAUSE_S)

    async def _attempt(self, operation: str, work: Callable[[], T]) -> T | None:
        """`work` in a thread; None when it failed, which is counted, and logged when it begins and ends."""
        try:
            result = await self._in_thread(work)
        except Exception as error:
            self._fails(operation, error)
            return None
        self._works(operation)
        return result

    def _fails(self, operation: str, error: Exception) -> None:
        self.metrics["scion_database_errors_total"].labels(operation).inc()
        if operation not in self._broken:
            self._broken.add(operation)
            revision = self.loader.routing.revision
            logger.error("%s: %s; serving goes on with routing revision %d", operation, error, revision)

    def _works(self, operation: str) -> None:
        if operation in self._broken:
            self._broken.discard(operation)
            logger.info("%s: works again", operation)

    @staticmethod
    def _monotonic() -> float:
        return asyncio.get_running_loop().time()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


async def _wait(event: asyncio.Event, timeout_s: float | None) -> None:
    """Until `event` is set or the time is over; the event is taken."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
