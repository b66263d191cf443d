"""Somebody sets the clock by an hour, back or ahead, while a rollout by time runs: each step lasts as planned."""

from __future__ import annotations

import pytest

from scion_adapters import controller
from scion_adapters.database import Database
from scion_adapters.records import Rollout, RolloutState, VersionRef
from scion_adapters.rollouts import Rollouts
from scion_adapters.timekeeping import Timekeeper
from tests.helpers.rollouts import (
    FakeClock,
    add_version,
    lora_id_of,
    make_replica,
    report,
    write_completion,
)

TTL_S = 10.0
TICK_S = 0.5
HOUR_S = 3600.0


class World:
    """A server that looks twice a second. `clock` can be set; `real` is the time that passes."""

    def __init__(self, database: Database, **plan: float) -> None:
        self.database = database
        self.clock, self.real = FakeClock(), FakeClock(0.0)
        self.rollouts = Rollouts(database, self.clock, ttl_s=TTL_S)
        self.timekeeper = Timekeeper(self.real)
        for number in (1, 2):
            add_version(database, number)
        self.rollouts.start(VersionRef("chat", 1), steps=(1.0,), actor="ann")
        self.rollouts.promote("chat", actor="ann")
        self.rollouts.start(VersionRef("chat", 2), steps=(0.1, 0.5, 1.0), actor="ann", **plan)  # type: ignore[arg-type]
        self.tick()

    @property
    def rollout(self) -> Rollout:
        return self.rollouts.list("chat")[0]

    def tick(self) -> None:
        loaded = {lora_id_of("chat", 1), lora_id_of("chat", 2)}
        report(self.database, make_replica("a:1", loaded=loaded, heartbeat_at=self.clock()))
        controller.tick(self.database, self.clock, heartbeat_ttl_s=TTL_S, timekeeper=self.timekeeper)

    def live_for(self, seconds: float) -> None:
        for _ in range(round(seconds / TICK_S)):
            self.clock.advance(TICK_S)
            self.real.advance(TICK_S)
            self.tick()

    def steps_last(self) -> list[float]:
        """How long each step from now on takes, in real seconds."""
        durations = []
        while self.rollout.state is RolloutState.PROGRESSING:
            began, step = self.real(), self.rollout.step
            while (self.rollout.state, self.rollout.step) == (RolloutState.PROGRESSING, step):
                self.live_for(TICK_S)
                assert self.real() < 500, f"step {step} stands still"
            durations.append(self.real() - began)
        return durations


@pytest.mark.parametrize("set_by_s", [-HOUR_S, HOUR_S, -15.0, 15.0])
@pytest.mark.parametrize("after_s", [0.0, 12.0, 25.0])
def test_steps_last_as_long_as_planned(database: Database, set_by_s: float, after_s: float) -> None:
    world = World(database, every_s=20.0)
    world.live_for(after_s)
    world.clock.advance(set_by_s)
    durations = world.steps_last()
    rest = 20 - after_s % 20
    assert durations == pytest.approx([rest, 20, 20] if after_s < 20 else [rest, 20], abs=TICK_S)


def test_back_and_ahead_again(database: Database) -> None:
    world = World(database, every_s=20.0)
    world.live_for(5)
    world.clock.advance(-HOUR_S)
    world.live_for(5)
    world.clock.advance(HOUR_S)
    assert world.steps_last() == pytest.approx([10, 20, 20], abs=TICK_S)


def test_what_began_by_the_new_clock_is_left_alone(database: Database) -> None:
    world = World(database, every_s=20.0)
    world.live_for(12)
    world.rollouts.pause("chat", actor="ann")
    world.clock.advance(-HOUR_S)
    world.rollouts.resume("chat", actor="ann")  # its step begins anew, before the controller looks
    assert world.steps_last() == pytest.approx([20, 20, 20], abs=TICK_S)


def test_a_controller_that_knows_no_earlier_time_lets_the_step_begin_anew(database: Database) -> None:
    world = World(database, every_s=20.0)
    world.live_for(12)
    world.clock.advance(-HOUR_S)
    world.timekeeper = Timekeeper(world.real)  # another server took over
    assert world.steps_last() == pytest.approx([20, 20, 20], abs=TICK_S)


def test_the_guard_sees_votes_on_answers_from_before_the_rollout_by_the_clock(database: Database) -> None:
    world = World(database, every_s=20.0)
    world.live_for(1)
    world.clock.advance(-HOUR_S)
    with database.write() as connection:
        for user in range(60):
            for number, liked in ((1, 1.0), (2, 0.0)):
                write_completion(
                    connection, number, rollout_id=world.rollout.id, at=world.clock(), user=f"u{number}-{user}",
                    vote=liked,
                )  # fmt: skip
    world.live_for(TICK_S)
    assert world.rollout.state is RolloutState.ABORTED
