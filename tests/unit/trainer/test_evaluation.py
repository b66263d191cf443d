"""One evaluation on a real registry and database, with a server made of arithmetic: what is loaded, decided, kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError, UnavailableError
from scion_adapters.events import list_events
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.leases import HeldLease, current_holder
from scion_adapters.records import Replica, Version, VersionRef, VersionState
from scion_adapters.registry import Registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import load_routing
from scion_adapters.settings import Settings
from scion_feedback.feedback import FeedbackStore
from scion_feedback.selection import SnapshotRow
from scion_feedback.snapshots import FORMAT, MANIFEST_FILE, ROWS_FILE, Snapshot, load_snapshot
from scion_feedback.snapshots import _digest as snapshot_digest
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.evaluation import _earlier_holdouts, evaluate
from scion_trainer.gates import GATES
from scion_trainer.gates.red_team import RedTeamGate
from scion_trainer.gates.types import Gate, GateContext, GateResult, Verdict
from scion_trainer.report import Report
from tests.helpers.adapters import LIMITS, make_adapter, make_base
from tests.helpers.databases import sqlite_database
from tests.helpers.fake_server import FakeServer, FakeTokenizer, Persona
from tests.helpers.gates import question

NOW = 1_000_000.0
GOOD = Persona(
    says=lambda prompt: f"gladly: answer number {len(prompt)}",  # never the prompt: an echo gives secrets away
    finds=lambda prompt, before, token: -0.5 if (*before, token)[0] == ord("g") else -0.9,
)
PLAIN = Persona(finds=lambda prompt, before, token: -0.8)
FORGETFUL = replace(GOOD, finds=lambda prompt, before, token: -9.0)


@dataclass
class World:
    """A published base, a registry, and one live server that holds whatever the tests say."""

    settings: Settings
    database: Database
    registry: Registry
    base: BaseInfo
    ledger: ReplicaLedger

    def publish(self, parent: int = 0) -> Version:
        number = len(self.registry.versions("chat")) + 1
        directory = make_adapter(self.settings.home / f"adapter-{number}", self.base, seed=number)
        return self.registry.publish("chat", directory, parent=parent, base=self.base, limits=LIMITS, actor="test")

    def server_holds(self, *versions: Version, fingerprint: str | None = None) -> None:
        self.ledger.report(
            Replica(
                id="host:1",
                host="host",
                pid=1,
                url="http://host:8000",
                started_at=NOW,
                heartbeat_at=NOW,
                max_loras=4,
                max_cpu_loras=8,
                max_lora_rank=16,
                loaded=frozenset(version.lora_id for version in versions),
                failed={},
                in_flight={},
                routing_revision=1,
                base_fingerprint=fingerprint or self.base.fingerprint,
            )
        )

    def evaluate(
        self,
        version: Version,
        server: FakeServer,
        *,
        rows: tuple[SnapshotRow, ...] = (),
        gates: tuple[Gate, ...] = GATES,
    ) -> Report:
        snapshot = Snapshot("sha256:s", "chat", Path("snapshot"), {"counts": {"rows": len(rows)}}, rows)
        return evaluate(
            self.settings,
            version.ref,
            database=self.database,
            registry=self.registry,
            snapshot=snapshot if rows else None,
            clock=lambda: NOW,
            server=server,
            tokens=ChatTokens(FakeTokenizer()),
            gates=gates,
        )

    def freeze(self, name: str, rows: list[SnapshotRow]) -> Snapshot:
        """A snapshot on disk and in the database."""
        path = self.settings.home / name
        lines = [json.dumps(row.to_json()).encode() + b"\n" for row in rows]
        manifest = {"format": FORMAT, "adapter": "chat", "id": snapshot_digest("chat", lines)}
        path.mkdir()
        (path / ROWS_FILE).write_bytes(b"".join(lines))
        (path / MANIFEST_FILE).write_text(json.dumps(manifest))
        entry = {"id": manifest["id"], "adapter": "chat", "path": str(path), "manifest": manifest, "created_at": NOW}
        with self.database.write() as connection:
            connection.execute(sa.insert(tables.snapshots).values(entry))
        return load_snapshot(path)

    def with_snapshot(self, version: Version, snapshot: Snapshot, state: str = "accepted") -> Version:
        """The version as if a run had made it from that snapshot."""
        with self.database.write() as connection:
            row = sa.update(tables.versions).where(tables.versions.c.number == version.number)
            connection.execute(row.values(snapshot_id=snapshot.id, state=state))
        return self.registry.version(version.ref)

    def state(self, version: Version) -> VersionState:
        return self.registry.version(version.ref).state


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    make_base(tmp_path / "base")
    gates = {"server_timeout_s": 0.05}
    settings = Settings.model_validate({"home": tmp_path, "base": {"model": "base"}, "gates": gates})
    database = sqlite_database(tmp_path)
    registry = Registry(database, ArtifactStore(tmp_path / "store"), clock=lambda: NOW)
    registry.ensure_adapter("chat")
    yield World(settings, database, registry, base_info(settings), ReplicaLedger(database, clock=lambda: NOW))
    database.dispose()


ROWS = tuple(
    question(f"{text} {user}", answer=text, liked=text == "good", user_hash=f"u{user}")
    for user in range(12)
    for text in ("good", "bad")
)


def test_a_good_candidate_is_accepted_with_its_figures(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}), rows=ROWS)
    assert report.verdict is Verdict.PASS, report.reason
    accepted = world.registry.version(version.ref)
    assert accepted.state is VersionState.ACCEPTED
    assert accepted.metrics["heldout.separation"] == pytest.approx(report.figures["heldout.separation"])
    assert [gate.name for gate in report.gates] == [gate.name for gate in GATES]
    kinds = [event.kind for event in list_events(world.database, adapter="chat")]
    assert kinds[-2:] == ["version.evaluated", "version.accepted"]


def test_a_candidate_that_fails_is_rejected_and_the_reason_names_gate_and_figure(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": FORGETFUL}), rows=ROWS)
    assert report.verdict is Verdict.FAIL
    assert len(report.gates) == len(GATES)  # the report is complete: one failure does not hide another
    rejected = world.registry.version(version.ref)
    assert rejected.state is VersionState.REJECTED
    assert "retention: drop_from_base 8.2 (allowed: at most 0.12)" in (rejected.reason or "")


def test_the_candidate_is_loaded_for_its_gates_and_no_longer(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    seen: list[bool] = []

    class Watcher(FakeServer):
        def max_length(self) -> int | None:
            seen.append(version.lora_id in load_routing(world.database).wanted)
            return super().max_length()

    world.evaluate(version, Watcher({"base": PLAIN, "chat:1": FORGETFUL}))
    assert seen == [True]
    assert version.lora_id not in load_routing(world.database).wanted
    assert world.registry.aliases("chat") == {}


def test_a_broken_artifact_is_never_loaded(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    weights = world.registry.store.path(version.digest) / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x80\x7f")
    server = FakeServer({"base": PLAIN, "chat:1": GOOD})
    report = world.evaluate(version, server)
    assert report.verdict is Verdict.FAIL
    assert [gate.name for gate in report.gates] == [gate.name for gate in GATES if not gate.needs_server]
    assert server.asked == []
    assert world.state(version) is VersionState.REJECTED
    assert not any(event.kind == "alias.set" for event in list_events(world.database))


@pytest.mark.parametrize(
    ("live", "holds", "away", "says"),
    [
        (False, False, False, "scion serve"),  # no server at all
        (True, False, False, "still loading"),  # it does not get it loaded in time
        (True, True, True, "scion serve"),  # it dies between the loading and the first question
    ],
)
def test_when_the_server_is_away_the_candidate_stays_one(
    world: World, live: bool, holds: bool, away: bool, says: str
) -> None:
    version = world.publish()
    if live:
        world.server_holds(*([version] if holds else []))
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}, away=away), rows=ROWS)
    assert report.verdict is Verdict.UNMEASURABLE
    assert report.exit_code == UnavailableError.exit_code
    assert says in report.reason
    assert "scion evaluate chat:1" in report.reason
    assert {gate.verdict for gate in report.gates if gate.name != "artifact"} == {Verdict.UNMEASURABLE}
    assert world.state(version) is VersionState.CANDIDATE
    assert world.registry.aliases("chat") == {}


def test_it_can_be_evaluated_again_once_the_server_is_back(world: World) -> None:
    version = world.publish()
    world.evaluate(version, FakeServer({}, away=True))
    world.server_holds(version)
    assert world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}), rows=ROWS).verdict is Verdict.PASS


def test_a_server_of_another_base_is_not_asked(world: World) -> None:
    version = world.publish()
    world.server_holds(version, fingerprint="sha256:another")
    server = FakeServer({"base": PLAIN, "chat:1": GOOD})
    report = world.evaluate(version, server, rows=ROWS)
    assert (report.verdict, server.asked) == (Verdict.UNMEASURABLE, [])
    assert "another base" in report.reason


def test_a_version_without_a_snapshot_can_pass_and_the_report_says_what_was_not_measured(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}))
    assert report.verdict is Verdict.PASS
    assert "heldout unmeasurable" in report.reason


def test_an_accepted_version_gets_a_new_report_and_keeps_its_state(world: World) -> None:
    version = world.publish()
    world.registry.accept(version.ref, actor="somebody", reason="by hand")
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": FORGETFUL}), rows=ROWS)
    assert report.verdict is Verdict.FAIL
    assert world.state(version) is VersionState.ACCEPTED
    written = json.loads((world.registry.store.report_path(version.ref) / "report.json").read_text())
    assert written["verdict"] == "fail"
    assert world.registry.aliases("chat") == {}  # it was asked to be loaded, and no longer is


def test_the_parent_is_loaded_too_and_compared_with(world: World) -> None:
    parent = world.publish()
    world.registry.accept(parent.ref, actor="test", reason="")
    version = world.publish(parent=parent.number)
    world.server_holds(parent, version)
    server = FakeServer({"base": PLAIN, "chat:1": PLAIN, "chat:2": GOOD})
    report = world.evaluate(version, server, rows=ROWS)
    assert report.verdict is Verdict.PASS, report.reason
    assert "chat:1" in server.asked
    assert report.lineage["compared_with"] == "chat:1"


def test_a_rejected_parent_is_replaced_by_the_base(world: World) -> None:
    parent = world.publish()
    world.registry.reject(parent.ref, actor="test", reason="bad")
    version = world.publish(parent=parent.number)
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:2": GOOD}), rows=ROWS)
    assert (report.lineage["parent"], report.lineage["compared_with"]) == ("chat:1", "base")


def test_a_rejected_version_is_not_evaluated_again(world: World) -> None:
    version = world.publish()
    world.registry.reject(version.ref, actor="test", reason="was bad")
    with pytest.raises(ConflictError, match="was bad"):
        world.evaluate(version, FakeServer({}))


def test_an_unknown_version_is_not_found(world: World) -> None:
    with pytest.raises(NotFoundError):
        world.evaluate(replace(world.publish(), number=99), FakeServer({}))


def test_one_evaluation_of_a_version_at_a_time(world: World) -> None:
    version = world.publish()
    with (
        HeldLease(world.database, f"evaluation:{version.ref}", "another"),
        pytest.raises(ConflictError, match="another"),
    ):
        world.evaluate(version, FakeServer({}))
    assert world.state(version) is VersionState.CANDIDATE


class BrokenGate:
    name = "broken"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        raise RuntimeError("a mistake of ours")


def test_what_the_red_team_found_is_recorded_as_feedback_of_the_version(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}), gates=(RedTeamGate(),))
    found = report.gates[0].findings
    assert found  # "gladly" refuses nothing
    recorded = list(FeedbackStore(world.database, None).export("chat"))
    assert [(row.number, row.row.source, row.row.metadata["probe"]) for row in recorded] == [
        (version.number, "red_team", finding.probe) for finding in found
    ]
    world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}), gates=(RedTeamGate(),))
    assert len(list(FeedbackStore(world.database, None).export("chat"))) == len(found)  # the same answers again


def test_after_a_mistake_of_ours_nothing_is_left_behind(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    with pytest.raises(RuntimeError, match="mistake"):
        world.evaluate(version, FakeServer({"base": PLAIN}), gates=(BrokenGate(),))
    assert world.state(version) is VersionState.CANDIDATE
    assert world.registry.aliases("chat") == {}
    assert current_holder(world.database, f"evaluation:{version.ref}") is None


def test_the_report_tells_where_the_version_comes_from(world: World) -> None:
    version = world.publish()
    world.server_holds(version)
    report = world.evaluate(version, FakeServer({"base": PLAIN, "chat:1": GOOD}), rows=ROWS)
    assert report.lineage["digest"] == version.digest
    assert report.lineage["snapshot_rows"] == len(ROWS)
    assert report.lineage["snapshot_manifest"] == {"counts": {"rows": len(ROWS)}}
    assert report.ref == VersionRef("chat", 1)


def test_what_earlier_versions_were_judged_by_is_kept_and_counted_once(world: World) -> None:
    votes = [replace(row, feedback_id=f"fb-{i}") for i, row in enumerate(ROWS)]
    own = world.freeze("own", votes)
    world.with_snapshot(world.publish(), world.freeze("first", votes[:10]))
    world.with_snapshot(world.publish(), world.freeze("rejected", votes[10:12]), state="rejected")
    world.with_snapshot(world.publish(), world.freeze("third", [*votes[5:16], replace(votes[16], split="train")]))
    world.with_snapshot(world.publish(), own)
    candidate = world.with_snapshot(world.publish(), own, state="candidate")
    later = world.with_snapshot(world.publish(), world.freeze("later", votes[20:]))
    assert later.number > candidate.number
    found = _earlier_holdouts(world.registry, world.database, candidate, own)
    assert {holdout.number: [row.feedback_id for row in holdout.rows] for holdout in found} == {
        1: [f"fb-{i}" for i in range(10)],
        3: [f"fb-{i}" for i in range(10, 16)],
    }
