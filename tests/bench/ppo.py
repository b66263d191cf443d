"""PPO on one shared NF4 base against TRL 1.12's, the last release that had it: seconds per update, memory, reward.

Both sides get the same random 172M Llama, prompts, batch, lengths and threads, one after the other, twice: with
generation by transformers in both, and with vLLM's for ours at 64 answers at a time. TRL lives in an environment of its
own, made once, that shares all other packages with ours, so that only the trainers differ.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.bench.ppo_task import LARGE, SMALL, Record, Shape, Task, build_model
from tests.bench.report import Bar, Benchmark, Outcome
from tests.bench.world import ROOT
from vllm_scion.serve import available_cores

TRL = "trl==1.12.0"
GIB = 1 << 30
SAMPLE_INTERVAL_S = 1.0
"""Not more often: adding a process's pages up takes tens of milliseconds, and holds it up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much. `vllm_batch` None: without the part that needs vLLM. `threads` None: one for each core."""

    shape: Shape = LARGE
    batch: int = 8
    num_updates: int = 8
    vllm_batch: int | None = 64
    threads: int | None = None
    num_vllm_updates: int = 3
    tokens: int = 64
    num_climbing_updates: int = 60


QUICK = Plan(shape=SMALL, num_updates=2, vllm_batch=None, tokens=16, threads=1, num_climbing_updates=3)


@dataclass(frozen=True, slots=True)
class Side:
    """What one side did, and the most memory that it and its children held at once."""

    name: str
    record: Record
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Per update: the median, without the first, which warms up, where there are more."""
        return statistics.median(self.record.seconds[1:] or self.record.seconds)

    def reward(self, *, first: bool) -> float:
        """The mean of the first or the last tenth of the updates: a batch alone says little."""
        count = -(-len(self.record.rewards) // 10)
        return statistics.fmean(self.record.rewards[:count] if first else self.record.rewards[-count:])

    def to_json(self) -> dict[str, Any]:
        return {"peak_bytes": self.peak_bytes, "seconds_per_update": self.seconds, **asdict(self.record)}


def run(output: Path, quick: bool) -> Outcome:
    """All sides in turn; the bars are ratios of neighbours."""
    plan = QUICK if quick else Plan()
    home = output.resolve() / "ppo"
    home.mkdir(parents=True, exist_ok=True)
    model = build_model(home / f"model-{plan.shape.hidden}", plan.shape)
    small = task_of(plan, model, plan.batch, plan.num_updates)
    python = trl_environment(output.resolve())
    trl = measure("TRL 1.12", [python, "-m", "tests.bench.ppo_trl"], small, home)
    ours = measure("ours", [sys.executable, "-m", "tests.bench.ppo_ours"], small, home)
    sides = [trl, ours]
    bars = [
        Bar("TRL's seconds per update over ours, transformers", trl.seconds / ours.seconds, 1.8, at_least=True),
        Bar("our peak memory over TRL's", ours.peak_bytes / trl.peak_bytes, 0.55),
    ]
    if plan.vllm_batch is not None:
        large = task_of(plan, model, plan.vllm_batch, plan.num_vllm_updates)
        trl_64 = measure(f"TRL 1.12, {large.batch_size} at a time", [python, "-m", "tests.bench.ppo_trl"], large, home)
        command = [sys.executable, "-m", "tests.bench.ppo_ours"]
        ours_64 = measure(f"ours, vLLM, {large.batch_size} at a time", command, large, home, engine=True)
        sides += [trl_64, ours_64]
        bars.append(
            Bar("TRL's seconds per update over ours, vLLM", trl_64.seconds / ours_64.seconds, 3.0, at_least=True)
        )
    climbed = climb(plan, [python, "-m", "tests.bench.ppo_trl"], home)
    sides += climbed
    return Outcome(
        figures={side.name: side.to_json() for side in sides},
        bars=tuple(bars),
        columns=("side", "s/update", "peak GiB", "first reward", "last reward"),
        rows=tuple(row_of(side) for side in sides),
        notes=(
            "reward: share of answer tokens from the lower half of the vocabulary, 0.5 before training",
            "TRL: float32 models as in its example script, a LoRA policy, value and reward of their own; ours: NF4",
        ),
    )


def climb(plan: Plan, trl: Sequence[str], home: Path) -> list[Side]:
    """Rewards after many updates, on a model so small that they are made in minutes."""
    task = Task(
        model=str(build_model(home / f"model-{SMALL.hidden}", SMALL)),
        batch_size=32,
        at_once=32,
        num_updates=plan.num_climbing_updates,
        prompt_tokens=16,
        response_tokens=16,
        learning_rate=3e-3,
        threads=1,
    )
    ours = [sys.executable, "-m", "tests.bench.ppo_ours"]
    return [measure(f"{name}, small model", side, task, home) for name, side in (("TRL 1.12", trl), ("ours", ours))]


def task_of(plan: Plan, model: Path, batch: int, num_updates: int) -> Task:
    return Task(
        model=str(model),
        batch_size=batch,
        num_updates=num_updates,
        prompt_tokens=plan.tokens,
        response_tokens=plan.tokens,
        threads=plan.threads or len(available_cores()),
    )


def row_of(side: Side) -> tuple[str, ...]:
    figures = (side.seconds, side.peak_bytes / GIB, side.reward(first=True), side.reward(first=False))
    return (side.name, *(f"{figure:.2f}" for figure in figures))


def measure(name: str, command: Sequence[str], task: Task, home: Path, **more: Any) -> Side:
    """Run one side to its end. Raises RuntimeError with what it said last when it fails."""
    print(f"ppo: {name}", file=sys.stderr)
    output, log = home / "record.json", home / f"{name.replace(' ', '-')}.log"
    output.unlink(missing_ok=True)
    arguments = [*command, json.dumps({"task": asdict(task), **more}), str(output)]
    with log.open("wb") as stream:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        memory = Memory(process.pid)
        try:
            status = process.wait()
        finally:
            process.kill()
            peak = memory.stop()
    if status != 0:
        raise RuntimeError(f"{name} ended with status {status}:\n{log.read_text(errors='replace')[-3000:]}")
    return Side(name, Record(**json.loads(output.read_text())), peak)


class Memory:
    """The most that a process and its descendants held at once; each page that they share counts once."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            total = 0
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    total += _pss(process)
            except psutil.Error:
                continue
            self.peak_bytes = max(self.peak_bytes, total)


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.NoSuchProcess:
        return 0


def trl_environment(folder: Path) -> str:
    """The Python of an environment with TRL 1.12, and everything else as in this one; made if it is not there."""
    environment = folder / "trl-1.12"
    python = environment / "bin" / "python"
    packages = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (packages / "trl").is_dir():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "--quiet", "--no-deps", TRL], check=True)
    shared = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "shared.pth").write_text(shared + "\n", encoding="utf-8")
    return str(python)


BENCHMARK = Benchmark("ppo", "PPO on one shared NF4 base, against TRL 1.12's", run)
