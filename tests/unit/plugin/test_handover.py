from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.helpers.waiting import until
from vllm_scion.handover import Handover


@dataclass
class Answer:
    number: int

    def __call__(self) -> int:
        return self.number


@dataclass
class Recorder:
    builds: list[Callable[[], Any]] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)

    def submit(self, build: Callable[[], Any]) -> bool:
        self.builds.append(build)
        return True

    def flush(self) -> None:
        self.flushed.append(len(self.builds))


async def test_answers_are_submitted_at_once_and_flushed_together() -> None:
    recorder = Recorder()
    handover = Handover(recorder)
    for number in range(3):
        handover.add(lambda number=number: Answer(number))  # type: ignore[misc]
    assert [build() for build in recorder.builds] == [0, 1, 2]
    assert not recorder.flushed, "a request does not wait for it"
    await until(lambda: recorder.flushed == [3])
    handover.add(lambda: Answer(3))
    await until(lambda: recorder.flushed == [3, 4])


def test_without_a_loop_nothing_waits() -> None:
    recorder = Recorder()
    Handover(recorder).add(lambda: Answer(1))
    assert recorder.flushed == [1]


def test_what_cannot_be_kept_is_told_to_the_recorder_and_the_rest_follows() -> None:
    def broken() -> Answer:
        raise KeyError("no such header")

    recorder = Recorder()
    handover = Handover(recorder)
    handover.add(broken)
    handover.add(lambda: Answer(2))
    first, second = recorder.builds
    with pytest.raises(ValueError, match="no such header"):
        first()
    assert second() == 2
