"""Where rollouts come from: the order under `auto`, what is asked for by name, and going on when a source fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError, RejectedError, UnavailableError
from scion_trainer.rollouts.choice import ChosenSource, Place, Surroundings, rank
from scion_trainer.rollouts.types import Rollout, RolloutSource

LARGE = Surroundings(serves_rollouts=True, has_vllm=True, num_answers=64, num_weights=8_000_000_000)


@pytest.mark.parametrize(
    ("wanted", "found", "expected"),
    [
        ("auto", LARGE, "server engine local"),
        ("auto", Surroundings(False, True, 64, 8_000_000_000), "engine local"),  # the server is not for rollouts
        ("auto", Surroundings(False, False, 64, 8_000_000_000), "local"),  # vLLM is not installed
        ("auto", Surroundings(False, True, 8, 8_000_000_000), "local"),  # too few at once for vLLM
        ("auto", Surroundings(False, True, 64, 2_000_000), "local"),  # done before an engine has started
        ("server", Surroundings(False, False, 1, 1), "server"),  # asked for by name: not replaced
        ("engine", Surroundings(False, False, 1, 1), "engine"),
        ("local", LARGE, "local"),
    ],
)
def test_the_places_to_try(wanted: str, found: Surroundings, expected: str) -> None:
    assert [place.value for place in rank(wanted, found)] == expected.split()


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="auto, server, engine, local"):
        rank("cloud", LARGE)


@dataclass
class FakeSource:
    fails_at: str = ""  # "update" or "sample"
    error: Exception = field(default_factory=lambda: UnavailableError("it is away"))
    updates: list[int] = field(default_factory=list)
    closed: int = 0

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        if self.fails_at == "sample":
            raise self.error
        return [Rollout(tuple(prompt), (1,), (-1.0,), True) for prompt in prompts]

    def update(self, adapter_directory: Path, step: int) -> None:
        if self.fails_at == "update":
            raise self.error
        self.updates.append(step)

    def close(self) -> None:
        self.closed += 1


def chosen(**sources: FakeSource) -> tuple[ChosenSource, list[str]]:
    said: list[str] = []

    def make(place: Place) -> RolloutSource:
        return sources[place.value]

    return ChosenSource([Place(name) for name in sources], make, said.append), said


def test_the_first_place_that_works_is_used_and_the_note_says_why_not_another() -> None:
    server, local = FakeSource(fails_at="update"), FakeSource()
    source, said = chosen(server=server, local=local)
    source.update(Path("a"), 0)
    assert len(source.sample([[1]], seed=0)) == 1
    assert (server.closed, local.updates, source.place) == (1, [0], Place.LOCAL)
    assert said == [
        "rollouts: the live server, at low priority",
        "no rollouts from the live server, at low priority: it is away",
        "rollouts: the trainer itself",
    ]
    source.close()
    assert local.closed == 1


def test_a_place_that_fails_in_the_middle_leaves_it_to_the_trainer_which_has_the_present_policy() -> None:
    server, engine, local = FakeSource(fails_at="sample"), FakeSource(), FakeSource()
    source, _ = chosen(server=server, engine=engine, local=local)
    source.update(Path("a"), 3)
    assert source.sample([[1], [2]], seed=0)[1].prompt_ids == (2,)
    assert (source.place, server.closed, engine.closed, engine.updates) == (Place.LOCAL, 1, 0, [])
    source.update(Path("b"), 4)
    assert local.updates == [4]


@pytest.mark.parametrize("fails_at", ["update", "sample"])
def test_without_another_place_the_failure_is_the_caller_s(fails_at: str) -> None:
    engine = FakeSource(fails_at=fails_at)
    source, said = chosen(engine=engine)

    def step() -> None:
        source.update(Path("a"), 0)
        source.sample([[1]], seed=0)

    with pytest.raises(UnavailableError, match="away"):
        step()
    assert engine.closed == 1
    assert len(said) == 1


def test_an_unsound_adapter_is_no_reason_to_look_elsewhere() -> None:
    server = FakeSource("update", RejectedError("it holds NaN", reason="non_finite"))
    source, _ = chosen(server=server, local=FakeSource())
    with pytest.raises(RejectedError):
        source.update(Path("a"), 0)


def test_closing_twice_or_before_anything_happened_is_no_error() -> None:
    source, said = chosen(local=FakeSource())
    source.close()
    source.close()
    assert said == []
