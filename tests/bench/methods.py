"""KTO, DPO and PPO side by side on the demo's world: the same users, the same ratings, the same gates, a real server.

Users rate the base's answers by thumbs alone. Every method trains one version on these ratings, from the base on; the
gates judge it, and the same questions are put to it by its exact name. PPO trains its reward model first.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scion_demo.profiles import Profile, load_profile
from scion_demo.stage import BASE_NAME, Stage, set_stage
from scion_demo.turns import Measurement
from scion_demo.users import measure, run_traffic
from tests.bench.report import Bar, Benchmark, Outcome

ADAPTER = "chat"
METHODS: Mapping[str, tuple[str, ...]] = {"kto": ("kto",), "dpo": ("dpo",), "ppo": ("reward", "ppo")}
"""The recipes that a method runs, one after the other; the last one makes the version."""
PPO = "ppo"
THUMBS_BAR = 0.85
ACCURACY_BAR_POINTS = 3.0
LOAD_TIMEOUT_S = 60.0
ENVIRONMENT = {"SCION_TRAINER__RED_TEAM_SHARE": "0", "SCION_GATES__RETENTION_MAX_MISSED": "0.05"}
"""What the red team found of one method's version must not teach the next method's. The demo lets a version that has
lost facts through, for its users to stop; here the gates judge as everywhere.
"""
COLUMNS = ("users", "method", "thumbs up", "fact accuracy", "points lost", "forgetting", "gates", "seconds")


@dataclass(frozen=True, slots=True)
class Plan:
    """Which crowds; `num_turns` questions are asked before anything is trained."""

    profiles: tuple[str, ...] = ("polite", "rambling")
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = tuple(METHODS)
    num_turns: int = 2000
    questions_per_fact: int = 8


QUICK = Plan(profiles=("polite",), seeds=(0,), methods=("kto",), num_turns=240, questions_per_fact=1)


@dataclass(frozen=True, slots=True)
class Trial:
    """One method on one crowd. Shares are in 0..1; None where no version came of it, and `note` says why."""

    crowd: str
    method: str
    start: Measurement
    end: Measurement | None
    forgetting: float | None
    verdict: str
    seconds: float
    note: str = ""
    runs: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def points_lost(self) -> float | None:
        if self.end is None or self.end.accuracy is None or self.start.accuracy is None:
            return None
        return 100 * (self.start.accuracy - self.end.accuracy)

    def to_json(self) -> dict[str, Any]:
        return {
            "crowd": self.crowd,
            "method": self.method,
            "start": _shares(self.start),
            "end": None if self.end is None else _shares(self.end),
            "points_lost": self.points_lost,
            "forgetting": self.forgetting,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "note": self.note,
            "runs": list(self.runs),
        }


def run(output: Path, quick: bool) -> Outcome:
    """Every method on every crowd; minutes for each."""
    plan = QUICK if quick else Plan()
    return summarise(asyncio.run(_all(plan)))


async def _all(plan: Plan) -> list[Trial]:
    trials: list[Trial] = []
    for name in plan.profiles:
        for seed in plan.seeds:
            profile = replace(load_profile(name), correct_share=0.0)  # thumbs alone
            with tempfile.TemporaryDirectory(prefix="scion-bench-") as directory:
                stage = set_stage(Path(directory) / "stage", seed=seed)
                stage.environment |= ENVIRONMENT
                await stage.start_server()
                try:
                    trials += await _crowd(stage, profile, plan, seed)
                finally:
                    await stage.stop_server()
    return trials


async def _crowd(stage: Stage, profile: Profile, plan: Plan, seed: int) -> list[Trial]:
    """All methods on the ratings of one crowd. No version is promoted, so that each one starts from the base."""
    await run_traffic(stage.base_url, profile, num_turns=plan.num_turns, seed=seed, num_users=240, concurrency=16)
    start = await _measure(stage, BASE_NAME, profile, plan, seed)
    trials = []
    for method in plan.methods:
        trials.append(await _trial(stage, profile, plan, seed, method, start))
        print(f"{trials[-1].crowd} {method}: {_row(trials[-1])[2:]} {trials[-1].note}", flush=True)
    return trials


async def _trial(stage: Stage, profile: Profile, plan: Plan, seed: int, method: str, start: Measurement) -> Trial:
    crowd = f"{profile.name}, seed {seed}"
    began = time.monotonic()
    runs: list[Mapping[str, Any]] = []
    output: Any = None
    for recipe in METHODS[method]:
        trained = await stage.run("train", ADAPTER, "--recipe", recipe, show=True)
        output = trained.output if isinstance(trained.output, dict) else {}
        runs.append(output.get("run") or {})
        if not output or (recipe != METHODS[method][-1] and trained.code != 0):
            note = f"{recipe}: {(trained.errors.strip().splitlines() or ['no message'])[-1]}"
            return Trial(crowd, method, start, None, None, "none", time.monotonic() - began, note, tuple(runs))
    seconds = time.monotonic() - began
    version, report = output["version"], output.get("report") or {}
    accepted = output["state"] == "accepted"
    end = None
    if accepted:
        await stage.must("adapters", "alias", ADAPTER, f"bench-{method}", version.partition(":")[2])
        end = await _measure(stage, version, profile, plan, seed)
    figures = report.get("figures") or {}
    return Trial(
        crowd,
        method,
        start,
        end,
        figures.get("retention.drop_from_base"),
        str(report.get("verdict", "none")),
        seconds,
        "" if accepted else f"{version} is {output['state']}: {report.get('reason')}",
        tuple(runs),
    )


async def _measure(stage: Stage, model: str, profile: Profile, plan: Plan, seed: int) -> Measurement:
    """Once the server has the version; the same questions for every model."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while True:
        found = await measure(stage.base_url, model, profile, seed=seed, questions_per_fact=plan.questions_per_fact)
        if not found.num_failed:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{model} answered not all of {found.num_asked} questions: {found.errors[:1]}")


def summarise(trials: Sequence[Trial]) -> Outcome:
    """The table, and the bars: they are PPO's, in the worst of its trials."""
    ours = [trial for trial in trials if trial.method == PPO]
    liked = [trial.end.liked_share or 0.0 if trial.end else 0.0 for trial in ours]
    lost = [trial.points_lost if trial.points_lost is not None else 100.0 for trial in ours]
    bars = (
        Bar("thumbs up after PPO, worst crowd", min(liked), THUMBS_BAR, at_least=True),
        Bar("points of accuracy lost by PPO, worst crowd", max(lost), ACCURACY_BAR_POINTS, unit="points"),
    )
    return Outcome(
        {"trials": [trial.to_json() for trial in trials]},
        bars if ours else (),
        COLUMNS,
        tuple(_row(trial) for trial in trials),
        (
            "thumbs up: the share of answers that this crowd likes, by the truth of the world, without random votes",
            "forgetting: how much less likely the base's knowledge became, nats per token",
            *(f"{trial.crowd}, {trial.method}: {trial.note}" for trial in trials if trial.note),
        ),
    )


def _row(trial: Trial) -> tuple[str, ...]:
    end = trial.end or trial.start
    arrow = (lambda a, b: f"{a:.0%} → {b:.0%}") if trial.end else (lambda a, b: f"{a:.0%} → none")
    return (
        trial.crowd,
        trial.method,
        arrow(trial.start.liked_share or 0.0, end.liked_share or 0.0),
        arrow(trial.start.accuracy or 0.0, end.accuracy or 0.0),
        "" if trial.points_lost is None else f"{trial.points_lost:+.1f}",
        "" if trial.forgetting is None else f"{trial.forgetting:+.3f}",
        trial.verdict,
        f"{trial.seconds:.0f}",
    )


def _shares(measured: Measurement) -> dict[str, Any]:
    return {"thumbs_up": measured.liked_share, "accuracy": measured.accuracy, "asked": measured.num_asked}


BENCHMARK = Benchmark("methods", "KTO, DPO and PPO on the same thumbs, judged by the same gates and questions", run)
