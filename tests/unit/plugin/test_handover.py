from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.helpers.waiting import until
from vllm_scion.handover import AT_ONCE, Handover


@dataclass
class Answer:
    number: int

    def __call__(self) -> int:
        return self.number


class Recorder:
    def __init__(self) -> None:
        self.builds: list[Callable[[], Any]] = []

    def submit(self, build: Callable[[], Any]) -> bool:
        self.builds.append(build)
        return True

    @property
    def numbers(self) -> list[int]:
        return [build() for build in self.builds]


async def test_answers_are_gathered_and_handed_over_in_order() -> None:
    recorder = Recorder()
    handover = Handover(recorder.submit)
    for number in range(3):
        handover.add(lambda number=number: Answer(number))  # type: ignore[misc]
    await asyncio.sleep(0)
    assert recorder.numbers == [], "not between two requests"
    await until(lambda: recorder.numbers == [0, 1, 2])
    handover.add(lambda: Answer(3))
    await until(lambda: recorder.numbers == [0, 1, 2, 3])


async def test_requests_get_their_turn_in_between() -> None:
    recorder = Recorder()
    handover = Handover(recorder.submit)
    for number in range(3 * AT_ONCE):
        handover.add(lambda number=number: Answer(number))  # type: ignore[misc]
    seen: list[int] = []

    def look() -> bool:
        seen.append(len(recorder.builds))
        return seen[-1] == 3 * AT_ONCE

    await until(look, poll_s=0.0)
    assert {AT_ONCE, 2 * AT_ONCE} <= set(seen)


def test_without_a_loop_nothing_waits() -> None:
    recorder = Recorder()
    Handover(recorder.submit).add(lambda: Answer(1))
    assert recorder.numbers == [1]


def test_what_cannot_be_kept_is_told_to_the_recorder_and_the_rest_follows() -> None:
    def broken() -> Answer:
        raise KeyError("no such header")

    recorder = Recorder()
    handover = Handover(recorder.submit)
    handover.add(broken)
    handover.add(lambda: Answer(2))
    first, second = recorder.builds
    with pytest.raises(ValueError, match="no such header"):
        first()
    assert second() == 2
