"""What is killed at each of its side effects: real operations on a registry with real (tiny) files, by name.

`prepare` builds the state before, in a fresh folder; `run` does the operation there. A folder holds scion.toml, the
base, the store, and the database unless scion.toml names another. `run` gets `step`, to be called before each side
effect that Python does not see by itself (a fake engine's).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from scion_adapters import controller, tables
from scion_adapters.clock import now
from scion_adapters.database import Database
from scion_adapters.fingerprint import base_info
from scion_adapters.gc import collect
from scion_adapters.records import Replica, Rollout, Version, VersionRef
from scion_adapters.registry import limits_of, open_registry
from scion_adapters.repair import find_leftovers
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.retirement import quarantine, reinstate, retire
from scion_adapters.rollouts import Rollouts
from scion_adapters.settings import load_settings
from scion_trainer.config import run_config
from scion_trainer.runs import RunStore
from tests.helpers.adapters import make_adapter, make_base
from tests.helpers.serving import to_toml

TTL_S = 1e6  # the servers of these worlds never fall silent, unless a test says so
Step = Callable[[str], None]


class Place:
    """A folder, opened."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.settings = load_settings(home / "scion.toml")
        self.registry = open_registry(self.settings)
        self.database = self.registry.database
        self.rollouts = Rollouts(self.database, ttl_s=TTL_S)

    def publish(self, seed: int, *, run_id: str | None = None) -> Version:
        directory = self.home / f"trained-{seed}"
        if not directory.exists():
            make_adapter(directory, self.home / "base", seed=seed, scion={"seed": seed})
        return self.registry.publish(
            "chat",
            directory,
            parent=0,
            base=base_info(self.settings),
            limits=limits_of(self.settings),
            actor="test",
            run_id=run_id,
        )

    def accepted(self, seed: int) -> Version:
        return self.registry.accept(self.publish(seed).ref, actor="test", reason="good")

    def serve(self, *versions: Version) -> None:
        """A live server reports that it has loaded these."""
        replica = Replica(
            id="server", host="host", pid=1, url="http://x", started_at=0.0, heartbeat_at=now(), max_loras=4,
            max_cpu_loras=8, max_lora_rank=16, loaded=frozenset(v.lora_id for v in versions), failed={}, in_flight={},
            routing_revision=0, base_fingerprint=versions[0].base_fingerprint, engine="host:1",
        )  # fmt: skip
        ReplicaLedger(self.database).report(replica)

    def silence(self) -> None:
        """The server of `serve` is gone."""
        ReplicaLedger(self.database).remove("server")

    def age(self, seconds: float) -> None:
        """As if so much time had passed since the last heartbeats and leases."""
        with self.database.write() as connection:
            ledger, held = tables.replicas.c, tables.leases.c
            connection.execute(sa.update(tables.replicas).values(heartbeat_at=ledger.heartbeat_at - seconds))
            values = {"renewed_at": held.renewed_at - seconds, "expires_at": held.expires_at - seconds}
            connection.execute(sa.update(tables.leases).values(values))

    def start(self, version: Version, *, steps: tuple[float, ...] = (1.0,), every_s: float = 0.0) -> Rollout:
        return self.rollouts.start(version.ref, steps=steps, every_s=every_s, guard=False, actor="test")

    def tick(self) -> None:
        controller.tick(self.database, now, heartbeat_ttl_s=TTL_S)

    def champion(self, seed: int) -> Version:
        version = self.accepted(seed)
        self.serve(version)
        self.start(version)
        self.tick()
        self.tick()
        assert self.registry.aliases("chat")["champion"] == version.number
        return version

    def close(self) -> None:
        self.database.dispose()


@dataclass(frozen=True, slots=True)
class Operation:
    """`is_repeatable`: done once more after it was done, it changes nothing; otherwise it is refused as a conflict.

    `between` leads from the state before to a third legal one, for what is promised to be finished by a repetition.
    """

    prepare: Callable[[Place], None]
    run: Callable[[Path, Step], None]
    is_repeatable: bool = True
    between: Callable[[Place], object] | None = None


def make_home(home: Path, url: str | None = None) -> None:
    """A folder with a base and scion.toml; nothing else yet."""
    home.mkdir(parents=True)
    make_base(home / "base")
    point_to(home, url)


def point_to(home: Path, url: str | None) -> None:
    """Write scion.toml with this database."""
    sections = {"rollout": {"poll_interval_s": 0.02, "heartbeat_s": 1.0}}
    (home / "scion.toml").write_text(to_toml(sections | ({"database": {"url": url}} if url else {}), ["chat"]))


def _at(work: Callable[[Place], object]) -> Callable[[Path, Step], None]:
    def run(home: Path, _: Step) -> None:
        place = Place(home)
        work(place)
        place.close()

    return run


# --- states that operations begin in ----------------------------------------------------------------------------------


def _one_champion(place: Place) -> None:
    """chat:1 serves; chat:2's files lie ready to be published."""
    place.champion(1)
    make_adapter(place.home / "trained-2", place.home / "base", seed=2, scion={"seed": 2})


def _candidate(place: Place) -> None:
    _one_champion(place)
    place.publish(2)


def _evaluated(place: Place) -> None:
    _candidate(place)
    place.registry.request_evaluation(VersionRef("chat", 2))


def _accepted(place: Place) -> None:
    place.serve(place.champion(1), place.accepted(2))


def _started(place: Place) -> None:
    _accepted(place)
    place.start(place.registry.version(VersionRef("chat", 2)), steps=(0.5, 1.0), every_s=1e6)


def _stepped(place: Place) -> None:
    """The last step is over: the next look promotes."""
    _accepted(place)
    place.start(place.registry.version(VersionRef("chat", 2)))
    place.tick()


def _promoted(place: Place) -> None:
    _stepped(place)
    place.tick()


def _three(place: Place) -> None:
    """chat:3 serves, chat:2 is previous, chat:1 is neither."""
    first = place.champion(1)
    second = place.accepted(2)
    third = place.accepted(3)
    for version in (second, third):
        place.serve(first, second, third)
        place.start(version)
        place.tick()
        place.tick()


def _unused(place: Place) -> None:
    """Nothing points at chat:1, and no server holds it."""
    _three(place)
    place.silence()


def _retired(place: Place) -> None:
    _unused(place)
    retire(place.database, VersionRef("chat", 1), actor="test")


def _quarantined(place: Place) -> None:
    _promoted(place)
    quarantine(place.database, VersionRef("chat", 2), actor="test", reason="its files were gone")


def _littered(place: Place) -> None:
    """What `repair` finds: files that gc had given up, files without a version, a half-made copy, a dead server."""
    _retired(place)
    store = place.registry.store
    files = store.path(place.registry.version(VersionRef("chat", 1)).digest)
    shutil.copytree(files, place.home / "kept")
    _gc(place)
    (place.home / "kept").rename(files)
    store.add(make_adapter(place.home / "stray", place.home / "base", seed=9))
    shutil.copytree(place.home / "stray", store.root / "tmp" / "half")
    place.serve(place.registry.version(VersionRef("chat", 2)))


def _trained(place: Place) -> None:
    _one_champion(place)
    config = run_config(place.settings, "sft")
    RunStore(place.database).create("chat", config, parent=1, directory=Path("runs"), actor="test")


# --- operations -------------------------------------------------------------------------------------------------------


def _publish(place: Place) -> None:
    place.publish(2, run_id="run-1")


def _finish_run(place: Place) -> None:
    """The end of scion_trainer.execution.execute, as the same run does it again after a crash."""
    version = _publish_of_run(place)
    assert version.run_id is not None
    RunStore(place.database).succeed(version.run_id, candidate=version.number, metrics=version.metrics)


def _publish_of_run(place: Place) -> Version:
    return place.publish(2, run_id=RunStore(place.database).list()[0].id)


def _gc(place: Place) -> None:
    collect(place.registry, rollback_window_s=0.0, grace_s=0.0)


def _abort(place: Place) -> None:
    place.rollouts.abort("chat", actor="test")


def repair(place: Place, silent_s: float = 0.0) -> None:
    """`scion doctor --repair`, when no other process runs."""
    for finding in find_leftovers(place.registry, grace_s=0.0, silent_s=silent_s):
        finding.mend()


def _migrate(home: Path, _: Step) -> None:
    database = Database(f"sqlite:///{home / 'scion.db'}")
    database.upgrade()
    database.dispose()


def _nothing(_: Place) -> None:
    pass


OTHERS = {"migrate": Operation(_nothing, _migrate), "repair": Operation(_littered, _at(repair))}
OPERATIONS: dict[str, Operation] = {
    "publish": Operation(_one_champion, _at(_publish)),
    "finish run": Operation(_trained, _at(_finish_run), between=_publish_of_run),
    "request evaluation": Operation(
        _candidate, _at(lambda place: place.registry.request_evaluation(VersionRef("chat", 2)))
    ),
    "finish evaluation": Operation(
        _evaluated, _at(lambda place: place.registry.finish_evaluation(VersionRef("chat", 2)))
    ),
    "accept": Operation(
        _candidate, _at(lambda place: place.registry.accept(VersionRef("chat", 2), actor="test", reason="good"))
    ),
    "reject": Operation(
        _evaluated, _at(lambda place: place.registry.reject(VersionRef("chat", 2), actor="test", reason="bad"))
    ),
    "set alias": Operation(_accepted, _at(lambda place: place.registry.set_alias("chat", "pin", 2, actor="test"))),
    "start": Operation(
        _accepted, _at(lambda place: place.start(place.registry.version(VersionRef("chat", 2)))), is_repeatable=False
    ),
    "step": Operation(_started, _at(Place.tick)),
    "flip": Operation(_stepped, _at(Place.tick)),
    "promote": Operation(
        _started, _at(lambda place: place.rollouts.promote("chat", actor="test")), is_repeatable=False
    ),
    "abort": Operation(_started, _at(_abort), is_repeatable=False),
    "rollback": Operation(
        _promoted, _at(lambda place: place.rollouts.rollback("chat", actor="test")), is_repeatable=False
    ),
    "retire": Operation(_unused, _at(lambda place: retire(place.database, VersionRef("chat", 1), actor="test"))),
    "gc": Operation(_retired, _at(_gc)),
    "quarantine": Operation(
        _promoted,
        _at(lambda place: quarantine(place.database, VersionRef("chat", 2), actor="test", reason="gone")),
    ),
    "reinstate": Operation(
        _quarantined,
        _at(lambda place: reinstate(place.database, VersionRef("chat", 2), actor="test", reason="back")),
    ),
    "rollback to": Operation(
        _three, _at(lambda place: place.rollouts.rollback("chat", to=1, actor="test")), is_repeatable=False
    ),
}
