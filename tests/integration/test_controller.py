"""The controller on both databases: it carries rollouts to their end, and stands back for people and for trouble."""

from __future__ import annotations

import logging

import pytest
import sqlalchemy as sa

from scion_adapters import controller, tables
from scion_adapters.database import Database
from scion_adapters.events import list_events
from scion_adapters.records import Rollout, RolloutState, VersionRef
from scion_adapters.rollouts import Rollouts
from scion_adapters.routing import load_routing
from tests.helpers.rollouts import (
    START,
    FakeClock,
    add_completion,
    add_version,
    event_kinds,
    lora_id_of,
    make_replica,
    report,
    write_completion,
)

TTL_S = 10.0
STEPS = (0.1, 0.5, 1.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def rollouts(database: Database, clock: FakeClock) -> Rollouts:
    """chat:1 is champion, chat:2 and code:1 are accepted."""
    add_version(database, 1)
    add_version(database, 2)
    add_version(database, 1, adapter="code")
    rollouts = Rollouts(database, clock, ttl_s=TTL_S)
    rollouts.start(VersionRef("chat", 1), steps=(1.0,), actor="ann")
    rollouts.promote("chat", actor="ann")
    return rollouts


def begin(rollouts: Rollouts, **kwargs: object) -> Rollout:
    return rollouts.start(VersionRef("chat", 2), steps=STEPS, actor="ann", **kwargs)  # type: ignore[arg-type]


class Driver:
    """Ticks with live servers."""

    def __init__(self, database: Database, clock: FakeClock, rollouts: Rollouts) -> None:
        self.database, self.clock, self.rollouts = database, clock, rollouts

    def server(self, name: str = "a:1", *loaded: int, failed: dict[int, str] | None = None) -> None:
        report(self.database, make_replica(name, loaded=set(loaded), failed=failed, heartbeat_at=self.clock()))

    def tick(self, after_s: float = 0.0, *, loaded: bool = True) -> Rollout:
        self.clock.advance(after_s)
        self.server("a:1", *([lora_id_of("chat", 1), lora_id_of("chat", 2)] if loaded else []))
        controller.tick(self.database, self.clock, heartbeat_ttl_s=TTL_S)
        return self.rollouts.list("chat")[0]


@pytest.fixture
def driver(database: Database, clock: FakeClock, rollouts: Rollouts) -> Driver:
    return Driver(database, clock, rollouts)


def test_a_rollout_goes_from_loading_to_champion(database: Database, rollouts: Rollouts, driver: Driver) -> None:
    begin(rollouts, every_s=60.0)
    weights = [driver.tick(loaded=False).weight]
    weights += [driver.tick(after_s).weight for after_s in (0, 0, 59, 1, 30, 30, 59)]
    assert weights == [0.0, 0.1, 0.1, 0.1, 0.5, 0.5, 1.0, 1.0]
    assert load_routing(database).adapters["chat"].weight == 1.0
    ended = driver.tick(1)
    assert (ended.state, ended.message) == (RolloutState.PROMOTED, "all 3 steps passed")
    line = load_routing(database).adapters["chat"]
    assert (line.champion, line.previous, line.challenger) == (2, 1, None)
    assert event_kinds(database)[-9:] == [
        "alias.set challenger",
        "rollout.started",
        "rollout.step",
        "rollout.step",
        "rollout.step",
        "alias.set champion",
        "alias.set previous",
        "alias.removed challenger",
        "rollout.promoted",
    ]
    steps = [event for event in list_events(database, limit=1000) if event.kind == "rollout.step"]
    assert [(event.actor, event.data["previous_weight"], event.data["weight"]) for event in steps] == [
        ("controller", 0.0, 0.1),
        ("controller", 0.1, 0.5),
        ("controller", 0.5, 1.0),
    ]


def test_holding_writes_nothing(database: Database, rollouts: Rollouts, driver: Driver) -> None:
    begin(rollouts, every_s=60.0)
    first = driver.tick()
    kinds = event_kinds(database)
    assert [driver.tick(5) for _ in range(3)] == [first] * 3
    assert event_kinds(database) == kinds


def test_it_says_what_it_waits_for(rollouts: Rollouts, driver: Driver, clock: FakeClock) -> None:
    begin(rollouts)
    clock.advance(60)
    controller.tick(driver.database, clock, heartbeat_ttl_s=TTL_S)
    assert rollouts.list("chat")[0].message.startswith("no live server")
    driver.server("b:2", failed={lora_id_of("chat", 2): "no such file"})
    assert driver.tick().message == "could not be loaded by b:2 (no such file)"
    driver.server("b:2")
    assert driver.tick().message == "waiting until it is loaded by b:2"
    driver.server("b:2", lora_id_of("chat", 2))
    assert driver.tick().weight == 0.1


def test_a_dead_server_does_not_hold_for_ever(rollouts: Rollouts, driver: Driver) -> None:
    begin(rollouts)
    driver.server("b:2")
    assert driver.tick().step == -1
    assert driver.tick(TTL_S + 1).step == 0


def test_steps_by_answers_count_the_challengers_own_of_this_step(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock
) -> None:
    rollout = begin(rollouts, after_requests=2)
    driver.tick()
    for number, rollout_id, at in [
        (1, rollout.id, clock()),  # the champion's
        (2, None, clock()),  # asked by its exact name, not drawn
        (2, rollout.id, clock() - 1),  # before the step began
        (2, rollout.id, clock()),
    ]:
        add_completion(database, number, rollout_id=rollout_id, at=at)
    assert driver.tick(3600).step == 0
    add_completion(database, 2, rollout_id=rollout.id, at=clock())
    assert driver.tick().step == 1
    assert driver.tick(3600).step == 1  # the next step counts from zero


def vote(database: Database, rollout: Rollout, *, champion: float, challenger: float, at: float) -> None:
    """Thirty users on each side; the shares like it."""
    with database.write() as connection:
        for number, share in ((1, champion), (2, challenger)):
            for user in range(30):
                values = {"user": f"user-{number}-{user}", "vote": float(user < 30 * share)}
                write_completion(connection, number, rollout_id=rollout.id, at=at, **values)  # type: ignore[arg-type]


def test_disliked_is_aborted_with_the_figures(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock
) -> None:
    rollout = begin(rollouts)
    driver.tick()
    vote(database, rollout, champion=0.9, challenger=0.2, at=clock())
    aborted = driver.tick(1)
    assert aborted.state is RolloutState.ABORTED
    assert (
        "users like chat:2 less than chat:1: liked 20% against the champion's 90%, 30 and 30 users" in aborted.message
    )
    line = load_routing(database).adapters["chat"]
    assert (line.champion, line.challenger) == (1, None)
    event = list_events(database, limit=1000)[-1]
    assert (event.kind, event.actor, event.reason) == ("rollout.aborted", "controller", aborted.message)


@pytest.mark.parametrize(
    ("guard", "champion", "challenger"),
    [
        (False, 0.9, 0.2),  # nobody asked for the guard
        (True, 0.9, 0.8),  # not clear enough
        (True, 0.2, 0.9),  # liked more
    ],
)
def test_otherwise_votes_do_not_stop_it(
    database: Database,
    rollouts: Rollouts,
    driver: Driver,
    clock: FakeClock,
    guard: bool,
    champion: float,
    challenger: float,
) -> None:
    rollout = begin(rollouts, guard=guard)
    driver.tick()
    vote(database, rollout, champion=champion, challenger=challenger, at=clock())
    assert driver.tick(1).state is RolloutState.PROGRESSING


def test_votes_of_an_earlier_rollout_do_not_count(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock
) -> None:
    earlier = begin(rollouts)
    vote(database, earlier, champion=0.9, challenger=0.2, at=clock())
    rollouts.abort("chat", actor="ann")
    begin(rollouts)
    driver.tick()
    assert driver.tick(1).state is RolloutState.PROGRESSING


def test_a_paused_rollout_is_left_alone_and_a_resumed_one_goes_on(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock
) -> None:
    rollout = begin(rollouts, every_s=60.0)
    driver.tick()
    paused = rollouts.pause("chat", actor="ben")
    vote(database, rollout, champion=0.9, challenger=0.2, at=clock())
    assert driver.tick(3600) == paused
    rollouts.resume("chat", actor="ben")
    assert driver.tick(59).state is RolloutState.ABORTED  # what it may do again, it does


def test_a_person_who_is_faster_wins(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(rollouts, every_s=60.0)
    driver.tick()
    decide = controller.decide

    def decide_slowly(rollout: Rollout, **kwargs: object) -> controller.Decision:
        decision = decide(rollout, **kwargs)  # type: ignore[arg-type]
        rollouts.abort("chat", actor="ann", reason="no")  # between the decision and the write
        return decision

    monkeypatch.setattr(controller, "decide", decide_slowly)
    assert driver.tick(60).message == "aborted by ann: no"
    assert load_routing(database).adapters["chat"].weight == 0.0


def test_one_bad_rollout_does_not_stop_the_others(
    database: Database, rollouts: Rollouts, driver: Driver, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    bad = begin(rollouts)
    other = rollouts.start(VersionRef("code", 1), steps=STEPS, actor="ann")
    with database.write() as connection:  # an impossible row: its version is gone
        connection.execute(sa.update(tables.rollouts).where(tables.rollouts.c.id == bad.id).values(number=77))
    for _ in range(3):
        driver.server("a:1", lora_id_of("chat", 1), lora_id_of("code", 1))
        controller.tick(database, clock, heartbeat_ttl_s=TTL_S)
    assert rollouts.get(other.id).step == 0
    assert "the controller failed: NotFoundError: chat:77 does not exist" in rollouts.get(bad.id).message
    assert event_kinds(database).count("controller.failed") == 1  # said once, not at every tick
    assert rollouts.abort("chat", actor="ann").state is RolloutState.ABORTED  # and a person can end it


def test_without_rollouts_a_tick_does_nothing(database: Database, clock: FakeClock) -> None:
    controller.tick(database, clock, heartbeat_ttl_s=TTL_S)
    assert event_kinds(database, None) == []


def test_a_return_to_an_older_version_is_promoted_once_it_is_loaded(
    database: Database, rollouts: Rollouts, driver: Driver
) -> None:
    add_version(database, 3)
    for number in (2, 3):
        rollouts.start(VersionRef("chat", number), steps=STEPS, actor="ann")
        rollouts.promote("chat", actor="ann")
    assert rollouts.rollback("chat", to=1, actor="ann").pending
    states = [driver.tick(loaded=False), driver.tick(), driver.tick()]
    assert [(rollout.weight, rollout.state) for rollout in states] == [
        (0.0, RolloutState.PROGRESSING),
        (1.0, RolloutState.PROGRESSING),
        (0.0, RolloutState.PROMOTED),
    ]
    assert states[-1].created_at == START
    assert load_routing(database).adapters["chat"].champion == 1
