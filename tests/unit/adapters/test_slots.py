"""A rollout that would not fit into the servers is refused with the numbers."""

from __future__ import annotations

import pytest

from scion_adapters.errors import ConflictError
from scion_adapters.records import VersionRef, VersionState
from scion_adapters.routing import AdapterRouting, Routing, ServedVersion
from scion_adapters.slots import check_slots
from tests.helpers.rollouts import make_replica

CHALLENGER = VersionRef("chat", 8)


def line(
    adapter: str, champion: int, *, previous: int | None, first_id: int, candidate: bool = False
) -> AdapterRouting:
    states = dict.fromkeys((champion, previous or champion, 4), VersionState.ACCEPTED)
    if candidate:
        states[9] = VersionState.CANDIDATE
    versions = {n: ServedVersion(n, first_id + n, "sha256:", state, "") for n, state in states.items()}
    aliases = {"champion": champion, "pinned": 4}
    return AdapterRouting(adapter, champion, None, previous, 0.0, None, aliases, versions)


def routing(*, candidate: bool = False) -> Routing:
    lines = [
        line("chat", 7, previous=6, first_id=100, candidate=candidate),
        line("code", 2, previous=None, first_id=200),
    ]
    return Routing(1, {one.adapter: one for one in lines})


# chat:7, chat:6, chat@pinned=4, code:2, code@pinned=4 and the challenger: 6, and a candidate, and one that drains.
def test_eight_places_are_enough() -> None:
    check_slots(routing(), CHALLENGER, 108, [make_replica(max_cpu_loras=8)])


def test_seven_are_not() -> None:
    with pytest.raises(
        ConflictError, match=r"chat:8 does not fit.* 6 versions .*8 in all, but small:1 has 7"
    ) as caught:
        check_slots(routing(), CHALLENGER, 108, [make_replica("big:1"), make_replica("small:1", max_cpu_loras=7)])
    assert "chat:4, chat:6, chat:7, chat:8, code:2, code:4" in str(caught.value)


def test_a_candidate_under_evaluation_takes_the_reserved_place() -> None:
    check_slots(routing(candidate=True), CHALLENGER, 108, [make_replica(max_cpu_loras=8)])


def test_a_batch_must_take_all_that_serve() -> None:
    check_slots(routing(), CHALLENGER, 108, [make_replica(max_loras=3)])  # chat:7, chat:8, code:2
    with pytest.raises(ConflictError, match=r"3 versions would serve users at once.*host:1 takes 2.*max_loras"):
        check_slots(routing(), CHALLENGER, 108, [make_replica(max_loras=2)])


def test_without_servers_nothing_is_known() -> None:
    check_slots(routing(), CHALLENGER, 108, [])
