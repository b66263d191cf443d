from __future__ import annotations

from collections import defaultdict

from vllm_scion.serving import Flight


def test_a_flight_lands_once() -> None:
    counts: defaultdict[int, int] = defaultdict(int)
    first, second = Flight(counts, 7), Flight(counts, 7)
    assert counts[7] == 2
    first.land()
    first.land()
    assert counts[7] == 1
    second.land()
    assert counts[7] == 0


def test_a_dropped_flight_lands_by_itself() -> None:
    counts: defaultdict[int, int] = defaultdict(int)
    flight = Flight(counts, 7)
    del flight
    assert counts[7] == 0
