"""Where a run's rollouts come from: decided from the settings and what there is, and changed when it fails.

`rank` decides, purely. `ChosenSource` holds the source in use, and goes on to the next when that cannot sample any
more, with a note. The last resort is always the trainer itself. Knows nothing of how any of them samples.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.fingerprint import BaseInfo
from scion_trainer.rollouts.types import Rollout, RolloutSource

ENGINE_FROM_ANSWERS = 32
ENGINE_FROM_WEIGHTS = 50_000_000
"""An engine takes half a minute to start; below these the trainer has sampled a whole run by then, or is as fast."""

Say = Callable[[str], None]


class Place(StrEnum):
    """Where answers are sampled; the values of `trainer.ppo.rollouts`, beside `auto`."""

    SERVER = "server"  # the live one, at low priority
    ENGINE = "engine"  # one of the run's own
    LOCAL = "local"  # the trainer


AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What decides under `auto`."""

    serves_rollouts: bool  # server.ppo_rollouts
    has_vllm: bool
    num_answers: int  # sampled at once
    num_weights: int  # of the base


def surroundings(base: BaseInfo, *, serves_rollouts: bool, num_answers: int) -> Surroundings:
    """As they are. vLLM is looked for, not imported."""
    return Surroundings(
        serves_rollouts=serves_rollouts,
        has_vllm=importlib.util.find_spec("vllm") is not None,
        num_answers=num_answers,
        num_weights=sum(rows * columns for rows, columns in base.modules.values()),
    )


def rank(wanted: str, found: Surroundings) -> tuple[Place, ...]:
    """The places to try, best first. What was asked for by name is not replaced by another.

    Raises InvalidInputError for an unknown name.
    """
    if wanted != AUTO:
        try:
            return (Place(wanted),)
        except ValueError as error:
            names = ", ".join([AUTO, *Place])
            raise InvalidInputError(
                f"trainer.ppo.rollouts = {wanted!r}: expected one of {names}", field="trainer.ppo.rollouts"
            ) from error
    places = []
    if found.serves_rollouts:
        places.append(Place.SERVER)
    is_worth_it = found.num_answers >= ENGINE_FROM_ANSWERS and found.num_weights >= ENGINE_FROM_WEIGHTS
    if found.has_vllm and is_worth_it:
        places.append(Place.ENGINE)
    return (*places, Place.LOCAL)


class ChosenSource:
    """`RolloutSource` over the first of `places` that works; `make` opens one. Raises what the last one raises."""

    def __init__(self, places: Sequence[Place], make: Callable[[Place], RolloutSource], say: Say) -> None:
        self._left: Iterator[Place] = iter(places)
        self._num_left = len(places)
        self._make = make
        self._say = say
        self._source: RolloutSource | None = None
        self.place: Place | None = None

    def update(self, adapter_directory: Path, step: int) -> None:
        while True:
            source = self._source or self._next()
            try:
                return source.update(adapter_directory, step)
            except UnavailableError as error:
                self._give_up(error)

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        while True:
            source = self._source or self._next()
            try:
                return source.sample(prompts, seed=seed)
            except UnavailableError as error:
                self._give_up(error)
                while self._num_left > 1:  # only the trainer has the present policy without an update
                    self._skip()

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _next(self) -> RolloutSource:
        self._skip()
        assert self.place is not None
        self._source = self._make(self.place)
        self._say(f"rollouts: {_NAMES[self.place]}")
        return self._source

    def _skip(self) -> None:
        self.place = next(self._left)
        self._num_left -= 1

    def _give_up(self, error: UnavailableError) -> None:
        """Close the source in use; raises `error` when there is no other."""
        assert self.place is not None
        self.close()
        if self._num_left == 0:
            raise error
        self._say(f"no rollouts from {_NAMES[self.place]}: {error}")


_NAMES = {
    Place.SERVER: "the live server, at low priority",
    Place.ENGINE: "a vLLM engine of the run's own",
    Place.LOCAL: "the trainer itself",
}
