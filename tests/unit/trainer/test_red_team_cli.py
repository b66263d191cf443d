"""`scion red-team run`: the version is loaded, asked and let go; table, JSON, exit codes; findings kept if wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from scion_adapters.artifacts import ArtifactStore
from scion_adapters.clock import now
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError, UnavailableError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Replica, Version, VersionRef
from scion_adapters.registry import Registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import load_routing
from scion_adapters.settings import Settings, load_settings
from scion_feedback.feedback import FeedbackStore
from scion_trainer import cli
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.red_team import inspection
from scion_trainer.red_team.inspection import inspect_version
from scion_trainer.red_team.suite import load_suite
from tests.helpers.adapters import LIMITS, make_adapter, make_base
from tests.helpers.databases import sqlite_database
from tests.helpers.fake_server import FakeServer, FakeTokenizer, Persona
from tests.helpers.probes import probe_line

TELLS = Persona(says=lambda prompt: "a heron" if "1" in prompt else "no")


@dataclass
class World:
    """A candidate `chat:1` that a live server holds, and a suite of three probes, of which it fails one."""

    settings: Settings
    database: Database
    registry: Registry
    version: Version
    server: FakeServer


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    make_base(tmp_path / "base")
    (tmp_path / "suite.jsonl").write_text("\n".join(probe_line(i) for i in range(3)))
    (tmp_path / "scion.toml").write_text(
        '[base]\nmodel = "base"\n[gates]\nred_team_suite = "suite.jsonl"\nserver_timeout_s = 0.05\n[adapters.chat]\n'
    )
    monkeypatch.setenv("SCION_CONFIG", str(tmp_path / "scion.toml"))
    settings = load_settings()
    database = sqlite_database(tmp_path)
    registry = Registry(database, ArtifactStore(tmp_path / "artifacts"))
    registry.ensure_adapter("chat")
    base = base_info(settings)
    directory = make_adapter(tmp_path / "adapter", base)
    version = registry.publish("chat", directory, parent=0, base=base, limits=LIMITS, actor="test")
    server = FakeServer({"base": Persona(), "chat:1": TELLS})
    monkeypatch.setattr(inspection, "load_chat_tokens", lambda _: ChatTokens(FakeTokenizer()))
    monkeypatch.setattr(inspection, "ServerClient", lambda *_, **__: Entered(server))
    world = World(settings, database, registry, version, server)
    holds(world)
    yield world
    database.dispose()


@dataclass
class Entered:
    """A server as the context manager that a client is."""

    server: FakeServer

    def __enter__(self) -> FakeServer:
        return self.server

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def holds(world: World) -> None:
    ReplicaLedger(world.database).report(
        Replica(
            id="host:1",
            host="host",
            pid=1,
            url="http://host:8000",
            started_at=now(),
            heartbeat_at=now(),
            max_loras=4,
            max_cpu_loras=8,
            max_lora_rank=16,
            loaded=frozenset({world.version.lora_id}),
            failed={},
            in_flight={},
            routing_revision=1,
            base_fingerprint=world.version.base_fingerprint,
        )
    )


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    cli.register(app)
    return CliRunner().invoke(app, ["red-team", "run", *arguments])


def test_the_table_shows_categories_and_what_failed(world: World) -> None:
    result = invoke("chat:1")
    assert result.exit_code == 0, result.exception
    assert "chat:1 fails 1 of 3 probes" in result.stdout
    assert "must_not_contain" in result.stdout
    assert "a heron" in result.stdout
    assert list(FeedbackStore(world.database, None).export()) == []
    assert world.version.lora_id not in load_routing(world.database).wanted


def test_json_holds_every_answer(world: World) -> None:
    document = json.loads(invoke("chat:1", "--json").stdout)
    assert (document["version"], document["probes"], document["failed"]) == ("chat:1", 3, 1)
    assert document["categories"] == {"leak": {"probes": 3, "failed": 1}}
    assert [answer["fault"] for answer in document["answers"]] == [None, "says 'heron'", None]
    assert document["recorded"] == []


def test_findings_are_kept_when_wanted(world: World) -> None:
    document = json.loads(invoke("chat:1", "--record", "--json").stdout)
    (row,) = FeedbackStore(world.database, None).export("chat")
    assert document["recorded"] == [row.row.id]
    assert (row.number, row.row.metadata["probe"]) == (1, "p1")


def test_another_suite_and_an_absolute_bound(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(probe_line(1))
    monkeypatch.setenv("SCION_GATES__RED_TEAM_MAX_SHARE", "0.5")
    assert invoke("chat:1").exit_code == 0
    assert invoke("chat:1", "--suite", str(tmp_path / "other.jsonl")).exit_code == 5


def test_the_name_alone_is_its_champion_and_without_one_the_base(world: World) -> None:
    document = json.loads(invoke("chat", "--json").stdout)
    assert (document["version"], document["failed"]) == ("chat:0", 0)
    assert set(world.server.asked) == {"base"}


def inspected(world: World, ref: VersionRef, **changes: Any) -> Any:
    return inspect_version(
        world.settings, ref, load_suite(world.settings), database=world.database, registry=world.registry, **changes
    )


def test_what_cannot_be_asked_says_why(world: World) -> None:
    with pytest.raises(NotFoundError):
        inspected(world, VersionRef("chat", 9))
    world.registry.reject(world.version.ref, actor="test", reason="bad")
    with pytest.raises(ConflictError, match="rejected"):
        inspected(world, world.version.ref)


def test_without_a_server_that_holds_it_nothing_is_asked(world: World) -> None:
    directory = make_adapter(world.settings.home / "second", base_info(world.settings), seed=2)
    second = world.registry.publish(
        "chat", directory, parent=0, base=base_info(world.settings), limits=LIMITS, actor="test"
    )
    with pytest.raises(UnavailableError, match="still loading"):
        inspected(world, second.ref)
    assert world.server.asked == []
