from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from scion_adapters.records import VersionRef
from tests.helpers.engine import FakeStore, FakeTable
from tests.helpers.routing import make_line, make_routing
from vllm_scion.loader import Failure, Loader, WantedVersion, plan, wanted_versions
from vllm_scion.metrics import Metrics
from vllm_scion.serving import Flight, Serving


def want(*lora_ids: int) -> tuple[WantedVersion, ...]:
    return tuple(WantedVersion(VersionRef("chat", i), i, f"sha256:{i}") for i in lora_ids)


@pytest.mark.parametrize(
    ("wanted", "loaded", "in_flight", "failures", "load", "unload", "refused"),
    [
        # nothing to do
        (want(1, 2), {1, 2}, {}, {}, (), (), ()),
        # load what is missing
        (want(1, 2), {1}, {}, {}, (2,), (), ()),
        # unload what nobody wants
        (want(1), {1, 2}, {}, {}, (), (2,), ()),
        # not while it is still answering
        (want(1), {1, 2}, {2: 1}, {}, (), (), ()),
        # a drained one makes room in the same step
        (want(1, 4), {1, 2, 3}, {3: 1}, {}, (4,), (2,), ()),
        # a draining one does not
        (want(1, 4), {1, 2, 3}, {2: 1, 3: 1}, {}, (), (), (4,)),
        # the most wanted get the places
        (want(4, 5, 6, 7), set(), {}, {}, (4, 5, 6), (), (7,)),
        # a failed load waits for its time
        (want(1), set(), {}, {1: Failure("gone", 1, retry_at=10.1)}, (), (), ()),
        (want(1), set(), {}, {1: Failure("gone", 1, retry_at=10.0)}, (1,), (), ()),
        # and keeps its place meanwhile
        (want(1, 2, 3, 4), set(), {}, {1: Failure("gone", 1, retry_at=99.0)}, (2, 3), (), (4,)),
    ],
)
def test_plan(
    wanted: tuple[WantedVersion, ...],
    loaded: set[int],
    in_flight: dict[int, int],
    failures: dict[int, Failure],
    load: tuple[int, ...],
    unload: tuple[int, ...],
    refused: tuple[int, ...],
) -> None:
    decided = plan(wanted, loaded, in_flight, failures, slots=3, now=10.0)
    assert tuple(v.lora_id for v in decided.load) == load
    assert decided.unload == unload
    assert tuple(decided.refused) == refused


def test_a_refusal_says_what_is_short_and_what_to_do() -> None:
    decided = plan(want(4), {1, 2, 3}, {1: 1, 2: 2, 3: 1}, {}, slots=3, now=0.0)
    assert decided.refused[4] == (
        "no free slot: all 3 (server.max_cpu_loras) are taken, 3 of them still answering; raise it and restart"
    )


def test_champions_come_first_when_slots_are_short() -> None:
    chat = make_line(
        "chat", accepted={1: 11, 2: 12, 3: 13, 4: 14}, champion=3, previous=2, challenger=4, aliases={"x": 1}
    )
    code = make_line("code", accepted={1: 15}, champion=1)
    order = [str(v.ref) for v in wanted_versions(make_routing(chat, code))]
    assert order == ["chat:3", "code:1", "chat:2", "chat:4", "chat:1"]


class World:
    """A loader with fakes around it and a clock of its own."""

    def __init__(self, slots: int = 4) -> None:
        self.table = FakeTable()
        self.store = FakeStore()
        self.serving = Serving()
        self.metrics = Metrics(CollectorRegistry())
        self.now = 100.0

        async def run(work: Callable[[], str]) -> str:
            return work()

        self.loader = Loader(
            self.table, self.store, self.serving, self.metrics, run, slots=slots, monotonic=lambda: self.now
        )

    @property
    def resident(self) -> frozenset[int]:
        return self.serving.published.resident


async def test_a_version_gets_traffic_only_once_it_is_loaded() -> None:
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=1)))
    assert world.resident == frozenset()  # known, not loaded
    assert await world.loader.step()
    assert world.resident == {11}
    assert world.table.calls == ["load chat:1 11 /store/chat-1"]
    assert world.table.keys == {world.serving.published.names[11]: 11}
    assert world.loader.is_settled
    assert not await world.loader.step()


async def test_nobody_can_guess_the_name_in_vllms_table() -> None:
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=1)))
    await world.loader.step()
    (key,) = world.table.keys
    assert key.startswith("chat:1#")
    assert len(key) >= len("chat:1#") + 16


async def test_a_version_is_unloaded_only_after_its_last_request() -> None:
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=1)))
    await world.loader.step()
    flight = Flight(world.serving.in_flight, 11)

    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=2), revision=2))
    assert world.resident == frozenset()  # no new request can take it
    await world.loader.step()
    assert world.resident == {12}
    assert 11 in world.table.keys.values()  # but the running one still finds it
    assert not world.loader.is_settled

    flight.land()
    assert await world.loader.step()
    assert world.table.calls[-1] == "unload 11"
    assert set(world.loader.loaded) == {12}


async def test_a_version_that_is_wanted_again_while_draining_stays() -> None:
    world = World()
    first = make_routing(make_line(accepted={1: 11, 2: 12}, champion=1))
    world.loader.follow(first)
    await world.loader.step()
    flight = Flight(world.serving.in_flight, 11)
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=2)))
    await world.loader.step()
    world.loader.follow(first)  # rolled back: nothing to load
    assert world.resident == {11}
    flight.land()
    await world.loader.step()
    assert [call for call in world.table.calls if "11" in call] == ["load chat:1 11 /store/chat-1"]


@pytest.mark.parametrize("breakage", ["engine", "store"])
async def test_a_failed_load_is_reported_and_retried_with_back_off(breakage: str) -> None:
    world = World()
    world.table.fail = {11} if breakage == "engine" else set()
    world.store.bad = {"sha256:chat-1"} if breakage == "store" else set()
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=2, previous=1)))
    assert await world.loader.step()
    assert world.resident == {12}  # the others are not held up
    assert ("no" if breakage == "engine" else "altered") in world.loader.failures[11].reason

    world.now += 0.5
    assert not await world.loader.step()  # too early
    world.now += 0.5
    await world.loader.step()
    assert world.loader.failures[11].attempts == 2
    assert world.loader.failures[11].retry_at == world.now + 2.0

    world.table.fail, world.store.bad = set(), set()  # mended
    world.now += 2.0
    assert await world.loader.step()
    assert world.resident == {11, 12}
    assert world.loader.is_settled


async def test_a_failure_that_nobody_wants_any_more_is_forgotten() -> None:
    world = World()
    world.table.fail = {11}
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=1)))
    await world.loader.step()
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=0)))
    assert await world.loader.step()
    assert world.loader.failures == {}


async def test_routing_changes_do_not_wait_for_a_slow_load() -> None:
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=1)))
    await world.loader.step()
    world.table.hold = asyncio.Event()
    both = make_line(accepted={1: 11, 2: 12}, champion=1, challenger=2)
    world.loader.follow(make_routing(both))
    slow = asyncio.create_task(world.loader.step())
    await asyncio.sleep(0)
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=0), revision=5))
    assert world.serving.published.routing.revision == 5
    world.table.hold.set()
    await slow
    assert world.resident == frozenset()  # what finished loading meanwhile is not wanted any more
    await world.loader.step()
    assert world.table.keys == {}


async def test_one_asked_for_during_another_unload_is_kept() -> None:
    """Two versions leave in one step; while the first is being removed, a rollback asks for the second again."""
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=1, previous=2)))
    await world.loader.step()
    removed: list[int] = []
    original = world.table.remove

    async def remove(*, lora_id: int) -> None:
        removed.append(lora_id)
        world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=2), revision=3))
        await original(lora_id=lora_id)

    world.table.remove = remove  # type: ignore[method-assign]
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}), revision=2))
    await world.loader.step()
    assert removed == [11]
    assert world.resident == {12}


async def test_an_engine_that_cannot_remove_does_not_stop_the_loader() -> None:
    world = World()
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=1)))
    await world.loader.step()

    async def remove(**_: Any) -> None:
        raise RuntimeError("engine is busy")

    world.table.remove = remove  # type: ignore[method-assign]
    world.loader.follow(make_routing(make_line(accepted={1: 11})))
    assert await world.loader.step()
    assert world.loader.is_settled


async def test_a_version_stays_in_an_engine_that_others_use_it_in() -> None:
    world = World()
    others = {11}

    async def may_remove(lora_id: int) -> bool:
        return lora_id not in others

    world.loader.may_remove = may_remove
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=1, previous=2)))
    await world.loader.step()
    world.loader.follow(make_routing(make_line(accepted={1: 11, 2: 12}, champion=2), revision=2))
    assert await world.loader.step()
    assert set(world.table.keys.values()) == {12}  # requests of this process do not find it
    assert world.loader.leaving.keys() == {11}
    assert not world.loader.is_settled
    assert "unload 11" not in world.table.calls

    assert not await world.loader.step()
    others.clear()
    assert await world.loader.step()
    assert world.table.calls[-1] == "unload 11"
    assert world.loader.is_settled


async def test_a_version_that_is_wanted_again_before_it_was_removed_is_loaded_again() -> None:
    world = World()

    async def may_remove(_: int) -> bool:
        return False

    world.loader.may_remove = may_remove
    first = make_routing(make_line(accepted={1: 11}, champion=1))
    world.loader.follow(first)
    await world.loader.step()
    world.loader.follow(make_routing(make_line(accepted={1: 11}, champion=0), revision=2))
    await world.loader.step()
    world.loader.follow(first)
    await world.loader.step()
    assert world.resident == {11}
    assert world.loader.leaving == {}
    assert "unload 11" not in world.table.calls
