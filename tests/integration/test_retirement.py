"""Out of service: retired, quarantined, reinstated, collected and repaired, on both databases and a real store."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError, UnavailableError
from scion_adapters.events import list_events
from scion_adapters.fingerprint import read_base
from scion_adapters.gc import collect
from scion_adapters.leases import HeldLease
from scion_adapters.records import CHAMPION, PREVIOUS, Replica, RolloutState, Version, VersionState
from scion_adapters.registry import Registry
from scion_adapters.repair import find_leftovers
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.retirement import quarantine, reinstate, retire
from scion_adapters.rollouts import Rollouts
from tests.helpers.adapters import LIMITS, make_base
from tests.helpers.registry_world import RegistryWorld

DAY_S = 86400.0
REPLICA = Replica("server-1", "host", 1, "http://x", 0.0, 0.0, 4, 8, 16, frozenset(), {}, {}, 1, "sha256:base")


@pytest.fixture
def world(database: Database, tmp_path: Path) -> RegistryWorld:
    registry = Registry(database, ArtifactStore(tmp_path / "store"), clock=lambda: 100.0)
    registry.ensure_adapter("chat")
    return RegistryWorld(registry, read_base(make_base(tmp_path / "base")), tmp_path)


def state(world: RegistryWorld, version: Version) -> VersionState:
    return world.registry.version(version.ref).state


def remove_files(world: RegistryWorld, version: Version) -> None:
    """What gc does, without waiting for anything."""
    fates = collect(world.registry, rollback_window_s=0.0, grace_s=0.0)
    assert [fate.version.number for fate in fates if fate.kept_for is None] == [version.number]


# --- retire ----------------------------------------------------------------------------------------------------------


def test_a_retired_version_is_out_of_service_for_good(world: RegistryWorld) -> None:
    version = world.accepted()
    revision = world.revision()
    assert retire(world.registry.database, version.ref, actor="me", reason="old").state is VersionState.RETIRED
    assert world.kinds()[-1] == "version.retired"
    assert world.revision() > revision  # servers hear of it
    again = world.kinds()
    retire(world.registry.database, version.ref, actor="me")
    assert world.kinds() == again
    with pytest.raises(ConflictError, match="retired"):
        world.registry.set_alias("chat", "good", 1, actor="me")
    with pytest.raises(ConflictError):
        Rollouts(world.registry.database).start(version.ref, steps=[1.0], actor="me")


def test_a_version_that_something_points_at_is_not_retired(world: RegistryWorld) -> None:
    database = world.registry.database
    serving, challenger, pinned = (world.accepted() for _ in range(3))
    world.set_traffic(CHAMPION, serving.number)
    world.registry.set_alias("chat", "pinned", pinned.number, actor="me")
    Rollouts(database).start(challenger.ref, steps=[1.0], actor="me")
    for version, why in ((serving, "rollout"), (challenger, "rollout"), (pinned, "chat@pinned")):
        with pytest.raises(ConflictError, match=why):
            retire(database, version.ref, actor="me")
        assert state(world, version) is VersionState.ACCEPTED


def test_what_an_evaluation_that_was_killed_left_does_not_keep_a_candidate(world: RegistryWorld) -> None:
    database, version = world.registry.database, world.publish()
    world.registry.request_evaluation(version.ref)
    lease = HeldLease(database, f"evaluation:{version.ref}", "someone")
    with lease, pytest.raises(ConflictError, match="being evaluated: wait"):
        retire(database, version.ref, actor="me")
    retire(database, version.ref, actor="me", reason="useless")
    assert state(world, version) is VersionState.RETIRED
    assert world.registry.aliases("chat") == {}


def test_another_alias_keeps_it_with_its_evaluation(world: RegistryWorld) -> None:
    version = world.accepted()
    world.registry.set_alias("chat", "good", version.number, actor="me")
    world.registry.request_evaluation(version.ref)
    with pytest.raises(ConflictError, match="chat:1 is chat@good: only"):
        retire(world.registry.database, version.ref, actor="me")
    assert set(world.registry.aliases("chat")) == {"good", "candidate-1"}


# --- quarantine -------------------------------------------------------------------------------------------------------


def test_a_lost_champion_hands_its_users_to_the_previous_one(world: RegistryWorld) -> None:
    first, second = world.accepted(), world.accepted()
    world.set_traffic(PREVIOUS, first.number)
    world.set_traffic(CHAMPION, second.number)
    world.registry.set_alias("chat", "good", second.number, actor="me")
    quarantine(world.registry.database, second.ref, actor="server-1", reason="gone")
    assert world.registry.aliases("chat") == {CHAMPION: first.number}
    assert state(world, second) is VersionState.QUARANTINED
    assert world.kinds()[-1] == "version.quarantined"


def test_a_lost_champion_without_a_previous_one_leaves_the_base(world: RegistryWorld) -> None:
    only = world.accepted()
    world.set_traffic(CHAMPION, only.number)
    quarantine(world.registry.database, only.ref, actor="server-1", reason="gone")
    assert world.registry.aliases("chat") == {CHAMPION: 0}


def test_a_lost_challenger_ends_its_rollout(world: RegistryWorld) -> None:
    rollouts = Rollouts(world.registry.database)
    serving, challenger = world.accepted(), world.accepted()
    world.set_traffic(CHAMPION, serving.number)
    rollout = rollouts.start(challenger.ref, steps=[1.0], actor="me")
    quarantine(world.registry.database, challenger.ref, actor="server-1", reason="gone")
    ended = rollouts.get(rollout.id)
    assert ended.state is RolloutState.ABORTED
    assert "gone" in ended.message
    assert world.registry.aliases("chat") == {CHAMPION: serving.number}


def test_a_lost_champion_ends_the_rollout_that_is_compared_with_it(world: RegistryWorld) -> None:
    rollouts = Rollouts(world.registry.database)
    first, second, challenger = (world.accepted() for _ in range(3))
    world.set_traffic(PREVIOUS, first.number)
    world.set_traffic(CHAMPION, second.number)
    rollout = rollouts.start(challenger.ref, steps=[0.5, 1.0], actor="me")
    quarantine(world.registry.database, second.ref, actor="server-1", reason="gone")
    ended = rollouts.get(rollout.id)
    assert ended.state is RolloutState.ABORTED
    assert "the guard compared with, chat:2, was quarantined: gone" in ended.message
    assert world.registry.aliases("chat") == {CHAMPION: first.number}
    (event,) = [e for e in list_events(world.registry.database) if e.kind == "rollout.aborted"]
    assert (event.actor, event.reason, event.data["champion"]) == ("server-1", "gone", first.number)
    rollouts.start(challenger.ref, steps=[0.5, 1.0], actor="me")  # what the message says helps


def test_a_lost_champion_does_not_stop_the_return_to_an_older_version(world: RegistryWorld) -> None:
    rollouts = Rollouts(world.registry.database)
    first, second, third = (world.accepted() for _ in range(3))
    world.set_traffic(PREVIOUS, second.number)
    world.set_traffic(CHAMPION, third.number)
    result = rollouts.rollback("chat", to=first.number, actor="me")
    quarantine(world.registry.database, third.ref, actor="server-1", reason="gone")
    active = rollouts.active("chat")
    assert active is not None
    assert active.id == result.rollout_id


def test_quarantine_says_it_once_and_leaves_what_is_out_of_service(world: RegistryWorld) -> None:
    version, retired = world.accepted(), world.accepted()
    retire(world.registry.database, retired.ref, actor="me")
    for lost in (version, version, retired):
        quarantine(world.registry.database, lost.ref, actor="server-1", reason="gone")
    assert world.kinds().count("version.quarantined") == 1
    assert state(world, retired) is VersionState.RETIRED


@pytest.mark.parametrize("was", [VersionState.CANDIDATE, VersionState.ACCEPTED])
def test_a_reinstated_version_is_what_it_was(world: RegistryWorld, was: VersionState) -> None:
    version = world.accepted() if was is VersionState.ACCEPTED else world.publish()
    quarantine(world.registry.database, version.ref, actor="server-1", reason="gone")
    reinstate(world.registry.database, version.ref, actor="me", reason="back")
    assert state(world, version) is was


# --- gc ---------------------------------------------------------------------------------------------------------------


def test_the_files_of_a_retired_version_go_and_its_row_stays(world: RegistryWorld) -> None:
    version, kept = world.accepted(), world.accepted()
    retire(world.registry.database, version.ref, actor="me")
    assert collect(world.registry, rollback_window_s=0.0, grace_s=0.0, dry_run=True)[0].kept_for is None
    assert world.registry.store.has(version.digest)  # a dry run deletes nothing
    remove_files(world, version)
    assert not world.registry.store.has(version.digest)
    assert world.registry.store.has(kept.digest)
    assert world.registry.version(version.ref).files_removed_at is not None
    assert world.kinds()[-1] == "version.files_removed"
    assert [f.version.number for f in collect(world.registry, rollback_window_s=0.0, grace_s=0.0)] == [kept.number]
    with pytest.raises(NotFoundError):
        world.registry.store.path(version.digest)


def test_a_version_that_a_server_holds_keeps_its_files_until_it_does_not(world: RegistryWorld) -> None:
    version = world.accepted()
    ledger = ReplicaLedger(world.registry.database)
    ledger.report(replace(REPLICA, loaded=frozenset({version.lora_id})))
    retire(world.registry.database, version.ref, actor="me")
    (fate,) = collect(world.registry, rollback_window_s=0.0, grace_s=0.0)
    assert fate.kept_for == "server-1 holds it"
    ledger.report(REPLICA)
    remove_files(world, version)


def test_a_champion_of_today_keeps_its_files_for_the_rollback_window(world: RegistryWorld) -> None:
    first, second = world.accepted(), world.accepted()
    world.set_traffic(CHAMPION, first.number)
    world.set_traffic(CHAMPION, second.number)  # at 5.0 by its clock
    retire(world.registry.database, first.ref, actor="me")
    fate = collect(world.registry, rollback_window_s=86_400.0, grace_s=0.0, clock=lambda: 1000.0)[0]
    assert fate.kept_for == "it was champion within the rollback window"
    assert collect(world.registry, rollback_window_s=86_400.0, grace_s=0.0, clock=lambda: 90_000.0)[0].kept_for is None


def test_bytes_that_come_back_get_a_new_version_with_files(world: RegistryWorld) -> None:
    directory = world.adapter_directory()

    def publish() -> Version:
        return world.registry.publish("chat", directory, parent=0, base=world.base, limits=LIMITS, actor="me")

    first = publish()
    world.registry.reject(first.ref, actor="gates", reason="bad")
    remove_files(world, first)
    second = publish()
    assert second.digest == first.digest
    assert world.registry.store.has(second.digest)
    assert world.registry.version(first.ref).files_removed_at is not None


def test_files_that_were_just_published_again_are_not_collected(world: RegistryWorld) -> None:
    version = world.accepted()
    retire(world.registry.database, version.ref, actor="me")
    directory = world.registry.store.path(version.digest)
    os.utime(directory, (1.0, 1.0))
    world.registry.store.add(_copy(directory))  # a publish whose row is still to come
    (fate,) = collect(world.registry, rollback_window_s=0.0)
    assert fate.kept_for == "it was published just now"


# --- repair -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead_s", [-10 * DAY_S, 10 * DAY_S])
def test_the_rollback_window_goes_by_the_databases_clock(
    world: RegistryWorld, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    database, at = world.registry.database, time.time() + ahead_s  # this host's clock is wrong, or the database's is
    monkeypatch.setattr("scion_adapters.database.server_time", lambda _: at)
    rollouts = Rollouts(database)
    old, new = world.accepted(), world.accepted()
    for version in (old, new):
        rollouts.start(version.ref, steps=[1.0], guard=False, actor="me")
        rollouts.promote("chat", actor="me")
    quarantine(database, new.ref, actor="server-1", reason="gone")
    rollouts.rollback("chat", to=0, actor="me")
    retire(database, old.ref, actor="me")

    def kept() -> str | None:
        return collect(world.registry, rollback_window_s=DAY_S, grace_s=0.0)[0].kept_for

    assert kept() == "it was champion within the rollback window"
    at += DAY_S - 1
    assert kept() is not None
    at += 2
    assert kept() is None
    assert not world.registry.store.has(old.digest)


def test_leftovers_of_every_kind_are_found_and_mended_once(world: RegistryWorld) -> None:
    registry, store = world.registry, world.registry.store
    lost, back, removed = (world.accepted() for _ in range(3))
    shutil.rmtree(store.path(lost.digest))
    quarantine(registry.database, back.ref, actor="server-1", reason="gone")
    retire(registry.database, removed.ref, actor="me")
    with registry.database.write() as connection:
        this = tables.versions.c.number == removed.number
        connection.execute(sa.update(tables.versions).where(this).values(files_removed_at=1.0))
    stray = store.add(world.adapter_directory())
    (store.root / "tmp" / "left").mkdir()
    ReplicaLedger(registry.database, clock=lambda: 1.0).report(REPLICA)

    found = find_leftovers(registry, grace_s=0.0)
    text = "\n".join(finding.what for finding in found)
    for part in ("tmp/left", stray.digest, removed.digest, str(lost.ref), str(back.ref), "server-1"):
        assert part in text
    for finding in found:
        finding.mend()
    assert find_leftovers(registry, grace_s=0.0) == []
    assert state(world, lost) is VersionState.QUARANTINED
    assert state(world, back) is VersionState.ACCEPTED
    assert store.stored() == {back.digest}
    assert ReplicaLedger(registry.database, clock=lambda: 1.0).live(10.0) == []


def test_an_evaluation_that_was_killed_is_a_leftover(world: RegistryWorld) -> None:
    version = world.publish()
    world.registry.request_evaluation(version.ref)
    world.registry.set_alias("chat", "plain", 0, actor="me")
    with HeldLease(world.registry.database, f"evaluation:{version.ref}", "someone"):
        assert find_leftovers(world.registry, evaluation_s=0.0) == []
    (finding,) = find_leftovers(world.registry, evaluation_s=0.0)
    assert str(version.ref) in finding.what
    with HeldLease(world.registry.database, f"evaluation:{version.ref}", "another"):
        finding.mend()  # another one began meanwhile
        assert "candidate-1" in world.registry.aliases("chat")
    finding.mend()
    finding.mend()
    assert world.registry.aliases("chat") == {"plain": 0}
    assert state(world, version) is VersionState.CANDIDATE
    assert find_leftovers(world.registry, evaluation_s=0.0) == []


def test_an_inspection_without_a_lease_is_left_alone_while_it_may_run(world: RegistryWorld) -> None:
    registry = Registry(world.registry.database, world.registry.store)  # by the database's clock
    registry.request_evaluation(world.publish().ref)
    assert find_leftovers(registry) == []


def test_what_is_young_is_no_leftover(world: RegistryWorld) -> None:
    world.registry.store.add(world.adapter_directory())
    (world.registry.store.root / "tmp" / "busy").mkdir()
    ReplicaLedger(world.registry.database).report(REPLICA)
    assert find_leftovers(world.registry) == []


def test_a_quarantined_version_with_altered_files_is_not_reinstated(world: RegistryWorld) -> None:
    version = world.accepted()
    weights = world.registry.store.path(version.digest) / "adapter_model.safetensors"
    quarantine(world.registry.database, version.ref, actor="server-1", reason="gone")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (finding,) = find_leftovers(world.registry)
    with pytest.raises(Exception, match="changed after publishing"):
        finding.mend()
    assert state(world, version) is VersionState.QUARANTINED


@pytest.mark.parametrize("is_mount_point_left", [True, False])
def test_a_store_that_is_gone_altogether_quarantines_nobody(world: RegistryWorld, is_mount_point_left: bool) -> None:
    root, versions = world.registry.store.root, [world.accepted(), world.publish()]
    away = root.rename(root.with_name("unmounted"))
    if is_mount_point_left:
        root.mkdir()
    (finding,) = find_leftovers(world.registry, grace_s=0.0)
    assert finding.needs_person
    with pytest.raises(UnavailableError, match="mount the store"):
        finding.mend()
    assert [state(world, version) for version in versions] == [VersionState.ACCEPTED, VersionState.CANDIDATE]
    shutil.rmtree(root, ignore_errors=True)
    away.rename(root)
    assert find_leftovers(world.registry) == []


def test_what_is_said_about_files_that_are_lost_for_good_helps(world: RegistryWorld) -> None:
    version = world.accepted()
    world.set_traffic(CHAMPION, version.number)
    shutil.rmtree(world.registry.store.root)
    (finding,) = find_leftovers(world.registry)
    assert "--to 0" in finding.remedy
    Rollouts(world.registry.database).rollback("chat", to=0, actor="me")
    retire(world.registry.database, version.ref, actor="me")
    assert find_leftovers(world.registry) == []


def test_the_store_of_another_database_loses_nothing(world: RegistryWorld, tmp_path: Path) -> None:
    version = world.accepted()
    elsewhere = ArtifactStore(tmp_path / "elsewhere")
    other = elsewhere.add(world.adapter_directory())
    (finding,) = find_leftovers(Registry(world.registry.database, elsewhere), grace_s=0.0)
    assert finding.needs_person
    assert state(world, version) is VersionState.ACCEPTED
    assert elsewhere.has(other.digest)


def test_a_store_whose_only_version_is_damaged_is_there(world: RegistryWorld) -> None:
    version = world.accepted()
    (world.registry.store.path(version.digest) / "adapter_model.safetensors").unlink()
    (finding,) = find_leftovers(world.registry)
    finding.mend()
    assert state(world, version) is VersionState.QUARANTINED


def _copy(directory: Path) -> Path:
    copy = directory.parent.parent / "copy"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("manifest.json"))
    return copy
