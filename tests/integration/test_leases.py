"""Leases on both databases: one holder at a time, whatever the clock does."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from scion_adapters import leases, tables
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.leases import HeldLease, current_holder, release, try_acquire
from tests.helpers.rollouts import FakeClock

NAME = "run:chat"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(at=100.0)


def take(database: Database, holder: str, clock: FakeClock) -> bool:
    return try_acquire(database, NAME, holder, 10.0, clock)


def test_one_holds_it_until_it_expires(database: Database, clock: FakeClock) -> None:
    assert take(database, "a", clock)
    assert not take(database, "b", clock)
    clock.advance(9.9)
    assert not take(database, "b", clock)
    clock.advance(0.1)
    assert current_holder(database, NAME, clock) is None
    assert take(database, "b", clock)
    assert not take(database, "a", clock)  # a's renewal comes too late, and says so
    assert current_holder(database, NAME, clock) == "b"


def test_renewing_keeps_it(database: Database, clock: FakeClock) -> None:
    for _ in range(5):
        assert take(database, "a", clock)
        clock.advance(9)
    assert not take(database, "b", clock)


def test_releasing_gives_it_back_and_only_the_holder_can(database: Database, clock: FakeClock) -> None:
    take(database, "a", clock)
    assert not release(database, NAME, "b")
    assert not take(database, "b", clock)
    assert release(database, NAME, "a")
    assert take(database, "b", clock)


def test_names_do_not_touch_each_other(database: Database, clock: FakeClock) -> None:
    assert take(database, "a", clock)
    assert try_acquire(database, "controller", "b", 10.0, clock)


def test_a_clock_set_back_does_not_let_a_second_one_in(database: Database, clock: FakeClock) -> None:
    take(database, "a", clock)
    clock.advance(-3600)
    assert not take(database, "b", clock)
    assert take(database, "a", clock)  # the holder goes on, in the new time
    clock.advance(9)
    assert not take(database, "b", clock)
    clock.advance(1)
    assert take(database, "b", clock)  # and if it died, the lease is free as soon as it would have been


def test_a_clock_set_back_does_not_leave_the_lease_with_a_dead_holder(database: Database, clock: FakeClock) -> None:
    take(database, "a", clock)  # and dies
    clock.advance(-3600)
    assert not take(database, "b", clock)
    clock.advance(9.9)
    assert not try_acquire(database, NAME, "b", 1.0, clock)  # it is as long as its holder took it for
    clock.advance(0.1)
    assert take(database, "b", clock)


def test_of_many_that_contend_one_wins_each_round(database: Database, clock: FakeClock) -> None:
    names = [f"thread-{n}" for n in range(4)]
    rounds = 5
    won: list[list[str]] = [[] for _ in range(rounds)]
    barrier = threading.Barrier(len(names), timeout=30)

    def contend(name: str) -> None:
        for number in range(rounds):
            barrier.wait()
            if take(database, name, clock):
                won[number].append(name)
            if barrier.wait() == 0:
                clock.advance(10)  # everybody's lease has expired when the next round begins
            barrier.wait()

    threads = [threading.Thread(target=contend, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [len(winners) for winners in won] == [1] * rounds


def test_without_a_clock_the_databases_own_is_used(database: Database) -> None:
    assert try_acquire(database, NAME, "a", 3600.0)
    assert not try_acquire(database, NAME, "b", 3600.0)
    assert current_holder(database, NAME) == "a"
    assert try_acquire(database, NAME, "a", -1.0)
    assert current_holder(database, NAME) is None
    assert try_acquire(database, NAME, "b", 3600.0)


def expires_at(database: Database) -> float:
    with database.read() as connection:
        return float(connection.execute(sa.select(tables.leases.c.expires_at)).scalar_one())


# --- held -------------------------------------------------------------------------------------------------------------


def test_a_held_lease_is_released_at_the_end(database: Database) -> None:
    with HeldLease(database, NAME, "a") as lease:
        assert current_holder(database, NAME) == "a"
        with pytest.raises(ConflictError, match="run:chat is held by a"), HeldLease(database, NAME, "b"):
            pytest.fail("two hold it")
        assert not lease.lost.is_set()
    assert current_holder(database, NAME) is None


def test_a_held_lease_is_released_when_the_block_fails(database: Database) -> None:
    with pytest.raises(RuntimeError, match="the work failed"), HeldLease(database, NAME, "a"):
        raise RuntimeError("the work failed")
    assert current_holder(database, NAME) is None


def test_a_held_lease_is_renewed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = threading.Semaphore(0)
    acquire = leases.try_acquire

    def counting(*args: object, **kwargs: object) -> bool:
        try:
            return acquire(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            renewed.release()

    monkeypatch.setattr(leases, "try_acquire", counting)
    with HeldLease(database, NAME, "a", ttl_s=3.0) as lease:
        first = expires_at(database)
        for _ in range(2):  # taken, then renewed
            assert renewed.acquire(timeout=20)
        assert expires_at(database) > first
        assert not lease.lost.is_set()


def test_a_lease_that_another_took_is_lost(database: Database) -> None:
    with HeldLease(database, NAME, "a", ttl_s=0.3) as lease:
        with database.write() as connection:  # a was paused for longer than its lease
            connection.execute(sa.update(tables.leases).values(holder="b", expires_at=9e12))
        assert lease.lost.wait(20)
    assert current_holder(database, NAME) == "b"  # what is not ours is not released


def test_a_lease_that_cannot_be_renewed_in_time_is_lost(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with HeldLease(database, NAME, "a", ttl_s=0.3) as lease:

        def gone(*args: object) -> bool:
            raise UnavailableError("the database does not answer")

        monkeypatch.setattr(leases, "try_acquire", gone)
        assert lease.lost.wait(20)
