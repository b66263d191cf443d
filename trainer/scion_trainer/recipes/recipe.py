"""What a recipe is: which rows of a snapshot it uses, and how it trains on them.

Owns the protocol and the record that a recipe is given. It imports no torch; recipes import it inside `train`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from scion_trainer.config import RunConfig
from scion_trainer.progress import Progress

if TYPE_CHECKING:
    from scion_adapters.fingerprint import BaseInfo
    from scion_adapters.registry import Registry
    from scion_adapters.settings import Settings
    from scion_feedback.selection import SnapshotRow


@dataclass(frozen=True, slots=True)
class Example:
    """One training example. `label` (liked) is None where a recipe does not use it.

    `rejected` makes it a pair: the answer to which `completion` is preferred. `raters` are the users behind it, where a
    recipe asks who: two for a pair that was made of two users' votes.
    """

    prompt: tuple[dict[str, Any], ...]
    completion: str
    label: bool | None = None
    rejected: str | None = None
    raters: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.completion,) if self.rejected is None else (self.completion, self.rejected)

    def to_row(self) -> dict[str, Any]:
        """The row of a `datasets.Dataset` in TRL's form: prompt and completion, or prompt, chosen and rejected."""
        row: dict[str, Any] = {
            "prompt": [{"role": message["role"], "content": message["content"]} for message in self.prompt]
        }
        if self.rejected is not None:
            return {**row, "chosen": _answer(self.completion), "rejected": _answer(self.rejected)}
        row["completion"] = _answer(self.completion)
        return row if self.label is None else {**row, "label": self.label}


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@dataclass(frozen=True, slots=True)
class RunContext:
    """All that a recipe needs. `model` is a PeftModel whose one adapter is trainable and equals the parent."""

    config: RunConfig
    model: Any
    tokenizer: Any
    examples: tuple[Example, ...]
    directory: Path  # the run's own; checkpoints lie in it
    resume_from: Path | None  # a complete checkpoint
    gradient_checkpointing: bool
    progress: Progress
    stop_requested: Callable[[], bool]
    heldout: tuple[Example, ...] = ()  # of users that no run learns from
    base: BaseInfo | None = None
    reward_model: Path | None = None  # the directory of one that passed its gate
    settings: Settings | None = None
    registry: Registry | None = None


class Recipe(Protocol):
    """A way to train. Recipes have no state of their own."""

    @property
    def name(self) -> str:
        """As in `scion train --recipe NAME`."""
        ...

    @property
    def makes_version(self) -> bool:
        """Whether the adapter that it trains is published as a version; else the run's directory holds its product."""
        ...

    @property
    def needs_reward_model(self) -> bool:
        """Whether it is given the reward model that its run began with; without one that passed its gate it refuses."""
        ...

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """The examples that training rows give, in their order; rows it has no use for are left out."""
        ...

    def check(self, examples: list[Example], config: RunConfig) -> None:
        """Raises InvalidInputError with the remedy when the examples are too few or too one-sided."""
        ...

    def train(self, context: RunContext) -> dict[str, Any]:
        """Train `context.model` in place and return metrics of its own. Raises RunInterruptedError when stopped.

        What stands under `lineage` in them goes into the version's `scion.json` instead.
        """
        ...
