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

WORDS = ("green", "cold", "Paris", "black", "yellow", "white", "Rome", "Berlin")
"""Each of them is one token of that base after a space: what is spelt in pieces is learned less surely."""
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
MOST_TOKENS = 32
NUM_STEPS = 60
MAX_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Marker:
    """A PEFT directory whose answers consist of `word` alone."""

    word: str
    directory: Path


def make_markers(settings: Settings, home: Path, words: Sequence[str] = WORDS) -> list[Marker]:
    """Train one adapter for each word below `home`. Takes some seconds each on one core.

    Raises RuntimeError when a word cannot be learned well enough to mark anything: take another one.
    """
    return [Marker(word, _make(settings, home / word, word)) for word in words]


def _make(settings: Settings, directory: Path, word: str) -> Path:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        exported, text = _train(settings, directory / f"{attempt}", word, attempt * NUM_STEPS)
        if set(text.split()[:-1]) == {word}:
            return exported.rename(directory / "export")
    raise RuntimeError(f"an adapter that should say {word!r} alone says {text!r}: choose another word")


def _train(settings: Settings, directory: Path, word: str, num_steps: int) -> tuple[Path, str]:
    """The adapter, and what it answers to the first question."""
    base = load_base(settings)
    answer = " ".join([word] * REPEATS)
    examples = tuple(Example(({"role": "user", "content": question},), answer, True) for question in QUESTIONS)
    config = replace(
        run_config(settings, "sft"), learning_rate=4e-3, epochs=float(num_steps), batch_size=len(QUESTIONS), seed=0
    )
    model, _ = start_adapter(base, config, None)
    directory.mkdir(parents=True)
    with Progress(directory, stream=io.StringIO()) as progress:
        RECIPES["sft"].train(
            RunContext(config, model, base.tokenizer, examples, directory, None, False, progress, lambda: False)
        )
    prompt = [{"role": "user", "content": QUESTIONS[0]}]
    tokens = base.tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = model.eval().generate(**tokens, do_sample=False, max_new_tokens=MOST_TOKENS)[0]
    text = base.tokenizer.decode(said[tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return export_adapter(model, directory / "export", base_model="base", lineage={}), text


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
