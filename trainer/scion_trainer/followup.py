"""What follows a run: the gates judge its candidate, and an accepted one may be carried to users.

Owns that order only: the gates are in evaluation.py, rollouts in scion_adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.records import Rollout, Run, Version, VersionRef, VersionState
from scion_adapters.registry import open_registry
from scion_adapters.rollouts import open_rollouts
from scion_adapters.settings import Settings

if TYPE_CHECKING:
    from scion_trainer.report import Report


@dataclass(frozen=True, slots=True)
class Followed:
    """Where a candidate is. `report` is None when the gates did not run; `note`: what was not done, and why."""

    version: Version
    report: Report | None
    rollout: Rollout | None
    note: str


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
                actor=actor,
                reason=f"{run.id} passed the gates",
            )
        except ConflictError as error:
            note = f"no rollout of {ref}: {error}"
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
