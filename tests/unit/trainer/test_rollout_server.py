"""Rollouts from servers: the order of a step, what a server must offer, and what happens when it goes away.

The registry and the ledger are real; the server's side of both is played here, and its HTTP by FakeVllm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.records import Replica
from scion_adapters.registry import Registry, open_registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import load_routing
from scion_adapters.settings import Settings, load_settings
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.server import ServerSource
from tests.helpers.adapters import make_adapter, make_base
from tests.helpers.databases import sqlite_database
from tests.helpers.fake_vllm import EOS, FakeVllm
from tests.helpers.rollout_contract import SOURCE_CONTRACT, SourceSubject

PROMPTS = [[7, 8, 9 + i] for i in range(12)]


class World:
    """A registry and one server that loads what is wanted as soon as it looks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_base(directory / "base")
        file = directory / "scion.toml"
        file.write_text('[base]\nmodel = "base"\n[gates]\nserver_timeout_s = 5\n', encoding="utf-8")
        self.settings: Settings = load_settings(file)
        self.registry: Registry = open_registry(self.settings, sqlite_database(directory))
        self.base: BaseInfo = base_info(self.settings)
        self.vllm = FakeVllm()
        self.loaded: list[frozenset[int]] = []
        self.replica = Replica(
            "server-1", "host", 1, "http://x", 0.0, 0.0, 4, 8, 16, frozenset(), {}, {}, 1, self.base.fingerprint
        )
        self._seeds = iter(range(1000))

    def adapter(self) -> Path:
        seed = next(self._seeds)
        return make_adapter(self.directory / f"step-{seed}", self.base, seed=seed)

    def look(self) -> None:
        """What a server does when the routing changed."""
        wanted = load_routing(self.registry.database).wanted
        if not self.loaded or self.loaded[-1] != wanted:
            self.loaded.append(wanted)
        ReplicaLedger(self.registry.database).report(replace(self.replica, loaded=wanted))

    def source(self) -> ServerSource:
        return ServerSource(
            self.settings,
            self.registry,
            self.base,
            Sampling(8),
            actor="run-1",
            concurrency=3,
            transport=self.vllm.transport(),
        )

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The server lives while this is open."""
        stop = threading.Event()

        def serve() -> None:
            while not stop.wait(0.005):
                self.look()

        self.look()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            ReplicaLedger(self.registry.database).remove("server-1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.registry.database.dispose()


@pytest.fixture(scope="module")
def subject(world: World) -> Iterator[SourceSubject]:
    with world.serving():
        source = world.source()
        source.update(world.adapter(), 0)
        yield SourceSubject(source, PROMPTS, 8, frozenset({EOS}))
        source.close()


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(subject: SourceSubject, check: Callable[[SourceSubject], None]) -> None:
    check(subject)


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.registry.database.dispose()


def test_each_step_has_a_fresh_name_and_key_and_is_loaded_before_the_last_one_is_dropped(fresh: World) -> None:
    with fresh.serving():
        source = fresh.source()
        for step in range(3):
            source.update(fresh.adapter(), step)
            source.sample(PROMPTS, seed=step)
        source.close()
    asked = [body["model"] for body in fresh.vllm.bodies if body["model"] != "base"]
    names = list(dict.fromkeys(asked))
    assert [name.partition(":")[2] for name in names] == ["1", "2", "3"]
    assert asked == sorted(asked), "an answer of an old step after the new one was loaded"
    keys = {headers.get("x-scion-evaluation") for headers in fresh.vllm.headers} - {None}
    assert len(keys) == 3
    sizes = [len(loaded) for loaded in fresh.loaded]
    assert max(sizes) == 2
    assert 0 not in sizes[1:-1], "make before break"
    assert fresh.registry.adapters() == ["chat"]


def test_before_the_first_update_there_is_nothing_to_sample_from(fresh: World) -> None:
    with pytest.raises(ConflictError, match="update"):
        fresh.source().sample(PROMPTS, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda world: setattr(world.vllm, "has_priorities", False), "ppo_rollouts"),
        (lambda world: setattr(world.vllm, "has_processed_log_probs", False), "ppo_rollouts"),
        (lambda world: setattr(world, "replica", replace(world.replica, max_cpu_loras=1)), "slots"),
        (lambda world: setattr(world, "replica", replace(world.replica, base_fingerprint="sha256:x")), "another base"),
        (lambda world: setattr(world.vllm, "is_away", True), "does not answer"),
    ],
    ids=["no priorities", "raw log-probs", "no slots", "another base", "away"],
)
def test_a_server_that_cannot_be_sampled_from_is_said_with_the_remedy(
    fresh: World, change: Callable[[World], None], message: str
) -> None:
    change(fresh)
    with fresh.serving(), pytest.raises(UnavailableError, match=message):
        fresh.source().update(fresh.adapter(), 0)
    assert fresh.registry.adapters() == ["chat"], "nothing was left behind"


def test_no_live_server_is_said_at_once(fresh: World) -> None:
    with pytest.raises(UnavailableError, match="scion serve"):
        fresh.source().update(fresh.adapter(), 0)


def test_a_server_that_dies_in_the_middle_is_unavailable_and_close_takes_everything_back(fresh: World) -> None:
    source = fresh.source()
    with fresh.serving():
        source.update(fresh.adapter(), 0)
    fresh.vllm.is_away = True
    with pytest.raises(UnavailableError, match="does not answer"):
        source.sample(PROMPTS, seed=0)
    source.close()
    source.close()
    assert fresh.registry.adapters() == ["chat"]


def test_a_server_that_forgot_the_step_is_unavailable(fresh: World) -> None:
    source = fresh.source()
    with fresh.serving():
        source.update(fresh.adapter(), 0)
        fresh.vllm.models = {"base"}
        with pytest.raises(UnavailableError, match="step of run-1"):
            source.sample(PROMPTS, seed=0)
        source.close()
