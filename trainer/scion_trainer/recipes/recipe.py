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
    from scion_feedback.selection import SnapshotRow


@dataclass(frozen=True, slots=True)
class Example:
    """One training example in TRL's prompt-completion form; `label` (liked) is None where a recipe does not use it."""

    prompt: tuple[dict[str, Any], ...]
    completion: str
    label: bool | None = None

    def to_row(self) -> dict[str, Any]:
        """The row of a `datasets.Dataset`."""
        row: dict[str, Any] = {
            "prompt": [{"role": message["role"], "content": message["content"]} for message in self.prompt],
            "completion": [{"role": "assistant", "content": self.completion}],
        }
        return row if self.label is None else {**row, "label": self.label}


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


class Recipe(Protocol):
    """A way to train. Recipes have no state of their own."""

    @property
    def name(self) -> str:
        """As in `scion train --recipe NAME`."""
        ...

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """The examples that training rows give, in their order; rows it has no use for are left out."""
        ...

    def check(self, examples: list[Example], config: RunConfig) -> None:
        """Raises InvalidInputError with the remedy when the examples are too few or too one-sided."""
        ...

    def train(self, context: RunContext) -> dict[str, Any]:
        """Train `context.model` in place and return metrics of its own. Raises RunInterruptedError when stopped."""
        ...
