"""Keys without a server: what is stored, what is told once, and that every wrong one is compared like a right one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from scion_adapters import keys as keys_module
from scion_adapters import tables
from scion_adapters.cli.commands import register
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.events import list_events, routing_revision
from scion_adapters.keys import Scope, create_key, list_keys, load_key_ring, revoke_key
from tests.helpers.databases import sqlite_database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


def revision(database: Database) -> int:
    with database.read() as connection:
        return routing_revision(connection)


def test_only_id_and_hash_are_stored(database: Database, tmp_path: Path) -> None:
    key, plain = create_key(database, "shop", Scope.CHAT, actor="me", clock=lambda: 5.0)
    assert re.fullmatch(rf"sk-scion-{key.id}-[A-Za-z0-9_-]{{43}}", plain)  # 32 bytes
    with database.read() as connection:
        (row,) = connection.execute(sa.select(tables.api_keys)).mappings()
    assert row["hash"] == hashlib.sha256(plain.encode()).hexdigest()
    secret = plain.removeprefix(f"sk-scion-{key.id}-").encode()
    database.dispose()
    assert not any(secret in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_each_change_is_an_event_and_reaches_the_servers(database: Database) -> None:
    before = revision(database)
    key, _ = create_key(database, "shop", Scope.CHAT, actor="me", clock=lambda: 5.0)
    assert revision(database) == before + 1
    gone = revoke_key(database, key.id, actor="you", reason="left", clock=lambda: 6.0)
    assert revision(database) == before + 2
    assert revoke_key(database, key.id, actor="you", clock=lambda: 7.0) == gone, "revoked at the first time"
    assert revision(database) == before + 2
    created, revoked = list_events(database)
    assert (created.kind, created.actor, created.at) == ("key.created", "me", 5.0)
    assert created.data == {"id": key.id, "name": "shop", "scope": "chat"}
    assert (revoked.kind, revoked.actor, revoked.reason) == ("key.revoked", "you", "left")
    assert list_keys(database) == [gone]


@pytest.mark.parametrize("name", ["", "  ", "x" * 129])
def test_a_key_has_an_owner(database: Database, name: str) -> None:
    with pytest.raises(InvalidInputError, match="whose it is"):
        create_key(database, name, Scope.CHAT, actor="me")
    assert list_keys(database) == []


def test_the_ring_knows_right_keys_and_stays_closed_when_all_are_revoked(database: Database) -> None:
    assert load_key_ring(database).is_open
    key, plain = create_key(database, "shop", Scope.OPS, actor="me")
    ring = load_key_ring(database)
    assert ring.check(plain) == key
    assert (ring.is_open, ring.num_valid) == (False, 1)
    revoke_key(database, key.id, actor="me")
    ring = load_key_ring(database)
    assert ring.check(plain) is None
    assert (ring.is_open, ring.num_valid) == (False, 0)


def test_every_check_compares_whole_hashes_in_constant_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = create_key(database, "shop", Scope.CHAT, actor="me")
    ring = load_key_ring(database)
    compared: list[tuple[int, int]] = []
    compare = keys_module.hmac.compare_digest

    def seen(first: str, second: str) -> bool:
        compared.append((len(first), len(second)))
        return compare(first, second)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", seen)
    presented = [
        plain,
        plain[:-1] + ("a" if plain[-1] != "a" else "b"),  # the right id
        f"sk-scion-{'0' * 12}-{'x' * 43}",  # an id that nobody has
        "not a key at all",
        "",
    ]
    for text in presented:
        ring.check(text)
    assert compared == [(64, 64)] * len(presented)


class TestCommands:
    @pytest.fixture(autouse=True)
    def _home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
        (tmp_path / "scion.toml").write_text(f'[database]\nurl = "{database.url}"\n')
        monkeypatch.setenv("SCION_ACTOR", "tester")
        monkeypatch.setenv("SCION_CONFIG", str(tmp_path / "scion.toml"))
        self.app = typer.Typer()
        register(self.app)

    def run(self, *arguments: str) -> str:
        return CliRunner().invoke(self.app, ["keys", *arguments], catch_exceptions=False).output

    def test_the_key_is_shown_once_whole_on_its_own_line(self, database: Database) -> None:
        plain, told = self.run("create", "shop", "--scope", "ops").splitlines()
        key = load_key_ring(database).check(plain)
        assert key is not None
        assert (key.name, key.scope, key.created_by) == ("shop", Scope.OPS, "tester")
        assert "not shown again" in told
        assert f"scion keys revoke {key.id}" in told
        for shown in (self.run("list"), self.run("list", "--json")):
            assert key.id in shown
            assert plain.removeprefix(f"sk-scion-{key.id}-") not in shown

    def test_scripts_get_json(self, database: Database) -> None:
        made = json.loads(self.run("create", "shop", "--json"))
        assert load_key_ring(database).check(made["key"]) is not None
        assert made["scope"] == "chat", "the smaller one unless asked for"
        assert json.loads(self.run("revoke", made["id"], "--reason", "left", "--json"))["revoked_at"] > 0
        (listed,) = json.loads(self.run("list", "--json"))
        assert (listed["id"], listed["name"], listed["scope"], listed["created_by"]) == (
            made["id"],
            "shop",
            "chat",
            "tester",
        )
        assert load_key_ring(database).check(made["key"]) is None

    def test_what_does_not_exist_cannot_be_revoked(self) -> None:
        with pytest.raises(NotFoundError, match="scion keys list"):
            self.run("revoke", "nobody")

    def test_there_are_two_scopes(self) -> None:
        result = CliRunner().invoke(self.app, ["keys", "create", "shop", "--scope", "admin"])
        assert result.exit_code == 2
