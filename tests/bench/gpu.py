"""QLoRA on a GPU, beside TRL's: SFT, KTO and PPO on random models with the shapes of an 8B and a 1B Llama.

Tokens per second of a whole training (PPO: of its steps), and the most GPU memory that each side took beside what ours
predicted. Every training is a process of its own. TRL's SFT and KTO are those of this environment; its PPO is 1.12's,
in an environment made for it. Without a GPU nothing is measured, and the outcome says so; `--quick` tries the code on a
small model, on what there is.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.gpu_task import Tuning, steady
from tests.bench.ppo import measure, trl_environment
from tests.bench.ppo_task import SMALL, Record, Shape, Task, build_model
from tests.bench.report import Bar, Benchmark, Outcome

GIB = 1 << 30
LLAMA_1B = Shape(2048, 8192, layers=16, heads=32, vocab=128_256, key_value_heads=8)
LLAMA_8B = Shape(4096, 14_336, layers=32, heads=32, vocab=128_256, key_value_heads=8)
ESTIMATE_BAR = 1.5
"""An estimate may be this much above or below the peak."""
OURS, TRL = "ours", "TRL"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is trained. `ppo_updates` 0: no PPO; `with_trl_ppo` needs a package registry, once."""

    shapes: tuple[tuple[str, Shape], ...] = (("1B", LLAMA_1B), ("8B", LLAMA_8B))
    recipes: tuple[str, ...] = ("sft", "kto")
    batch_size: int = 16
    at_once: int = 4
    num_steps: int = 10
    prompt_tokens: int = 256
    answer_tokens: int = 256
    threads: int = 4
    ppo_updates: int = 3
    with_trl_ppo: bool = True


QUICK = Plan(
    shapes=(("tiny", SMALL),),
    recipes=("kto",),
    threads=1,
    batch_size=4,
    at_once=2,
    num_steps=3,
    prompt_tokens=8,
    answer_tokens=8,
    ppo_updates=2,
    with_trl_ppo=False,
)


@dataclass(frozen=True, slots=True)
class Trained:
    """One side's training of one model. `record` None: it did not end, and `why` says what it said last."""

    model: str
    recipe: str
    side: str
    tokens_per_step: int
    record: Record | None
    why: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Of a whole training, for sides differ in what they compute before the first step and in each.

        PPO's by its steps: what precedes and follows them happens once, and would count for much beside so few.
        """
        assert self.record is not None
        if not self.record.training_s:
            return self.steady_tokens_per_s
        return self.tokens_per_step * len(self.record.seconds) / self.record.training_s

    @property
    def steady_tokens_per_s(self) -> float:
        """By the median step."""
        assert self.record is not None
        return self.tokens_per_step / statistics.median(steady(self.record.seconds))

    @property
    def estimate_over_peak(self) -> float | None:
        """None: nothing was predicted."""
        if self.record is None or not self.record.predicted_bytes:
            return None
        return self.record.predicted_bytes / self.record.device_peak_bytes

    def to_json(self) -> dict[str, Any]:
        record = None
        if self.record is not None:
            speeds = {"tokens_per_s": self.tokens_per_s, "steady_tokens_per_s": self.steady_tokens_per_s}
            record = {**asdict(self.record), **speeds}
        return {"model": self.model, "recipe": self.recipe, "side": self.side, "why": self.why, "record": record}


def run(output: Path, quick: bool) -> Outcome:
    """Every recipe on every model, TRL beside ours; an hour at most."""
    import torch

    if not quick and not torch.cuda.is_available():
        return Outcome({"trained": []}, notes=("no GPU is here (torch.cuda.is_available()): nothing was measured",))
    plan, home = QUICK if quick else Plan(), output.resolve() / "gpu"
    home.mkdir(parents=True, exist_ok=True)
    trained: list[Trained] = []
    for name, shape in plan.shapes:
        model = build_model(home / f"model-{name}", shape)
        for recipe in plan.recipes:
            task = tuning(plan, model, recipe)
            for side, module in ((OURS, "gpu_ours"), (TRL, "gpu_trl")):
                command = [sys.executable, "-m", f"tests.bench.{module}"]
                trained.append(train(name, recipe, side, command, task, task.tokens_per_step, home))
        if plan.ppo_updates:
            trained += train_ppo(plan, name, model, home, output.resolve())
    return summarise(trained)


def tuning(plan: Plan, model: Path, recipe: str) -> Tuning:
    return Tuning(
        model=str(model),
        recipe=recipe,
        batch_size=plan.batch_size,
        at_once=plan.at_once,
        num_steps=plan.num_steps,
        prompt_tokens=plan.prompt_tokens,
        answer_tokens=plan.answer_tokens,
        threads=plan.threads,
    )


def train_ppo(plan: Plan, name: str, model: Path, home: Path, output: Path) -> list[Trained]:
    """Ours, and TRL 1.12's in bf16: in fp32, its default, three 8B models fit into no single GPU."""
    task = Task(
        model=str(model),
        batch_size=plan.batch_size,
        num_updates=plan.ppo_updates,
        at_once=plan.at_once,
        prompt_tokens=plan.prompt_tokens // 2,
        response_tokens=plan.answer_tokens // 2,
        threads=plan.threads,
    )
    tokens = task.batch_size * (task.prompt_tokens + task.response_tokens)
    found = [train(name, "ppo", OURS, [sys.executable, "-m", "tests.bench.ppo_ours"], task, tokens, home)]
    if not plan.with_trl_ppo:
        return found
    try:
        command = [trl_environment(output), "-m", "tests.bench.ppo_trl"]
    except subprocess.CalledProcessError:
        return [*found, Trained(name, "ppo", TRL, tokens, None, why="its environment could not be made: no registry?")]
    return [*found, train(name, "ppo", TRL, command, task, tokens, home, dtype="bfloat16")]


def train(
    model: str, recipe: str, side: str, command: Sequence[str], task: Any, tokens: int, home: Path, **more: Any
) -> Trained:
    """One process. What fails, for want of memory say, is a result too."""
    try:
        found = measure(f"{recipe} {model} {side}", command, task, home, **more)
    except RuntimeError as error:
        return Trained(model, recipe, side, tokens, None, why=str(error).strip().splitlines()[-1][:200])
    return Trained(model, recipe, side, tokens, found.record)


def summarise(trained: Sequence[Trained]) -> Outcome:
    """The table, and the bars: the worst estimate, and ours beside TRL's where both ended."""
    errors = [max(ratio, 1 / ratio) for one in trained if (ratio := one.estimate_over_peak)]
    bars = [
        Bar("ours that did not end", float(sum(one.side == OURS and one.record is None for one in trained)), 0.0),
        Bar("estimate and peak, the larger over the smaller, worst", max(errors, default=0.0), ESTIMATE_BAR),
    ]
    by_key = {(one.model, one.recipe, one.side): one for one in trained}
    for (model, recipe, side), ours in by_key.items():
        trl = by_key.get((model, recipe, TRL))
        if side != OURS or trl is None or ours.record is None or trl.record is None:
            continue
        label = f"{recipe} {model}, ours over TRL's"
        peaks = ours.record.device_peak_bytes / trl.record.device_peak_bytes
        bars += [
            Bar(f"{label}: tokens/s", ours.tokens_per_s / trl.tokens_per_s, 1.0, at_least=True),
            Bar(f"{label}: peak memory", peaks, 1.0),
        ]
    return Outcome(
        {"trained": [one.to_json() for one in trained]},
        tuple(bars),
        ("model", "recipe", "side", "tokens/s", "peak GiB", "estimate / peak"),
        tuple(_row(one) for one in trained),
        tuple(f"{one.recipe} {one.model} {one.side} did not end: {one.why}" for one in trained if one.record is None),
    )


def _row(one: Trained) -> tuple[str, ...]:
    if one.record is None:
        return (one.model, one.recipe, one.side, "-", "-", "-")
    ratio = one.estimate_over_peak
    return (
        one.model,
        one.recipe,
        one.side,
        f"{one.tokens_per_s:,.0f}",
        f"{one.record.device_peak_bytes / GIB:.2f}",
        "" if ratio is None else f"{ratio:.2f}",
    )


BENCHMARK = Benchmark("gpu", "QLoRA on a GPU beside TRL's: tokens per second, peak memory, estimate", run)
