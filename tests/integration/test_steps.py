"""Adapters of a run's steps: loaded without ever being routed, gone afterwards, also when the run died."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError, RejectedError, UnavailableError
from scion_adapters.fingerprint import read_base
from scion_adapters.gc import collect
from scion_adapters.leases import release
from scion_adapters.records import Replica
from scion_adapters.registry import Registry
from scion_adapters.repair import find_leftovers
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import assign, load_routing
from scion_adapters.slots import check_slots
from scion_adapters.steps import StepLine, abandoned
from tests.helpers.adapters import LIMITS, Tensors, make_adapter, make_base
from tests.helpers.registry_world import RegistryWorld

REPLICA = Replica("server-1", "host", 1, "http://x", 0.0, 0.0, 4, 4, 16, frozenset(), {}, {}, 1, "sha256:base")


@pytest.fixture
def world(database: Database, tmp_path: Path) -> RegistryWorld:
    registry = Registry(database, ArtifactStore(tmp_path / "store"))
    registry.ensure_adapter("chat")
    return RegistryWorld(registry, read_base(make_base(tmp_path / "base")), tmp_path)


def line_of(world: RegistryWorld) -> StepLine:
    return StepLine(world.registry, base=world.base, limits=LIMITS, actor="run-1")


def holds(world: RegistryWorld, *lora_ids: int) -> None:
    """The one server reports that it holds these."""
    ReplicaLedger(world.registry.database).report(replace(REPLICA, loaded=frozenset(lora_ids)))


def count(world: RegistryWorld, table: sa.Table, line: str) -> int:
    with world.registry.database.read() as connection:
        query = sa.select(sa.func.count()).select_from(table).where(table.c.adapter == line)
        return int(connection.execute(query).scalar_one())


def test_a_step_is_loaded_and_asked_with_its_key_only(world: RegistryWorld) -> None:
    with line_of(world) as line:
        step = line.add(world.adapter_directory())
        routing = load_routing(world.registry.database)
        assert routing.wanted == {step.lora_id}
        found = assign(routing, str(step.ref), "", {step.lora_id}, step.evaluation_key)
        assert found is not None
        assert found.lora_id == step.lora_id
        for name, key in ((str(step.ref), "guessed"), (str(step.ref), None), (line.name, step.evaluation_key)):
            with pytest.raises(NotFoundError):
                assign(routing, name, "", {step.lora_id}, key)


def test_names_and_ids_are_fresh_at_every_step_and_every_run(world: RegistryWorld) -> None:
    names, ids = set(), set()
    directory = world.adapter_directory()
    for _ in range(2):
        with line_of(world) as line:
            for _ in range(3):  # the same bytes each time
                step = line.add(directory)
                names.add(str(step.ref))
                ids.add(step.lora_id)
                line.drop(step)
    assert (len(names), len(ids)) == (6, 6)


def test_a_dropped_step_keeps_its_files_until_no_server_holds_it(world: RegistryWorld) -> None:
    store = world.registry.store
    with line_of(world) as line:
        first, second = line.add(world.adapter_directory()), line.add(world.adapter_directory())
        holds(world, first.lora_id, second.lora_id)
        line.drop(first)
        assert load_routing(world.registry.database).wanted == {second.lora_id}
        assert store.has(first.digest)
        holds(world, second.lora_id)
        third = line.add(world.adapter_directory())
        line.drop(second)
        assert not store.has(first.digest)
        assert store.has(second.digest)
        holds(world)
    assert not store.has(second.digest)
    assert not store.has(third.digest)


def test_nothing_is_left_of_a_run_that_ended_but_two_events(world: RegistryWorld) -> None:
    before = len(world.kinds())
    with line_of(world) as line:
        for _ in range(3):
            line.drop(line.add(world.adapter_directory()))
        line.add(world.adapter_directory())
    assert line.name not in world.registry.adapters()
    assert [count(world, table, line.name) for table in (tables.versions, tables.aliases, tables.alias_history)] == [
        0
    ] * 3
    assert world.registry.store.stored() == set()
    assert world.kinds()[before:] == ["steps.began", "steps.ended"]


def test_files_that_a_version_shares_are_kept(world: RegistryWorld) -> None:
    directory = world.adapter_directory()
    version = world.registry.publish("chat", directory, parent=0, base=world.base, limits=LIMITS, actor="test")
    with line_of(world) as line:
        assert line.add(directory).digest == version.digest
    world.registry.store.verify(version.digest)


def test_an_unsound_adapter_is_not_loaded(world: RegistryWorld, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        next(iter(tensors.values()))[0, 0] = np.nan

    with line_of(world) as line:
        with pytest.raises(RejectedError, match="NaN"):
            line.add(make_adapter(tmp_path / "nan", world.base, edit=spoil))
        assert load_routing(world.registry.database).wanted == frozenset()


def test_a_step_can_never_be_accepted_nor_its_line_published_to(world: RegistryWorld) -> None:
    with line_of(world) as line:
        step = line.add(world.adapter_directory())
        with pytest.raises(ConflictError, match="step of a run"):
            world.registry.accept(step.ref, actor="me", reason="why not")
        with pytest.raises(RejectedError, match="steps-"):
            world.publish(line.name)


def test_the_slot_of_a_candidate_stays_reserved_while_a_run_samples(world: RegistryWorld) -> None:
    challenger = world.accepted()
    with line_of(world) as line:
        line.add(world.adapter_directory())
        routing = load_routing(world.registry.database)
        check_slots(routing, challenger.ref, challenger.lora_id, [replace(REPLICA, max_cpu_loras=4)])
        with pytest.raises(ConflictError, match="keep 2 free"):
            check_slots(routing, challenger.ref, challenger.lora_id, [replace(REPLICA, max_cpu_loras=3)])


def died(world: RegistryWorld) -> StepLine:
    """A run that was killed while it sampled: its lease ran out, and everything else is still there."""
    line = line_of(world).__enter__()
    line.add(world.adapter_directory())
    line._lease.__exit__(None, None, None)
    release(world.registry.database, f"steps:{line.name}", "run-1")
    return line


def test_gc_takes_back_what_a_run_that_died_left(world: RegistryWorld) -> None:
    line = died(world)
    assert abandoned(world.registry) == [line.name]
    collect(world.registry, rollback_window_s=0.0, dry_run=True)
    assert abandoned(world.registry) == [line.name]
    collect(world.registry, rollback_window_s=0.0)
    assert line.name not in world.registry.adapters()
    assert world.registry.store.stored() == set()


def test_doctor_finds_and_mends_it_too(world: RegistryWorld) -> None:
    line = died(world)
    (finding,) = [finding for finding in find_leftovers(world.registry) if line.name in finding.what]
    finding.mend()
    assert find_leftovers(world.registry) == []
    assert line.name not in world.registry.adapters()


def test_the_next_run_takes_it_back_and_leaves_a_living_run_alone(world: RegistryWorld) -> None:
    dead = died(world)
    with line_of(world) as alive:
        step = alive.add(world.adapter_directory())
        with line_of(world) as other:
            assert set(world.registry.adapters()) == {"chat", alive.name, other.name}
        assert load_routing(world.registry.database).wanted == {step.lora_id}
    assert dead.name not in world.registry.adapters()


def test_what_a_server_still_holds_when_the_run_ends_is_left_to_gc(world: RegistryWorld) -> None:
    line = line_of(world).__enter__()
    step = line.add(world.adapter_directory())
    holds(world, step.lora_id)
    times = iter(range(100))
    assert not line.close(3.0, monotonic=lambda: float(next(times)), sleep=lambda _: None)
    assert load_routing(world.registry.database).wanted == frozenset()  # it is told to let go
    assert world.registry.store.has(step.digest)
    holds(world)
    collect(world.registry, rollback_window_s=0.0)
    assert line.name not in world.registry.adapters()


def test_a_run_that_stood_still_for_too_long_loads_nothing_more(world: RegistryWorld) -> None:
    line = line_of(world).__enter__()
    line._lease.lost.set()
    with pytest.raises(UnavailableError, match="lease"):
        line.add(world.adapter_directory())
    line.close()
