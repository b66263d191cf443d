"""One server process of ours, put together: what is opened when vLLM initialises its state, and closed when it stops.

Wires settings, database, store, registry, recorder, loader and loops to each other; decides nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from scion_adapters.clock import now
from scion_adapters.database import Database, open_database
from scion_adapters.errors import InvalidInputError, RejectedError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.keys import load_key_ring
from scion_adapters.records import VersionRef, VersionState
from scion_adapters.registry import Registry, open_registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.retirement import quarantine
from scion_adapters.settings import Settings
from scion_feedback.captures import CompletionRecord
from scion_feedback.feedback import FeedbackStore
from scion_feedback.privacy import UserHasher, open_hasher
from scion_feedback.recorder import RecorderObserver, RecorderStats
from vllm_scion.authority import Gatekeeper, Refusal, check_access
from vllm_scion.background import Background, Identity
from vllm_scion.file_watch import FileWatch
from vllm_scion.gateway import Gateway
from vllm_scion.handover import Handover
from vllm_scion.loader import Loader, Table
from vllm_scion.serve import OPEN_SERVER, RUNTIME_LORA, check_names, is_loopback

logger = logging.getLogger("vllm_scion")

CLOSE_TIMEOUT_S = 10.0
T = TypeVar("T")


class Recorder(Protocol):
    """What records answers: scion_feedback's, in a process of its own or in threads of this one."""

    def start(self) -> None: ...
    def submit(self, build: Callable[[], CompletionRecord | None]) -> bool: ...
    def flush(self) -> None: ...
    def stats(self) -> RecorderStats: ...
    def close(self, timeout_s: float = ...) -> bool: ...


OpenRecorder = Callable[[Settings, RecorderObserver], Recorder]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the running engine says of itself. `base_names` are the names under which the base is served."""

    table: Table
    base_names: tuple[str, ...]
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    url: str
    engine: str
    is_engine_shared: bool = False
    host: str = ""  # the address that it listens on; empty: all
    has_api_key: bool = False  # vLLM's own


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
    loading: ThreadPoolExecutor  # of its own: votes that wait for a locked database must not hold up a load
    uploading: ThreadPoolExecutor  # of its own: nor must hashing an upload hold up votes
    registry: Registry
    base: BaseInfo

    async def in_thread(self, work: Callable[[], T]) -> T:
        """`work` in a thread that requests share, apart from the background loops'."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def in_upload_thread(self, work: Callable[[], T]) -> T:
        """`work` in a thread that uploads share."""
        return await asyncio.get_running_loop().run_in_executor(self.uploading, work)

    async def close(self) -> None:
        """Leave the ledger, bring what is recorded to disk, let go of the database."""
        await self.background.close()
        self.gateway.handover = None
        if not await asyncio.to_thread(self.recorder.close, CLOSE_TIMEOUT_S):
            logger.warning(
                "some answers stay in the journal %s; the next server stores them", self.settings.capture.journal
            )
        self.threads.shutdown(wait=False)
        self.loading.shutdown(wait=False)
        self.uploading.shutdown(wait=False)
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
            "engine": self.background.identity.engine,
            "base": self.gateway.base_name,
            "base_fingerprint": self.background.identity.base_fingerprint,
            "routing_revision": loader.routing.revision,
            "adapters": adapters,
            "resident": resident,
            "leaving": [str(v.ref) for v in loader.leaving.values()],
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


async def open_runtime(
    settings: Settings, gateway: Gateway, gatekeeper: Gatekeeper, engine: EngineFacts, open_recorder: OpenRecorder
) -> Runtime:
    """Open everything and follow the routing. Raises ScionError, with a message for the operator."""
    check_engine(settings, engine)
    opened = await asyncio.to_thread(_open, settings, gateway, engine, open_recorder)
    ring = await asyncio.to_thread(load_key_ring, opened.registry.database)
    check_access(ring, engine.has_api_key)
    gatekeeper.has_vllm_key = engine.has_api_key
    if ring.is_open and not engine.has_api_key and not is_loopback(engine.host):
        logger.warning("%s", OPEN_SERVER.format(host=engine.host or "every address"))
    threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="scion-http")
    loading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scion-load")
    uploading = ThreadPoolExecutor(max_workers=2, thread_name_prefix="scion-upload")
    background = _make_background(settings, gateway, gatekeeper, engine, opened, loading)
    opened.recorder.start()
    gateway.base_name = engine.base_names[0]
    gateway.hash_key = opened.hasher.key
    gateway.handover = Handover(opened.recorder) if settings.capture.enabled else None
    feedback = FeedbackStore(opened.registry.database, opened.hasher, now)
    runtime = Runtime(
        settings=settings,
        database=opened.registry.database,
        gateway=gateway,
        recorder=opened.recorder,
        feedback=feedback,
        background=background,
        threads=threads,
        loading=loading,
        uploading=uploading,
        registry=opened.registry,
        base=opened.base,
    )
    try:
        await background.start()
    except BaseException:
        await runtime.close()
        raise
    return runtime


def check_engine(settings: Settings, engine: EngineFacts) -> None:
    """Raises InvalidInputError when the engine was not started as the settings need it."""
    if engine.max_cpu_loras < 1:
        raise InvalidInputError(
            "this vLLM was started without LoRA: start it with `scion serve`, or with the flags that "
            "`scion serve --print` shows"
        )
    if os.environ.get(RUNTIME_LORA, "0").lower() in ("1", "true"):
        raise InvalidInputError(
            f"{RUNTIME_LORA} is set: it lets everybody load any path as an adapter, past every check; unset it",
            field=RUNTIME_LORA,
        )
    check_names(settings.adapters, engine.base_names)


@dataclass(frozen=True, slots=True)
class _Opened:
    """What takes disk or database to open."""

    registry: Registry
    hasher: UserHasher
    recorder: Recorder
    base: BaseInfo


def _open(settings: Settings, gateway: Gateway, engine: EngineFacts, open_recorder: OpenRecorder) -> _Opened:
    hasher = open_hasher(settings)
    base = base_info(settings)
    registry = open_registry(settings, open_database(settings), base_names=engine.base_names)
    check_names(registry.adapters(), engine.base_names)  # those of earlier days too
    return _Opened(registry, hasher, open_recorder(settings, gateway.metrics), base)


def _make_background(
    settings: Settings,
    gateway: Gateway,
    gatekeeper: Gatekeeper,
    engine: EngineFacts,
    opened: _Opened,
    loading: ThreadPoolExecutor,
) -> Background:
    async def in_loading_thread(work: Callable[[], str]) -> str:
        return await asyncio.get_running_loop().run_in_executor(loading, work)

    def approve(ref: VersionRef) -> None:
        made_for = opened.registry.version(ref).base_fingerprint
        if made_for != opened.base.fingerprint:
            raise RejectedError(
                f"{ref} was made for the base {made_for}, this server has {opened.base.fingerprint}: "
                "serve it on its own base, or train a new version on this one",
                reason="wrong_base",
            )

    loader = Loader(
        table=engine.table,
        store=opened.registry.store,
        serving=gateway.serving,
        metrics=gateway.metrics,
        run_in_thread=in_loading_thread,
        slots=engine.max_cpu_loras,
        approve=approve,
    )
    identity = Identity(
        url=engine.url,
        max_loras=engine.max_loras,
        max_cpu_loras=engine.max_cpu_loras,
        max_lora_rank=engine.max_lora_rank,
        base_fingerprint=opened.base.fingerprint,
        started_at=now(),
        engine=engine.engine,
        is_engine_shared=engine.is_engine_shared,
    )
    database = opened.registry.database

    def lost(ref: VersionRef, reason: str) -> None:
        quarantine(database, ref, actor=identity.id, reason=reason)

    watch = FileWatch(opened.registry.store, lost)
    ledger = ReplicaLedger(database)
    background = Background(
        database, ledger, loader, gateway.metrics, settings.rollout, identity, watch.check, gatekeeper
    )

    def refused(refusal: Refusal) -> None:
        gateway.metrics["scion_access_refused_total"].labels(refusal.reason).inc()
        background.refusals.add(refusal)

    gatekeeper.refused = refused
    return background
