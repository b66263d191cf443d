"""What follows a run: the gates judge its candidate, and an accepted one may be carried to users.

A run that made a reward model has been judged in the run already: see `reward_product`.

Owns that order only: the gates are in evaluation.py, rollouts in scion_adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, RejectedError, UnavailableError
from scion_adapters.records import Rollout, RolloutState, Run, Version, VersionRef, VersionState
from scion_adapters.registry import open_registry
from scion_adapters.rollouts import open_rollouts
from scion_adapters.settings import Settings
from scion_trainer.gates.types import Verdict
from scion_trainer.reward.store import GATE_METRIC

if TYPE_CHECKING:
    from scion_trainer.report import Report


@dataclass(frozen=True, slots=True)
class Followed:
    """Where a candidate is. `report` is None when the gates did not run; `note`: what was not done, and why."""

    version: Version
    report: Report | None
    rollout: Rollout | None
    note: str


@dataclass(frozen=True, slots=True)
class RewardProduct:
    """The reward model that a run made instead of a version; `next` is what one would type now."""

    directory: str
    verdict: Verdict
    reason: str
    figures: Mapping[str, float]
    next: str

    @property
    def exit_code(self) -> int:
        """What a command that trained it should exit with: that of a refusal when it failed its gate."""
        return RejectedError.exit_code if self.verdict is Verdict.FAIL else 0


def reward_product(run: Run) -> RewardProduct | None:
    """What a succeeded run made if it is a reward model; None if it is a version."""
    gate = run.metrics.get(GATE_METRIC)
    if gate is None:
        return None
    verdict = Verdict(gate["verdict"])
    better = f"scion train {run.adapter} --recipe ppo"
    return RewardProduct(
        directory=run.metrics["reward_model"],
        verdict=verdict,
        reason=gate["reason"],
        figures=gate["figures"],
        next=better if verdict is Verdict.PASS else f"scion runs show {run.id}",
    )


def follow_up(
    settings: Settings,
    database: Database,
    run: Run,
    *,
    evaluate: bool,
    rollout: bool,
    actor: str,
    say: Callable[[str], None] = lambda _text: None,
) -> Followed:
    """Evaluate the candidate of a succeeded run, and start its rollout if it was accepted, each only if wanted."""
    assert run.candidate is not None, f"{run.id} has published nothing"
    registry = open_registry(settings, database)
    ref = VersionRef(run.adapter, run.candidate)
    report, note = None, ""
    if evaluate:
        try:
            report = evaluate_version(settings, database, ref, say=say)
        except (UnavailableError, ConflictError) as error:  # the version stays a candidate
            note = f"{ref} was not evaluated: {error}"
    version = registry.version(ref)
    begun = None
    if rollout and version.state is VersionState.ACCEPTED:
        try:
            begun = open_rollouts(settings, database).start(
                ref,
                steps=settings.rollout.steps,
                every_s=settings.rollout.every_s,
                guard=settings.rollout.guard,
                approve_first=settings.gates.approve_first,
                actor=actor,
                reason=f"{run.id} passed the gates",
            )
        except ConflictError as error:
            note = f"no rollout of {ref}: {error}"
        else:
            if begun.state is RolloutState.UNAPPROVED:
                note = f"the rollout of {ref} waits for a person: `scion rollout approve {ref.adapter}`"
    return Followed(version, report, begun, note)


def evaluate_version(
    settings: Settings, database: Database, ref: VersionRef, *, say: Callable[[str], None] = lambda _text: None
) -> Report:
    """Run the gates on a version, with the held-out ratings of the snapshot that made it."""
    from scion_trainer.evaluation import evaluate  # loads the tokenizer's libraries

    last = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last:
            last = what
            say(f"evaluating {ref}: {what}")

    return evaluate(settings, ref, database=database, registry=open_registry(settings, database), progress=progress)
