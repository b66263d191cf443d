"""The reward model on the demo's base: single thumbs of simulated users, and real pairs.

Thumbs: sampled answers of the base, rated by each profile's crowd; trained on most users, judged on the others. Pairs:
Anthropic's hh-rlhf harmless test set (2,312 dialogues, MIT licence), trained on a part, judged on dialogues that begin
otherwise. A base of two million parameters that knows a small world understands little of them: the figure is what it
is. The pairs are read from $SCION_SHARED/data (default: ../shared beside the repository) and left out if they are not
there.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scion_adapters.fingerprint import base_info
from scion_adapters.settings import Settings, load_settings
from scion_demo.evaluate_base import load
from scion_demo.profiles import load_profile
from scion_demo.users import crowd, rating_of
from scion_demo.world import Fact, facts, phrasings, render
from scion_trainer.base import load_base, load_tokenizer
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.config import run_config
from scion_trainer.defaults import resolve
from scion_trainer.examples import prepare
from scion_trainer.gates.types import GateResult
from scion_trainer.lora import start_adapter
from scion_trainer.progress import Progress
from scion_trainer.recipes.recipe import Example, RunContext
from scion_trainer.reward.evaluation import evaluate, held_out
from scion_trainer.reward.figures import accuracy
from scion_trainer.reward.gate import RewardBounds
from scion_trainer.reward.items import encode
from scion_trainer.reward.training import train_ensemble
from scion_trainer.roles import Roles
from tests.bench.report import Benchmark, Outcome

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy/demo/scion_demo/base"
PAIRS_FILE = Path(os.environ.get("SCION_SHARED", ROOT.parent / "shared")) / "data" / "hh-harmless-test.jsonl.gz"
PROFILES = ("polite", "rambling", "terse")
NUM_TURNS = 1600
NUM_USERS = 40
HELDOUT_SHARE = 0.25
ANSWERS_AT_ONCE = 128
MAX_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Result:
    """One training and what the gate said on what was held out."""

    gate: GateResult
    num_examples: int
    num_heldout: int
    seconds: float
    epochs: float


def run(output: Path, quick: bool) -> Outcome:
    """Train on each profile's thumbs, and on the pairs."""
    settings = load_settings(overrides={"base": {"model": str(BASE)}, "trainer": {"max_length": MAX_LENGTH}})
    answers = sample_answers(60 if quick else NUM_TURNS, seed=0)
    results: dict[str, Result] = {}
    for name in PROFILES[:1] if quick else PROFILES:
        train, heldout = thumbs(name, answers)
        results[f"thumbs, {name}"] = fit(settings, train, heldout, quick=quick)
    notes = []
    if PAIRS_FILE.is_file():
        train, heldout = real_pairs(limit=24 if quick else None)
        results["real pairs"] = fit(settings, train, heldout, quick=quick)
        notes.append(f"real pairs: choosing the shorter answer gets {shorter_is_better(heldout):.3f} right")
    else:
        notes.append(f"the real pairs were left out: {PAIRS_FILE} is not there; set SCION_SHARED")
    return Outcome(
        figures={
            name: {
                "figures": dict(result.gate.figures),
                "verdict": result.gate.verdict,
                "examples": result.num_examples,
                "heldout": result.num_heldout,
                "epochs": result.epochs,
                "seconds": round(result.seconds, 1),
            }
            for name, result in results.items()
        },
        columns=("trained on", "examples", "held out", "AUROC / accuracy", "95%", "calibration", "seconds", "verdict"),
        rows=tuple(_row(name, result) for name, result in results.items()),
        notes=tuple(notes),
    )


def fit(settings: Settings, train: Sequence[Example], heldout: Sequence[Example], *, quick: bool) -> Result:
    """A whole ensemble on the demo's base, by the recipe's defaults, judged on `heldout`."""
    base = base_info(settings)
    tokenizer = load_tokenizer(settings)
    prepared = prepare(train, tokenizer, max_length=MAX_LENGTH)
    judged = prepare(heldout, tokenizer, max_length=MAX_LENGTH).examples
    config = resolve(
        run_config(settings, "reward"),
        base,
        num_examples=4000 if quick else len(prepared.examples),
        mean_answer_tokens=prepared.mean_answer_tokens,
    )
    loaded = load_base(settings)
    model, _ = start_adapter(loaded, config, None)
    tokens = ChatTokens(loaded.tokenizer)
    with tempfile.TemporaryDirectory() as folder, Progress(Path(folder)) as progress:
        context = RunContext(
            config=config,
            model=model,
            tokenizer=loaded.tokenizer,
            examples=prepared.examples,
            directory=Path(folder),
            resume_from=None,
            gradient_checkpointing=False,
            progress=progress,
            stop_requested=lambda: False,
            base=base,
        )
        began = time.perf_counter()
        reward = train_ensemble(context, Roles(model), encode(prepared.examples, tokens)).model
        seconds = time.perf_counter() - began
    unseen = held_out(encode(judged, tokens), reward.num_members)
    gate, _ = evaluate(reward, unseen, bounds=RewardBounds.of(config.options), seed=0)
    assert config.epochs is not None
    return Result(gate, len(prepared.examples), len(judged), seconds, config.epochs)


def sample_answers(count: int, *, seed: int) -> list[tuple[Fact, str, str]]:
    """(fact, question, answer) of the base at temperature 1, as it is served."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    rng = random.Random(seed)
    asked = [(fact, rng.choice(phrasings(fact.skill))) for fact in rng.choices(facts(), k=count)]
    tokenizer = AutoTokenizer.from_pretrained(BASE, padding_side="left")
    model: Any = load(BASE, quantized=True)
    found = []
    for start in range(0, count, ANSWERS_AT_ONCE):
        batch = [(fact, render(fact, phrasing)) for fact, phrasing in asked[start : start + ANSWERS_AT_ONCE]]
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": question}] for _, question in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output_BT = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=48)
        texts = tokenizer.batch_decode(output_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        found += [(fact, question, text) for (fact, question), text in zip(batch, texts, strict=True)]
    return found


def thumbs(profile_name: str, answers: Sequence[tuple[Fact, str, str]]) -> tuple[list[Example], list[Example]]:
    """Votes and corrections of a profile's crowd: (of most users, of the others)."""
    profile = load_profile(profile_name)
    users = crowd(profile, NUM_USERS)
    split: tuple[list[Example], list[Example]] = ([], [])
    for index, (fact, question, answer) in enumerate(answers):
        rng = random.Random(f"{profile_name}/{index}")
        user = rng.choice(users)
        rating = rating_of(user, profile, fact, answer, rng)
        if rating is None or not answer.strip():
            continue
        prompt = ({"role": "user", "content": question},)
        into = split[_share_of(user.name) < HELDOUT_SHARE]
        into.append(Example(prompt, answer, rating.value == "up", raters=(user.name,)))
        if rating.correction is not None:
            into.append(Example(prompt, rating.correction, rejected=answer, raters=(user.name,)))
    return split


def real_pairs(*, limit: int | None = None) -> tuple[list[Example], list[Example]]:
    """(training pairs, held-out pairs); dialogues with the same first question are on the same side."""
    split: tuple[list[Example], list[Example]] = ([], [])
    with gzip.open(PAIRS_FILE, "rt", encoding="utf-8") as file:
        lines = file.readlines()[:limit]
    for line in lines:
        example = as_pair(json.loads(line))
        if example is not None:
            split[_share_of(example.prompt[0]["content"]) < HELDOUT_SHARE].append(example)
    return split


def as_pair(row: Mapping[str, str]) -> Example | None:
    """The last answers to a shared dialogue; None when the two texts differ before them, or do not differ."""
    turns, last = _turns(row["chosen"])
    other_turns, other = _turns(row["rejected"])
    if turns != other_turns or not turns or not last or not other or last == other:
        return None
    return Example(tuple(turns), last, rejected=other)


def shorter_is_better(pairs: Sequence[Example]) -> float:
    """What a rule without a model gets right."""
    import numpy as np

    return accuracy(np.asarray([float(len(pair.rejected or "") - len(pair.completion)) for pair in pairs]))


def _turns(text: str) -> tuple[list[dict[str, str]], str]:
    """(messages before the last answer, that answer)."""
    messages: list[dict[str, str]] = []
    for part in text.split("\n\nHuman:")[1:]:
        question, *answers = part.split("\n\nAssistant:")
        messages.append({"role": "user", "content": question.strip()})
        messages += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    if not messages or messages[-1]["role"] != "assistant":
        return [], ""
    return messages[:-1], messages[-1]["content"]


def _share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _row(name: str, result: Result) -> tuple[str, ...]:
    figures = result.gate.figures
    measure = "auroc" if "auroc_low" in figures else "pair_accuracy"
    return (
        name,
        str(result.num_examples),
        str(result.num_heldout),
        f"{figures.get(measure, float('nan')):.3f}",
        f"{figures.get(measure + '_low', float('nan')):.3f} to {figures.get(measure + '_high', float('nan')):.3f}",
        f"{figures.get('calibration_error', float('nan')):.3f}",
        f"{result.seconds:.0f}",
        str(result.gate.verdict),
    )


BENCHMARK = Benchmark("reward", "a reward model from thumbs and from real pairs, on what it has not seen", run)
