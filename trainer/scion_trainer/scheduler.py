"""The daemon's decisions and jobs: when a run is due, and what is done then.

`is_due` decides; the job functions read, decide and launch. Jobs live in the database (APScheduler's SQLAlchemy store),
so they are module-level functions with plain arguments; they find the jobs object of their process by `set_current`.
"""

from __future__ import annotations

import logging
import re
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


_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")  # as cron counts them
_WEEKDAY = r"[0-7]|" + "|".join(_WEEKDAYS)
_WEEKDAY_PART = re.compile(
    rf"(?:\*|(?P<first>{_WEEKDAY})(?:-(?P<last>{_WEEKDAY}))?)(?:/(?P<step>[0-9]+))?", re.IGNORECASE
)


def weekday_names(field: str) -> str:
    """The weekday field of a cron expression with its numbers as names; 0 and 7 are Sunday. Raises ValueError.

    APScheduler 3 counts weekdays from Monday and reads names as everybody does.
    """
    return ",".join(part if not re.search(r"[0-9]", part) else _weekday_part(part) for part in field.split(","))


def _weekday_part(part: str) -> str:
    found = _WEEKDAY_PART.fullmatch(part)
    if found is None:
        raise ValueError(f"{part!r} is not a weekday: 0 to 7 (0 and 7 are Sunday) or mon to sun")
    step = int(found["step"] or 1)
    if step == 0:
        raise ValueError(f"the step of {part!r} must be at least 1")
    first = 0 if found["first"] is None else _weekday(found["first"])
    if found["last"] is not None:
        last = _weekday(found["last"], ends_week=True)
    else:
        last = 6 if found["first"] is None or found["step"] else first  # "2/2" goes on to the end of the week
    if first > last:
        raise ValueError(f"{part!r} ends before it begins")
    return ",".join(dict.fromkeys(_WEEKDAYS[day % 7] for day in range(first, last + 1, step)))


def _weekday(text: str, *, ends_week: bool = False) -> int:
    if text.isdigit():
        return int(text)
    day = _WEEKDAYS.index(text.lower())
    return 7 if ends_week and day == 0 else day


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


def superseded_message(old: Run, newer: Run) -> str:
    """Why `old` is not resumed once `newer` has succeeded."""
    made = "" if newer.candidate is None else f" and published version {newer.candidate}"
    before = f"; before that: {old.error}" if old.error else ""
    return f"superseded: {newer.id} was started later{made}, so this run would go on from an old state{before}"


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
        """Go on with the runs that a crash or a stop left; each adapter's newest only, and none that is superseded."""
        runs = RunStore(self._database)
        for plan in plans(self._settings):
            if working_on(self._database, plan.adapter) is not None:
                continue
            for old, newer in runs.superseded(plan.adapter):
                logger.info("not resuming %s of %s: superseded by %s", old.id, plan.adapter, newer.id)
                runs.fail(old.id, superseded_message(old, newer))
            run = runs.unfinished(plan.adapter)
            if run is None:
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
