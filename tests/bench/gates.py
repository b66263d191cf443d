"""Do the gates catch what they claim? For each a candidate that only it should reject, and a good one that all pass.

Real adapters on the demo's base in NF4, trained here for seconds, one world and one set of candidates for every seed,
judged by the gates as evaluation runs them. No vLLM: models answer in this process (gates_server.py), and the candidate
of the parity gate is read with a quarter of its alpha; between vLLM and the trainer parity is measured in
tests/e2e/test_parity.py. The judge of the win rate is simulated.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from scion_adapters.errors import RejectedError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Version, VersionState
from scion_adapters.settings import Settings
from scion_trainer.answer_memory import RememberingServer
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.gates import GATES
from scion_trainer.gates.types import EarlierHoldout, GateContext, GateResult, Models, Verdict
from scion_trainer.parity import record_parity
from tests.bench.gates_world import Ratings, SimulatedJudge, lessons, ratings, red_team_suite, retention
from tests.bench.report import Bar, Benchmark, Outcome
from tests.helpers.serving import DEMO_BASE
from vllm_scion.serve import available_cores

NUM_SEEDS = 20
GOOD = "good"
TRAINED = (
    GOOD,
    "retention",
    "retention freely",
    "forgetting",
    "heldout users",
    "heldout newest",
    "behaviour",
    "drift",
    "winrate",
    "sycophancy",
    "red_team",
)
DERIVED = ("artifact", "kl", "parity", "baseline")
"""Made of the good candidate's adapter."""
SPOILED = (*DERIVED, *TRAINED[1:])
MARGIN = 0.1
"""By how much training must beat examples in the prompt, in this benchmark: nats per token."""
MISREAD = 0.25
"""The server of the parity gate's candidate takes its alpha for this much of what the trainer meant."""
REPEATED = 0.2
"""The rise of repeated answers that is allowed here: the base's own small sums repeat already."""
WEAKENED = 0.05
"""The candidate that a prompt beats is the good one with its effect cut to this."""
NUM_PROMPTS = 80
"""Of which 20 are not opposites: with the default of 64 chance once hid a candidate that is wrong in those."""
SUITE = "suite.jsonl"
LEARNING_RATE, NUM_STEPS, BATCH_SIZE, RANK = 3e-3, 100, 32, 16
LONG = ("drift", "sycophancy")
"""Take twice the steps: to tell large sums from small ones, or a question that is pressed from one that is not, is hard
for a base of this size."""


def gate_of(kind: str) -> str:
    """The gate that should reject a candidate of that kind."""
    return kind.split()[0]


@dataclass(frozen=True, slots=True)
class Judged:
    """One candidate of one seed: which gates rejected it, and what all of them said."""

    kind: str
    seed: int
    results: tuple[GateResult, ...]

    @property
    def rejected_by(self) -> tuple[str, ...]:
        return tuple(result.name for result in self.results if result.verdict is Verdict.FAIL)


def run(output: Path, quick: bool) -> Outcome:
    """`quick`: one seed, and only what is made of the good candidate. A process for each core, a thread in each."""
    seeds = range(1 if quick else NUM_SEEDS)
    judge = partial(_judge_in_a_folder, trained=TRAINED[:1] if quick else TRAINED)
    judged: list[Judged] = []
    spawning = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(len(seeds), len(available_cores())), mp_context=spawning) as workers:
        for done, of_seed in enumerate(workers.map(judge, seeds), start=1):
            judged += of_seed
            print(f"gates: {done} of {len(seeds)} seeds", file=sys.stderr, flush=True)
    return summarise(judged)


def _judge_in_a_folder(seed: int, trained: tuple[str, ...]) -> list[Judged]:
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="scion-bench-") as directory:
        return judge_seed(seed, Path(directory), trained)


def judge_seed(seed: int, home: Path, trained: tuple[str, ...] = TRAINED) -> list[Judged]:
    """The candidates of one seed: those that are `trained`, the good one among them, and those derived from it."""
    from scion_trainer.base import load_base
    from tests.bench.gates_training import Trainee

    settings = Settings.model_validate(
        {"home": home, "base": {"model": str(DEMO_BASE)}, "trainer": {"threads": 1, "seed": seed}}
    )
    trainee = Trainee(load_base(settings), rank=RANK)
    for kind in trained:
        trainee.train(
            kind,
            lessons(kind, seed),
            seed=seed,
            num_steps=NUM_STEPS * (2 if kind in LONG else 1),
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
        )
        trainee.export(kind, home / kind)
    trainee.weaken(GOOD, "baseline", WEAKENED)
    trainee.export("baseline", home / "baseline")
    for kind in ("artifact", "kl", "parity"):
        trainee.names[kind] = trainee.names[GOOD]
        shutil.copytree(home / GOOD, home / kind)
    (home / SUITE).write_text(red_team_suite(), encoding="utf-8")
    world = ratings(seed)
    tokens = ChatTokens(trainee.tokenizer)
    heldout = [row for row in world.rows if row.split == "heldout"]
    server = trainee.server()
    kinds = (GOOD, *DERIVED, *trained[1:])
    for kind in kinds:
        with server.answering_as(kind):
            (home / "runs" / kind).mkdir(parents=True)
            record_parity(trainee.model, tokens, heldout, home / "runs" / kind, max_length=512)
    trainee.weaken(GOOD, "misread", MISREAD)
    with server.answering_as("misread"):
        record_parity(trainee.model, tokens, heldout, home / "runs" / "parity", max_length=512)
    remembering = RememberingServer(server)
    divergences = {name: trainee.divergence(name, heldout) for name in (*trained, "baseline")}
    return [
        Judged(
            kind,
            seed,
            judge_one(kind, settings, home, world, remembering, tokens, divergences.get(kind, divergences[GOOD])),
        )
        for kind in kinds
    ]


def judge_one(
    kind: str,
    settings: Settings,
    home: Path,
    world: Ratings,
    server: RememberingServer,
    tokens: ChatTokens,
    divergence: float,
) -> tuple[GateResult, ...]:
    """One candidate through all gates, as evaluation.py runs them: a failure before the server's gates ends it."""
    base = base_info(settings)
    seed = settings.trainer.seed
    wanted = MARGIN if kind in (GOOD, "baseline") else None
    sections = {
        "gates": settings.gates.model_copy(
            update={
                "prompt_baseline_margin": wanted,
                "max_repeated_rise": REPEATED,
                "max_tokens": 96,
                "max_prompts": NUM_PROMPTS,
                "red_team_suite": str(home / SUITE),
            }
        ),
        "trainer": settings.trainer.model_copy(update={"kl_budget": divergence / 2} if kind == "kl" else {}),
    }
    context = GateContext(
        settings=settings.model_copy(update=sections),
        version=_version(base.fingerprint, divergence),
        artifact=lambda: home / kind,
        verify_artifact=lambda: _verify(kind),
        base_info=base,
        models=Models(candidate=kind, parent="base", base="base"),
        server=server,
        tokens=tokens,
        rows=world.rows,
        retention=retention(),
        max_length=256,
        seed=seed,
        earlier=(EarlierHoldout(1, world.earlier),),
        run_directory=home / "runs" / kind,
        judge=lambda: SimulatedJudge(seed),
    )
    results = [gate.run(context) for gate in GATES if not gate.needs_server]
    if any(result.verdict is Verdict.FAIL for result in results):
        return tuple(results)
    return tuple(results + [gate.run(context) for gate in GATES if gate.needs_server])


def summarise(judged: list[Judged]) -> Outcome:
    """The table, one line for each kind of candidate, and the bars."""
    rows: list[tuple[str, ...]] = []
    by_kind: dict[str, dict[str, Any]] = {}
    kinds = tuple(dict.fromkeys(one.kind for one in judged))
    for kind in kinds:
        found = [one for one in judged if one.kind == kind]
        others = Counter(name for one in found for name in one.rejected_by if name != gate_of(kind))
        caught = sum(gate_of(kind) in one.rejected_by for one in found)
        only = sum(one.rejected_by == (() if kind == GOOD else (gate_of(kind),)) for one in found)
        by_kind[kind] = {"seeds": len(found), "caught": caught, "as_expected": only, "others": dict(others)}
        rows.append(
            (
                kind,
                "-" if kind == GOOD else f"{caught}/{len(found)}",
                f"{only}/{len(found)}",
                ", ".join(f"{name} {count}" for name, count in others.items()) or "-",
            )
        )
    num_good = by_kind[GOOD]["seeds"]
    false_rejections = num_good - by_kind[GOOD]["as_expected"]
    bars = (
        Bar("good candidates rejected", float(false_rejections), 0.0),
        *(
            Bar(f"{kind}: rejected, and by that gate only", by_kind[kind]["as_expected"] / num_good, 1.0, at_least=True)
            for kind in kinds
            if kind != GOOD
        ),
    )
    return Outcome(
        figures={"kinds": by_kind, "false_rejections": false_rejections, "judged": [_to_json(one) for one in judged]},
        bars=bars,
        columns=("candidate", "rejected by its gate", "as expected", "rejected by others"),
        rows=tuple(rows),
        notes=("models answer in this process: what needs a serving engine is in tests/e2e",),
    )


def _verify(kind: str) -> None:
    if kind == "artifact":
        raise RejectedError("a file is not the published one", reason="digest_mismatch")


def _version(fingerprint: str, divergence: float) -> Version:
    return Version(
        adapter="chat",
        number=2,
        lora_id=2,
        digest="sha256:0",
        state=VersionState.CANDIDATE,
        parent=0,
        base_fingerprint=fingerprint,
        rank=RANK,
        size_bytes=1,
        evaluation_key="key",
        created_at=0.0,
        created_by="bench",
        metrics={"kl_to_base": divergence},
    )


def _to_json(one: Judged) -> dict[str, Any]:
    gates = {
        result.name: {
            "verdict": result.verdict.value,
            "reason": result.reason,
            "figures": {name: float(value) for name, value in result.figures.items() if np.isfinite(value)},
        }
        for result in one.results
    }
    return {"kind": one.kind, "seed": one.seed, "rejected_by": one.rejected_by, "gates": gates}


BENCHMARK = Benchmark("gates", "each gate rejects what it claims to, and nothing else", run)
