"""The daemon's decisions and jobs: when a run is due, and what is done then.

`is_due` decides; the job functions read, decide and launch. Jobs live in the database (APScheduler's SQLAlchemy store),
so they are module-level functions with plain arguments; they find the jobs object of their process by `set_current`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import sqlalchemy as sa

from scion_adapters.clock import Clock, now
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, ScionError
from scion_adapters.records import Run
from scion_adapters.settings import Settings
from scion_adapters.tables import snapshots
from scion_feedback.snapshots import new_ratings_since
from scion_trainer.run_lease import working_on
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError

logger = logging.getLogger(__name__)

ACTOR = "trainer"


class Launcher(Protocol):
    """Makes runs. The real one starts child processes; tests have their own."""

    def start(self, adapter: str, recipe: str) -> Run:
        """A new run of `adapter`, to its end and through the gates."""
        ...

    def resume(self, run: Run) -> Run:
        """An unfinished run, to its end and through the gates."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """When runs of one adapter are due."""

    adapter: str
    recipe: str
    schedule: str | None  # cron expression
    min_new_ratings: int | None


def plans(settings: Settings) -> list[Plan]:
    """One plan per configured adapter; its own fields override those of [trainer]."""
    trainer = settings.trainer
    return [
        Plan(
            name,
            own.recipe or trainer.recipe,
            own.schedule or trainer.schedule,
            own.min_new_ratings or trainer.min_new_ratings,
        )
        for name, own in settings.adapters.items()
    ]


def is_due(new_ratings: int, min_new_ratings: int | None) -> bool:
    """Whether the ratings since the last run's snapshot are enough for another run."""
    return min_new_ratings is not None and new_ratings >= min_new_ratings


def counted_from(database: Database, adapter: str) -> float:
    """Since when ratings are new: the newest run's snapshot, or its creation if it made none; 0 before the first run.

    A failed run counts as well, or one that cannot succeed would be started again at every check.
    """
    run = RunStore(database).newest(adapter)
    if run is None:
        return 0.0
    with database.read() as connection:
        frozen = connection.execute(sa.select(snapshots.c.created_at).where(snapshots.c.id == run.snapshot_id)).scalar()
    # A snapshot of the same rows is the same snapshot: an older one then, and the run's own time is the later one.
    return max(run.created_at, float(frozen or 0.0))


class TrainerJobs:
    """What the scheduler calls. All methods return at once when there is nothing to do, and raise nothing."""

    def __init__(self, settings: Settings, database: Database, launcher: Launcher, clock: Clock = now) -> None:
        self._settings = settings
        self._database = database
        self._launcher = launcher
        self._clock = clock

    def train(self, adapter: str) -> None:
        """A time of the schedule has come."""
        plan = self._plan(adapter)
        if plan is not None:
            self._launch(plan, "scheduled")

    def check_ratings(self, adapter: str) -> None:
        """Start a run if there are enough new ratings."""
        plan = self._plan(adapter)
        if plan is None or working_on(self._database, adapter) is not None:
            return
        try:
            new = new_ratings_since(self._database, adapter, counted_from(self._database, adapter))
        except ScionError as error:
            logger.warning("new ratings of %s could not be counted: %s", adapter, error)
            return
        if is_due(new, plan.min_new_ratings):
            self._launch(plan, f"{new} new ratings")

    def resume_unfinished(self) -> None:
        """Go on with the runs that a crash or a stop left; each adapter's newest only."""
        runs = RunStore(self._database)
        for plan in plans(self._settings):
            run = runs.unfinished(plan.adapter)
            if run is None or working_on(self._database, plan.adapter) is not None:
                continue
            logger.info("resuming %s of %s", run.id, plan.adapter)
            self._guard(partial(self._launcher.resume, run), plan.adapter)

    def _plan(self, adapter: str) -> Plan | None:
        return next((plan for plan in plans(self._settings) if plan.adapter == adapter), None)

    def _launch(self, plan: Plan, why: str) -> None:
        logger.info("training %s by %s: %s", plan.adapter, plan.recipe, why)
        self._guard(partial(self._launcher.start, plan.adapter, plan.recipe), plan.adapter)

    def _guard(self, launch: Callable[[], Run], adapter: str) -> None:
        try:
            run = launch()
        except RunInterruptedError as error:
            logger.info("training of %s stopped: %s", adapter, error)
        except ConflictError as error:
            logger.info("not training %s: %s", adapter, error)
        except ScionError as error:
            logger.error("training of %s failed: %s", adapter, error)
        else:
            logger.info("%s of %s is done", run.id, adapter)


_current: TrainerJobs | None = None


def set_current(jobs: TrainerJobs | None) -> None:
    """Let the module's job functions work on `jobs`."""
    global _current
    _current = jobs


def run_scheduled(adapter: str) -> None:
    """Job: train `adapter` now."""
    if _current is not None:
        _current.train(adapter)


def check_ratings(adapter: str) -> None:
    """Job: train `adapter` if it has enough new ratings."""
    if _current is not None:
        _current.check_ratings(adapter)
