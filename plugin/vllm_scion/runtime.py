"""One server process of ours, put together: what is opened when vLLM initialises its state, and closed when it stops.

Wires settings, database, store, registry, recorder, loader and loops to each other; decides nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from scion_adapters.clock import now
from scion_adapters.database import Database, open_database
from scion_adapters.errors import InvalidInputError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import VersionState
from scion_adapters.registry import open_registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.settings import Settings
from scion_feedback.feedback import FeedbackStore
from scion_feedback.privacy import UserHasher, open_hasher
from scion_feedback.recorder import Recorder, open_recorder
from vllm_scion.background import Background, Identity
from vllm_scion.gateway import Gateway
from vllm_scion.loader import Loader, Table

logger = logging.getLogger("vllm_scion")

CLOSE_TIMEOUT_S = 10.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the running engine says of itself. `base_names` are the names under which the base is served."""

    table: Table
    base_names: tuple[str, ...]
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    url: str


@dataclass(slots=True)
class Runtime:
    """Everything of ours in a running server."""

    settings: Settings
    database: Database
    gateway: Gateway
    recorder: Recorder
    feedback: FeedbackStore
    background: Background
    threads: ThreadPoolExecutor

    async def in_thread(self, work: Callable[[], T]) -> T:
        """`work` in a thread that requests share, apart from the background loops'."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def close(self) -> None:
        """Leave the ledger, bring what is recorded to disk, let go of the database."""
        await self.background.close()
        self.gateway.submit = None
        if not await self.in_thread(lambda: self.recorder.close(CLOSE_TIMEOUT_S)):
            logger.warning(
                "some answers stay in the journal %s; the next server stores them", self.settings.capture.journal
            )
        self.threads.shutdown(wait=False)
        self.database.dispose()

    def status(self) -> dict[str, Any]:
        """What `GET /v1/scion/status` shows."""
        loader = self.background.loader
        capture = self.recorder.stats()
        adapters: dict[str, Any] = {}
        for name, line in loader.routing.adapters.items():
            candidates = [v.number for v in line.versions.values() if v.state is VersionState.CANDIDATE]
            adapters[name] = {
                "champion": line.champion,
                "challenger": line.challenger,
                "previous": line.previous,
                "weight": line.weight,
                "rollout": line.rollout_id,
                "aliases": dict(line.aliases),
                "under_evaluation": sorted(candidates),
            }
        resident = [
            {"version": str(v.ref), "lora_id": lora_id, "in_flight": loader.serving.in_flight.get(lora_id, 0)}
            for lora_id, v in sorted(loader.loaded.items())
        ]
        return {
            "replica": self.background.identity.id,
            "base": self.gateway.base_name,
            "base_fingerprint": self.background.identity.base_fingerprint,
            "routing_revision": loader.routing.revision,
            "adapters": adapters,
            "resident": resident,
            "failed": {str(lora_id): failure.reason for lora_id, failure in loader.failures.items()},
            "slots": {"max_loras": self.background.identity.max_loras, "max_cpu_loras": loader.slots},
            "capture": {
                "enabled": self.settings.capture.enabled,
                "queued": capture.queued,
                "journaled": capture.journaled,
                "stored": capture.stored,
                "conflicting": capture.conflicting,
                "lost": dict(capture.lost),
            },
        }


async def open_runtime(settings: Settings, gateway: Gateway, engine: EngineFacts) -> Runtime:
    """Open everything and follow the routing. Raises ScionError, with a message for the operator."""
    check_engine(settings, engine)
    threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="scion-http")
    loop = asyncio.get_running_loop()
    try:
        database, hasher = await loop.run_in_executor(threads, _open_stores, settings)
        try:
            return await _assemble(settings, gateway, engine, threads, database, hasher)
        except BaseException:
            database.dispose()
            raise
    except BaseException:
        threads.shutdown(wait=False)
        raise


def check_engine(settings: Settings, engine: EngineFacts) -> None:
    """Raises InvalidInputError when the engine was not started as the settings need it."""
    if engine.max_cpu_loras < 1:
        raise InvalidInputError(
            "this vLLM was started without LoRA: start it with `scion serve`, or with the flags that "
            "`scion serve --print` shows"
        )
    for name in settings.adapters:
        if name in engine.base_names:
            raise InvalidInputError(
                f"adapters.{name}: the base is served under that name too; rename the adapter, or set base.served_name",
                field=f"adapters.{name}",
            )


def _open_stores(settings: Settings) -> tuple[Database, UserHasher]:
    return open_database(settings), open_hasher(settings)


async def _assemble(
    settings: Settings,
    gateway: Gateway,
    engine: EngineFacts,
    threads: ThreadPoolExecutor,
    database: Database,
    hasher: UserHasher,
) -> Runtime:
    loop = asyncio.get_running_loop()

    async def in_thread(work: Callable[[], T]) -> T:
        return await loop.run_in_executor(threads, work)

    registry = await in_thread(lambda: open_registry(settings, database))
    fingerprint = (await in_thread(lambda: base_info(settings))).fingerprint
    recorder = await in_thread(lambda: open_recorder(settings, database, gateway.metrics))
    background = Background(
        database=database,
        ledger=ReplicaLedger(database),
        loader=Loader(
            table=engine.table,
            store=registry.store,
            serving=gateway.serving,
            metrics=gateway.metrics,
            run_in_thread=in_thread,
            slots=engine.max_cpu_loras,
        ),
        metrics=gateway.metrics,
        settings=settings.rollout,
        identity=Identity(
            url=engine.url,
            max_loras=engine.max_loras,
            max_cpu_loras=engine.max_cpu_loras,
            max_lora_rank=engine.max_lora_rank,
            base_fingerprint=fingerprint,
            started_at=now(),
        ),
    )
    recorder.start()
    gateway.base_name = engine.base_names[0]
    gateway.hasher = hasher
    gateway.submit = recorder.submit if settings.capture.enabled else None
    try:
        await background.start()
    except BaseException:
        await in_thread(lambda: recorder.close(0.0))
        raise
    feedback = FeedbackStore(database, hasher, now)
    return Runtime(settings, database, gateway, recorder, feedback, background, threads)
