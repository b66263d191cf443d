"""A server process without vLLM, to be killed: the plugin's real loops, loader, store and ledger around a fake engine.

`serve_until` runs it in this process until something has come true. What the engine was told is written down beside
`home`, so that it can be read after a kill.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry

from scion_adapters.clock import now
from scion_adapters.records import VersionRef
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import assign
from tests.helpers.killed_operations import Operation, Place, Step
from tests.helpers.legal_state import is_complete
from tests.helpers.waiting import until
from vllm_scion.background import Background, Identity
from vllm_scion.loader import Loader
from vllm_scion.metrics import Metrics
from vllm_scion.serving import Flight, Serving

LOAD_S = 0.05


def engine_log(home: Path) -> Path:
    return home.parent / f"engine-of-{home.name}"


class WrittenEngine:
    """vLLM's side: each call is a side effect, and a line in the log once it is done. Loading takes a few polls."""

    def __init__(self, home: Path, step: Step) -> None:
        self._log = engine_log(home)
        self._step = step

    async def load(self, *, key: str, lora_name: str, lora_id: int, path: str) -> None:
        assert is_complete(Path(path))
        await asyncio.sleep(LOAD_S)
        self._note(f"add {lora_name}")

    def forget(self, *, key: str) -> None:
        self._note(f"forget {key.partition('#')[0]}")

    async def remove(self, *, lora_id: int) -> None:
        self._note(f"remove {lora_id}")

    def _note(self, line: str) -> None:
        self._step(line)
        with self._log.open("a") as file:
            file.write(line + "\n")


def serve_until(home: Path, step: Step, done: Callable[[Place, Loader], bool]) -> Loader:
    """Start a server on `home`, wait until `done`, stop it in good order; returns its loader."""
    place = Place(home)

    async def in_thread(work: Callable[[], str]) -> str:
        return await asyncio.to_thread(work)

    async def serve() -> Loader:
        metrics = Metrics(CollectorRegistry())
        loader = Loader(WrittenEngine(home, step), place.registry.store, Serving(), metrics, in_thread, slots=8)
        identity = Identity("http://x", 4, 8, 16, "sha256:base", now(), f"host:{os.getpid()}")
        ledger = ReplicaLedger(place.database)
        background = Background(place.database, ledger, loader, metrics, place.settings.rollout, identity)
        await background.start()
        try:
            await until(lambda: done(place, loader))
        finally:
            await background.close()
        return loader

    try:
        return asyncio.run(serve())
    finally:
        place.close()


def _loading(place: Place) -> None:
    """chat:1 serves, chat:2 may."""
    place.champion(1)
    place.accepted(2)
    place.silence()


def _load(home: Path, step: Step) -> None:
    """A rollout of chat:2 begins under a running server, which loads it and carries it to everybody in two steps."""

    def is_promoted(place: Place, loader: Loader) -> bool:
        if place.rollouts.active("chat") is None and place.registry.aliases("chat")["champion"] == 1:
            place.start(place.registry.version(VersionRef("chat", 2)), steps=(0.5, 1.0))
        return _asked(loader) == "chat:2" and loader.routing.adapters["chat"].champion == 2

    loader = serve_until(home, step, is_promoted)
    assert {str(version.ref) for version in loader.loaded.values()} == {"chat:1", "chat:2"}


def _draining(place: Place) -> None:
    """chat:2 serves, chat:1 is previous."""
    place.champion(1)
    place.champion(2)
    place.silence()


def _drain(home: Path, step: Step) -> None:
    """Back to the base. chat:2 leaves the engine when the last request for it has ended, and no sooner."""
    flights: list[Flight] = []

    def is_drained(place: Place, loader: Loader) -> bool:
        line = loader.routing.adapters["chat"]
        if line.champion == 2 and not flights:
            flights.append(Flight(loader.serving.in_flight, line.versions[2].lora_id))
            place.rollouts.rollback("chat", to=0, actor="test")
        if line.champion == 0 and flights and {v.ref.number for v in loader.loaded.values()} == {2}:
            flights.pop().land()
        is_gone = line.champion == 0 and not loader.loaded
        assert not (is_gone and flights), "unloaded under a request"
        return is_gone

    serve_until(home, step, is_drained)


def _asked(loader: Loader) -> str:
    """The version that a request for `chat` reaches."""
    published = loader.serving.published
    assignment = assign(published.routing, "chat", "anybody", published.resident)
    assert assignment is not None
    assert assignment.lora_id is None or assignment.lora_id in loader.loaded
    return str(assignment.ref)


SERVERS = {"load": Operation(_loading, _load), "drain": Operation(_draining, _drain)}
