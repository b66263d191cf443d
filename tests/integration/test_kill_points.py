"""kill -9 at every side effect of every operation that changes what users get: the state is the old or the new one.

The operations stand in tests/helpers/killed_operations.py, the killing in deathrow.py and kill_points.py, and what must
hold at any moment in legal_state.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError
from scion_adapters.records import VersionState
from scion_adapters.repair import find_leftovers
from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s
from scion_adapters.routing import load_routing
from tests.helpers.deathrow import DeathRow
from tests.helpers.killed_operations import OPERATIONS, OTHERS, TTL_S, Operation, Place, make_home, point_to, repair
from tests.helpers.killed_server import SERVERS, engine_log
from tests.helpers.legal_state import Picture, check_legal, is_complete, picture, residue
from tests.helpers.old_database import FIRST_REVISION, check_rows, make_old
from tests.helpers.postgres import Cluster


@pytest.fixture(scope="module")
def death_row() -> Iterator[DeathRow]:
    with DeathRow() as row:
        yield row


def copies(prepared: Path) -> Iterator[Path]:
    """Fresh copies of a folder; each is deleted when the next is asked for."""
    for number in count():
        home = prepared.with_name(f"copy-{number}")
        shutil.copytree(prepared, home)
        yield home
        shutil.rmtree(home)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_killed_anywhere_it_has_happened_or_not(death_row: DeathRow, tmp_path: Path, name: str) -> None:
    prepared = tmp_path / "prepared"
    make_home(prepared)
    before = _picture_after(prepared, OPERATIONS[name].prepare)
    _kill_everywhere(death_row, name, before, copies(prepared))


@pytest.mark.parametrize("name", ["publish", "flip"])
def test_the_same_on_postgresql(death_row: DeathRow, tmp_path: Path, postgres: Cluster, name: str) -> None:
    template = f"killed_{name}"
    prepared = tmp_path / "prepared"
    make_home(prepared, postgres.create(template))
    before = _picture_after(prepared, OPERATIONS[name].prepare)

    def homes() -> Iterator[Path]:
        for number, home in enumerate(copies(prepared)):
            point_to(home, postgres.create(f"{template}_{number}", template=template))
            yield home
            postgres.drop(f"{template}_{number}")

    _kill_everywhere(death_row, name, before, homes())


def _kill_everywhere(death_row: DeathRow, name: str, before: Picture, homes: Iterator[Path]) -> None:
    operation = OPERATIONS[name]
    home = next(homes)
    assert not death_row.run(name, home).killed
    after = _picture_after(home, _assert_tidy)
    assert after != before
    legal = {"before": before, "after": after}
    if operation.between is not None:
        legal["between"] = _picture_after(next(homes), operation.between)

    seen = set()
    for home, outcome in death_row.deaths(name, homes):
        place = Place(home)
        try:
            seen.add(_check(place, operation, legal))
        except Exception as error:
            error.add_note(f"{name}: {outcome}")
            raise
        finally:
            place.close()
    assert seen == set(legal), "not every legal state was reached: are there fewer kills than steps?"


def _check_repair(place: Place, silent_s: float = 0.0) -> None:
    """`scion doctor --repair` removes all that a kill left, and nothing else."""
    repair(place, silent_s)
    assert find_leftovers(place.registry, grace_s=0.0, silent_s=silent_s) == []
    _assert_tidy(place)
    check_legal(place.database, place.registry.store)


def _assert_tidy(place: Place) -> None:
    assert residue(place.database, place.registry.store) == []


def _picture_after(home: Path, work: Callable[[Place], object]) -> Picture:
    place = Place(home)
    work(place)
    check_legal(place.database, place.registry.store)
    found = picture(place.database)
    place.close()
    return found


def _check(place: Place, operation: Operation, legal: dict[str, Picture]) -> str:
    """The name of the state that a kill left; AssertionError when it is no legal one, or does not heal."""
    store = place.registry.store
    check_legal(place.database, store)
    assert all(path.parent.name == "tmp" or is_complete(path) for path in residue(place.database, store))
    found = picture(place.database)
    names = [name for name, state in legal.items() if state == found]
    assert len(names) == 1, "a state between"
    if not any(version["state"] == VersionState.QUARANTINED for version in found["versions"]):
        _check_repair(place, TTL_S)
        assert picture(place.database) == found, "the doctor changed more than leftovers"
    if names == ["after"] and not operation.is_repeatable:
        with pytest.raises(ConflictError):
            operation.run(place.home, lambda _: None)
    else:
        operation.run(place.home, lambda _: None)
    assert picture(place.database) == legal["after"]
    check_legal(place.database, store)
    return names[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SERVERS))
def test_a_server_killed_anywhere_leaves_nothing_that_the_next_one_does_not_finish(
    death_row: DeathRow, tmp_path: Path, name: str
) -> None:
    prepared = tmp_path / "prepared"
    make_home(prepared)
    _picture_after(prepared, SERVERS[name].prepare)
    num_kills = 0
    for home, outcome in death_row.deaths(name, copies(prepared)):
        num_kills += outcome.killed
        place = Place(home)
        try:
            check_legal(place.database, place.registry.store)
            told = engine_log(home).read_text().split("\n") if engine_log(home).exists() else []
            line = load_routing(place.database).adapters["chat"]
            if name == "load" and (line.weight > 0 or line.champion == 2):
                assert "add chat:2" in told, "users are sent to what no engine has loaded"
            ttl_s = heartbeat_ttl_s(place.settings)
            place.age(ttl_s)
            assert ReplicaLedger(place.database).live(ttl_s) == [], "it counts for ever"
            SERVERS[name].run(home, lambda _: None)
            check_legal(place.database, place.registry.store)
            _check_repair(place)
            assert os.getpid() not in [replica.pid for replica in ReplicaLedger(place.database).live(ttl_s)]
        except Exception as error:
            error.add_note(f"{name}: {outcome}; the engine was told {told}")
            raise
        finally:
            place.close()
    assert num_kills >= 10


@pytest.mark.parametrize("is_old", [False, True])
def test_a_migration_killed_anywhere_is_done_or_undone(death_row: DeathRow, tmp_path: Path, is_old: bool) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    if is_old:
        database = Database(f"sqlite:///{prepared / 'scion.db'}")
        make_old(database)
        database.dispose()
    seen = set()
    for home, outcome in death_row.deaths("migrate", copies(prepared)):
        database = Database(f"sqlite:///{home / 'scion.db'}")
        revision = database.current_revision()
        with database.read() as connection:
            names = set(sa.inspect(connection).get_table_names()) - {"alembic_version"}
            if revision is None:
                assert names == set(), f"{outcome}: tables of a schema that is not there"
            elif revision == database.head_revision():
                differences = compare_metadata(MigrationContext.configure(connection), tables.metadata)
                assert differences == [], str(outcome)
        database.upgrade()
        if is_old:
            check_rows(database)
        assert database.current_revision() == database.head_revision()
        database.dispose()
        seen.add(revision)
    assert seen == ({FIRST_REVISION} if is_old else {None}) | {database.head_revision()}


def test_a_repair_killed_anywhere_can_be_done_again(death_row: DeathRow, tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    make_home(prepared)
    before = _picture_after(prepared, OTHERS["repair"].prepare)
    num_kills = 0
    for home, outcome in death_row.deaths("repair", copies(prepared)):
        num_kills += outcome.killed
        place = Place(home)
        check_legal(place.database, place.registry.store)
        left = find_leftovers(place.registry, grace_s=0.0, silent_s=0.0)
        assert bool(left) == outcome.killed, str(outcome)
        _check_repair(place)
        assert picture(place.database) == before
        place.close()
    assert num_kills >= 10
