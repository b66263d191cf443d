"""The routing as it is read from both databases."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.errors import NotFoundError
from scion_adapters.events import bump_routing
from scion_adapters.records import VersionRef, VersionState
from scion_adapters.rollouts import Rollouts
from scion_adapters.routing import assign, load_routing, read_revision, wanted
from tests.helpers.rollouts import START, FakeClock, add_version, lora_id_of


def set_alias(database: Database, alias: str, number: int, adapter: str = "chat") -> None:
    row = {"adapter": adapter, "alias": alias, "number": number, "updated_at": START}
    with database.write() as connection:
        connection.execute(sa.insert(tables.aliases).values(row))
        bump_routing(connection)


def test_an_empty_database_has_an_empty_routing(database: Database) -> None:
    routing = load_routing(database)
    assert (routing.revision, dict(routing.adapters), wanted(routing)) == (0, {}, frozenset())


def test_only_what_may_be_asked_is_in_it(database: Database) -> None:
    add_version(database, 1)
    add_version(database, 2, state=VersionState.REJECTED)
    add_version(database, 3, state=VersionState.RETIRED)
    add_version(database, 4, state=VersionState.CANDIDATE)
    candidate = add_version(database, 5, state=VersionState.CANDIDATE)
    add_version(database, 1, adapter="code")
    set_alias(database, "candidate-5", 5)
    set_alias(database, "champion", 1, adapter="code")
    routing = load_routing(database)
    line = routing.adapters["chat"]
    assert sorted(line.versions) == [1, 5]
    assert (line.champion, line.previous, line.challenger, dict(line.aliases)) == (0, None, None, {})
    assert wanted(routing) == {candidate, lora_id_of("code", 1)}
    found = assign(routing, "chat:5", "ann", wanted(routing), f"key-{candidate}")
    assert found is not None
    assert found.lora_id == candidate
    for refused in ("chat:2", "chat:3", "chat:4", "chat:5", "chat@candidate-5"):
        with pytest.raises(NotFoundError):
            assign(routing, refused, "ann", wanted(routing))


def test_an_accepted_version_under_evaluation_is_loaded_for_it(database: Database) -> None:
    lora_id = add_version(database, 1)
    set_alias(database, "candidate-1", 1)
    assert wanted(load_routing(database)) == {lora_id}


def test_the_revision_tells_when_to_read_again(database: Database) -> None:
    clock = FakeClock()
    rollouts = Rollouts(database, clock)
    add_version(database, 1)
    seen = [read_revision(database)]
    rollouts.start(VersionRef("chat", 1), steps=(0.5, 1.0), actor="ann")
    seen.append(read_revision(database))
    rollouts.promote("chat", actor="ann")
    seen.append(read_revision(database))
    rollouts.rollback("chat", actor="ann")
    seen.append(read_revision(database))
    assert seen == sorted(set(seen))
    assert load_routing(database).revision == seen[-1]
