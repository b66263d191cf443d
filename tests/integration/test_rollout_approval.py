"""Rollouts that wait for a person: none of an adapter's first versions reaches users before somebody approves it."""

from __future__ import annotations

import pytest

from scion_adapters import controller
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError
from scion_adapters.events import list_events
from scion_adapters.records import Rollout, RolloutState, VersionRef
from scion_adapters.rollouts import Rollouts, needs_approval
from scion_adapters.routing import load_routing
from tests.helpers.rollouts import FakeClock, add_version, lora_id_of, make_replica, report


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def rollouts(database: Database, clock: FakeClock) -> Rollouts:
    """Versions 1 to 3 of chat are accepted and loaded by a live server; the base answers."""
    numbers = (1, 2, 3)
    for number in numbers:
        add_version(database, number)
    report(database, make_replica(loaded={lora_id_of("chat", number) for number in numbers}))
    return Rollouts(database, clock, default_every_s=300.0, ttl_s=10.0)


def start(rollouts: Rollouts, number: int, *, approve_first: int = 1) -> Rollout:
    ref = VersionRef("chat", number)
    return rollouts.start(ref, steps=(0.5, 1.0), every_s=1.0, approve_first=approve_first, actor="trainer")


def tick(database: Database, clock: FakeClock) -> None:
    controller.tick(database, clock, heartbeat_ttl_s=10.0)


@pytest.mark.parametrize(
    ("promoted", "first", "needed"),
    [(0, 3, True), (2, 3, True), (3, 3, False), (9, 3, False), (0, 0, False)],
)
def test_who_waits(promoted: int, first: int, needed: bool) -> None:
    assert needs_approval(promoted, first) is needed


def test_it_is_loaded_and_gets_no_traffic_until_somebody_approves(
    database: Database, clock: FakeClock, rollouts: Rollouts
) -> None:
    rollout = start(rollouts, 1)
    assert rollout.state is RolloutState.UNAPPROVED
    assert "scion rollout approve chat" in rollout.message
    for _ in range(3):
        clock.advance(1.0)
        tick(database, clock)
    waiting = rollouts.get(rollout.id)
    assert (waiting.state, waiting.weight, waiting.revision) == (RolloutState.UNAPPROVED, 0.0, rollout.revision)
    line = load_routing(database).adapters["chat"]
    assert (line.challenger, line.weight) == (1, 0.0)
    assert lora_id_of("chat", 1) in line.wanted()

    approved = rollouts.approve("chat", actor="ann", reason="read the report")
    assert (approved.state, approved.weight) == (RolloutState.PROGRESSING, 0.0)
    tick(database, clock)
    assert rollouts.get(rollout.id).weight == 0.5
    event = next(event for event in list_events(database, adapter="chat") if event.kind == "rollout.approved")
    assert (event.actor, event.reason, event.data["rollout_id"]) == ("ann", "read the report", rollout.id)


def test_versions_that_were_promoted_count_and_those_that_were_aborted_do_not(rollouts: Rollouts) -> None:
    start(rollouts, 1)
    rollouts.abort("chat", actor="ann")
    assert start(rollouts, 2).state is RolloutState.UNAPPROVED
    rollouts.promote("chat", actor="ann")  # a person may also skip the steps
    assert start(rollouts, 3).state is RolloutState.PROGRESSING
    rollouts.abort("chat", actor="ann")
    assert start(rollouts, 3, approve_first=2).state is RolloutState.UNAPPROVED


def test_a_return_earns_no_trust(database: Database, clock: FakeClock, rollouts: Rollouts) -> None:
    assert rollouts.rollback("chat", to=1, actor="ann").pending
    tick(database, clock)
    tick(database, clock)
    assert load_routing(database).adapters["chat"].champion == 1
    assert start(rollouts, 2).state is RolloutState.UNAPPROVED


def test_only_what_waits_can_be_approved_and_what_waits_cannot_be_paused(rollouts: Rollouts) -> None:
    with pytest.raises(ConflictError, match="no active rollout"):
        rollouts.approve("chat", actor="ann")
    start(rollouts, 1)
    with pytest.raises(ConflictError, match="waits for approval"):
        rollouts.pause("chat", actor="ann")
    with pytest.raises(ConflictError, match="scion rollout approve chat"):
        rollouts.resume("chat", actor="ann")
    rollouts.approve("chat", actor="ann")
    with pytest.raises(ConflictError, match="needs no approval: it is progressing"):
        rollouts.approve("chat", actor="ann")


def test_a_second_rollout_does_not_begin_beside_one_that_waits(rollouts: Rollouts) -> None:
    start(rollouts, 1)
    with pytest.raises(ConflictError, match="unapproved"):
        start(rollouts, 2)
