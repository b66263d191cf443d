"""The replica ledger on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.database import Database, server_time
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.records import RolloutState, VersionRef
from scion_adapters.replicas import FORGET_AFTER_S, ReplicaLedger, all_loaded, lacking, wait_until_loaded
from scion_adapters.rollouts import Rollouts
from scion_adapters.settings import Settings
from scion_adapters.status import read_status
from tests.helpers.rollouts import START, FakeClock, add_version, make_replica

TTL_S = 10.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def ledger(database: Database, clock: FakeClock) -> ReplicaLedger:
    return ReplicaLedger(database, clock)


def test_what_a_server_reports_is_read_back(ledger: ReplicaLedger) -> None:
    replica = replace(make_replica("a:1", loaded={3, 1}, failed={7: "no such file"}), in_flight={3: 2, 1: 0})
    ledger.report(replica)
    assert ledger.live(TTL_S) == [replica]


def test_the_last_report_counts(ledger: ReplicaLedger) -> None:
    ledger.report(make_replica("a:1", loaded={1}))
    ledger.report(make_replica("b:2"))
    ledger.report(make_replica("a:1", loaded={1, 2}, routing_revision=5))
    assert [(r.id, sorted(r.loaded), r.routing_revision) for r in ledger.live(TTL_S)] == [
        ("a:1", [1, 2], 5),
        ("b:2", [], 0),
    ]


def test_silent_servers_stop_counting_and_those_that_leave_go_at_once(ledger: ReplicaLedger, clock: FakeClock) -> None:
    ledger.report(make_replica("a:1"))
    clock.advance(5)
    ledger.report(make_replica("b:2"))
    ledger.report(make_replica("c:3"))
    clock.advance(TTL_S - 5)
    assert [r.id for r in ledger.live(TTL_S)] == ["a:1", "b:2", "c:3"]
    clock.advance(0.1)
    assert [r.id for r in ledger.live(TTL_S)] == ["b:2", "c:3"]
    ledger.remove("b:2")
    assert [r.id for r in ledger.live(TTL_S)] == ["c:3"]


def test_a_server_whose_own_clock_is_wrong_is_live_as_long_as_it_reports(
    ledger: ReplicaLedger, clock: FakeClock
) -> None:
    for error_s in (3600, -3600):
        ledger.report(make_replica("a:1", heartbeat_at=START + error_s))
        assert [(r.id, r.heartbeat_at) for r in ledger.live(TTL_S)] == [("a:1", START)]
    clock.advance(TTL_S + 1)
    assert ledger.live(TTL_S) == []


def test_a_clock_set_back_kills_no_server_and_keeps_no_dead_one(ledger: ReplicaLedger, clock: FakeClock) -> None:
    for name in ("dead:1", "a:1", "b:2"):
        ledger.report(make_replica(name))
    clock.advance(-3600)
    assert [r.id for r in ledger.live(TTL_S)] == ["a:1", "b:2", "dead:1"]  # who is dead cannot be told yet
    ledger.report(make_replica("a:1"))
    assert [r.id for r in ledger.live(TTL_S)] == ["a:1", "b:2", "dead:1"]  # nor for one that did not report yet
    clock.advance(TTL_S)
    for name in ("a:1", "b:2"):
        ledger.report(make_replica(name))
    clock.advance(0.1)
    assert [r.id for r in ledger.live(TTL_S)] == ["a:1", "b:2"]


def test_a_dead_server_is_forgotten_after_a_clock_set_back_though_no_server_runs(
    database: Database, ledger: ReplicaLedger, clock: FakeClock
) -> None:
    ledger.report(make_replica("dead:1"))
    clock.advance(-3600)
    add_version(database, 1)
    rollouts = Rollouts(database, clock, ttl_s=TTL_S)
    settings = Settings(database={"url": database.url}, rollout={"heartbeat_s": TTL_S / 5})

    def shown() -> list[str]:
        return [replica.id for replica in read_status(database, settings, clock).replicas]

    rollouts.start(VersionRef("chat", 1), steps=[1.0], actor="ann")
    assert shown() == ["dead:1"]  # it may have reported just before the clock was set
    with pytest.raises(ConflictError, match="dead:1"):
        rollouts.promote("chat", actor="ann")
    clock.advance(TTL_S + 0.1)
    assert ledger.live(TTL_S) == []
    assert shown() == []
    assert rollouts.promote("chat", actor="ann").state is RolloutState.PROMOTED


def test_without_a_clock_the_databases_own_is_used(database: Database) -> None:
    ledger = ReplicaLedger(database)
    ledger.report(make_replica("a:1", heartbeat_at=START))
    (replica,) = ledger.live(60.0)
    with database.read() as connection:
        assert server_time(connection) - 60 < replica.heartbeat_at <= server_time(connection)


def test_the_long_dead_are_forgotten(ledger: ReplicaLedger, clock: FakeClock) -> None:
    ledger.report(make_replica("dead:1"))
    clock.advance(FORGET_AFTER_S + 1)
    ledger.report(make_replica("a:1", heartbeat_at=clock()))
    ledger.remove("b:2")
    assert [r.id for r in ledger.live(1e9)] == ["a:1"]


def test_all_loaded() -> None:
    has, lacks = make_replica("a:1", loaded={7}), make_replica("b:2", failed={8: "x"})
    broken, recovered = (
        make_replica("c:3", failed={7: "no such file"}),
        make_replica("d:4", loaded={7}, failed={7: "x"}),
    )
    assert all_loaded([has, recovered], 7)  # a failure that a later attempt made good does not count
    assert not all_loaded([has, lacks], 7)
    assert not all_loaded([], 7)  # nobody can answer with it
    assert lacking([has, lacks, broken, recovered], 7) == {"b:2": "still loading", "c:3": "no such file"}


class Stepper:
    """Time for a waiting loop: each sleep runs the next of `steps`."""

    def __init__(self, *steps: object) -> None:
        self.at = 0.0
        self.steps = list(steps)

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds
        if self.steps:
            step = self.steps.pop(0)
            assert callable(step)
            step()


def test_waiting_ends_when_the_last_one_has_loaded(ledger: ReplicaLedger) -> None:
    ledger.report(make_replica("a:1", loaded={7}))
    ledger.report(make_replica("b:2"))
    time = Stepper(
        lambda: None,
        lambda: ledger.report(make_replica("b:2", loaded={7})),
    )
    live = wait_until_loaded(ledger, 7, 60.0, TTL_S, monotonic=time.monotonic, sleep=time.sleep)
    assert [r.id for r in live] == ["a:1", "b:2"]
    assert time.at == pytest.approx(0.2)


def test_waiting_ends_when_the_one_that_lacks_it_dies(ledger: ReplicaLedger, clock: FakeClock) -> None:
    ledger.report(make_replica("b:2"))
    clock.advance(TTL_S)
    ledger.report(make_replica("a:1", loaded={7}))
    time = Stepper(lambda: clock.advance(1))
    live = wait_until_loaded(ledger, 7, 60.0, TTL_S, monotonic=time.monotonic, sleep=time.sleep)
    assert [r.id for r in live] == ["a:1"]


def test_waiting_in_vain_names_who_lacks_it_and_why(ledger: ReplicaLedger) -> None:
    ledger.report(make_replica("a:1", loaded={7}))
    ledger.report(make_replica("b:2"))
    ledger.report(make_replica("c:3", failed={7: "no such file"}))
    time = Stepper()
    with pytest.raises(UnavailableError, match=r"after 5 s by b:2 \(still loading\), c:3 \(no such file\)"):
        wait_until_loaded(ledger, 7, 5.0, TTL_S, monotonic=time.monotonic, sleep=time.sleep)
    assert time.at == pytest.approx(5.0, abs=0.2)


def test_waiting_without_a_server_says_so(ledger: ReplicaLedger) -> None:
    time = Stepper()
    with pytest.raises(UnavailableError, match="no live server within 5 s: start one with `scion serve`"):
        wait_until_loaded(ledger, 7, 5.0, TTL_S, monotonic=time.monotonic, sleep=time.sleep)
