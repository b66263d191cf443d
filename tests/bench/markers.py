"""Marker adapters: each answers every question with one word, again and again, so that an answer tells who gave it.

Trained with the project's own SFT recipe, in seconds; the words are ones that the demo's base knows.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scion_adapters.settings import Settings
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.lora import export_adapter, start_adapter
from scion_trainer.progress import Progress
from scion_trainer.recipes import RECIPES, RunContext
from scion_trainer.recipes.recipe import Example

WORDS = ("green", "cold", "Paris", "twelve", "yellow", "night", "Rome", "seven")
QUESTIONS = (
    "What is the capital of France?",
    "What colour is grass?",
    "What is the opposite of hot?",
    "How much is 3 plus 4?",
    "Tell me something.",
    "Paris is",
    "User 7 says",
    "And then?",
)
REPEATS = 12
NUM_STEPS = 60


@dataclass(frozen=True, slots=True)
class Marker:
    """A PEFT directory whose answers consist of `word` alone."""

    word: str
    directory: Path


def make_markers(settings: Settings, home: Path, words: Sequence[str] = WORDS) -> list[Marker]:
    """Train one adapter for each word below `home`. Takes some seconds each on one core."""
    return [Marker(word, _train(settings, home / word, word)) for word in words]


def _train(settings: Settings, directory: Path, word: str) -> Path:
    base = load_base(settings)
    answer = " ".join([word] * REPEATS)
    examples = tuple(Example(({"role": "user", "content": question},), answer, True) for question in QUESTIONS)
    config = replace(
        run_config(settings, "sft"), learning_rate=4e-3, epochs=float(NUM_STEPS), batch_size=len(QUESTIONS), seed=0
    )
    model, _ = start_adapter(base, config, None)
    directory.mkdir(parents=True)
    with Progress(directory, stream=io.StringIO()) as progress:
        RECIPES["sft"].train(
            RunContext(config, model, base.tokenizer, examples, directory, None, False, progress, lambda: False)
        )
    return export_adapter(model, directory / "export", base_model="base", lineage={})


def main() -> None:
    """`python -m tests.bench.markers CONFIG HOME WORD…`: in a process of its own, so that torch leaves with it."""
    import sys

    import torch

    from scion_adapters.settings import load_settings

    config, home, *words = sys.argv[1:]
    torch.set_num_threads(2)
    make_markers(load_settings(config), Path(home), words)


if __name__ == "__main__":
    main()
