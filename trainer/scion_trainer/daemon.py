"""The trainer daemon, `scion trainer`: APScheduler with its jobs in the database, children that train, and a clean end.

Owns processes and signals. When something is due is decided in scheduler.py.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any

import sqlalchemy as sa
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from scion_adapters.clock import new_id
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, ScionError
from scion_adapters.leases import HeldLease
from scion_adapters.records import Run
from scion_adapters.settings import Settings
from scion_adapters.tables import scheduler_jobs
from scion_trainer import scheduler as jobs_module
from scion_trainer.followup import follow_up, reward_product
from scion_trainer.launch import Process, create_run, launch_run
from scion_trainer.run_lease import Holder, free_if_dead
from scion_trainer.scheduler import ACTOR, Launcher, Plan, TrainerJobs, plans, weekday_names

LEASE_NAME = "scheduler"
LEASE_TTL_S = 30.0
MISFIRE_GRACE_S = 3600
"""A scheduled time that was missed (daemon down, machine asleep) is made up for within this time, once."""

RETRY_S = 10.0
"""How long the scheduler waits after the database failed it."""

logger = logging.getLogger(__name__)

_Job = tuple[Callable[..., None], Any, tuple[str, ...]]  # function, trigger, arguments


class ChildLauncher:
    """Runs as child processes, followed by the gates and, if configured, a rollout."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._lock = threading.Lock()
        self._children: set[Process] = set()
        self._stopping = False

    def start(self, adapter: str, recipe: str) -> Run:
        return self.resume(create_run(self._settings, self._database, adapter, recipe, actor=ACTOR))

    def resume(self, run: Run) -> Run:
        children: list[Process] = []

        def started(process: Process) -> None:
            children.append(process)
            self._add(process)

        try:
            done = launch_run(self._settings, self._database, run, started=started)
        finally:
            with self._lock:
                self._children.difference_update(children)
        if (product := reward_product(done)) is not None:
            logger.info("%s made a reward model: %s: %s", done.id, product.verdict, product.reason)
            return done
        followed = follow_up(
            self._settings,
            self._database,
            done,
            evaluate=True,
            rollout=self._settings.trainer.rollout,
            actor=ACTOR,
            say=logger.info,
        )
        logger.info("%s is %s. %s", followed.version.ref, followed.version.state, followed.note)
        return done

    def stop(self) -> None:
        """Ask all children to write a checkpoint and end."""
        with self._lock:
            self._stopping = True
            for child in self._children:
                _terminate(child)

    def _add(self, process: Process) -> None:
        with self._lock:
            self._children.add(process)
            if self._stopping:
                _terminate(process)


class JobScheduler(BackgroundScheduler):
    """APScheduler's, whose thread outlives a database that fails for a while."""

    # Private, checked on APScheduler 3.11.3, which guards only its reading of the jobs that are due: when the write of
    # a job's next time fails (database locked, disk full, PostgreSQL gone), its thread ends and nothing is due ever
    # again. A job whose next time was not written has been started and is still due: the retry starts it again unless
    # it still works. One scheduled run too many, of those that ended within RETRY_S, is better than one too few.
    def _process_jobs(self) -> float | None:
        try:
            seconds: float | None = super()._process_jobs()
        except sa.exc.SQLAlchemyError as error:
            logger.warning("the scheduler's jobs could not be written, trying again in %g s: %s", RETRY_S, error)
            return RETRY_S
        return seconds

    def is_working(self) -> bool:
        """Whether the thread that starts jobs lives."""
        return self._thread is not None and self._thread.is_alive()


class Daemon:
    """One scheduler on one database, until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        launcher: Launcher,
        *,
        stop_children: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._database = database
        self._stop_children = stop_children
        self._jobs = TrainerJobs(settings, database, launcher)
        self._stop = threading.Event()

    def run(self) -> None:
        """Work until `stop` is called or the lease is lost.

        Raises ConflictError when another daemon works, and ScionError when nothing would ever start a run again.
        """
        free_if_dead(self._database, LEASE_NAME)
        holder = str(Holder.of(new_id("daemon")))
        with HeldLease(self._database, LEASE_NAME, holder, ttl_s=LEASE_TTL_S) as lease:
            scheduler = self._scheduler()
            jobs_module.set_current(self._jobs)
            # Not a job: APScheduler's thread dies when it is shut down while it removes a job that has run its course.
            resumption = threading.Thread(target=self._jobs.resume_unfinished, name="resume unfinished runs")
            resumption.start()
            scheduler.start(paused=True)
            try:
                self._schedule(scheduler)
                scheduler.resume()
                while not self._stop.wait(1.0):
                    if lease.lost.is_set():
                        logger.error("the scheduler's lease was lost to another daemon; ending")
                        break
                    if not scheduler.is_working():
                        raise ScionError(
                            "the scheduler's thread died, its error is in the log above: no run would ever start "
                            "again; start `scion trainer` again"
                        )
            finally:
                scheduler.pause()
                self._stop_children()
                scheduler.shutdown(wait=True)
                resumption.join()
                jobs_module.set_current(None)

    def stop(self) -> None:
        """End `run` soon: no new runs, and the children are asked to stop."""
        self._stop.set()

    def _scheduler(self) -> JobScheduler:
        return JobScheduler(
            jobstores={"default": SQLAlchemyJobStore(engine=self._database.engine, tablename=scheduler_jobs.name)},
            # Two threads per adapter: adapters may train side by side, and a count of ratings never waits for a run.
            executors={"default": ThreadPoolExecutor(2 * len(self._settings.adapters))},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": MISFIRE_GRACE_S},
            timezone=UTC,
        )

    def _schedule(self, scheduler: JobScheduler) -> None:
        """Bring the stored jobs in line with the configuration, keeping the next times of those that did not change."""
        wanted: dict[str, _Job] = {}
        for plan in plans(self._settings):
            wanted.update(self._plan_jobs(plan))
        for job in scheduler.get_jobs():
            if job.id not in wanted:
                job.remove()
        for job_id, (function, trigger, arguments) in wanted.items():
            stored = scheduler.get_job(job_id)
            if stored is not None and str(stored.trigger) == str(trigger):
                continue
            scheduler.add_job(
                function,
                trigger,
                args=list(arguments),
                id=job_id,
                name=job_id,
                replace_existing=True,
                **({"next_run_time": datetime.now(UTC)} if isinstance(trigger, IntervalTrigger) else {}),
            )

    def _plan_jobs(self, plan: Plan) -> dict[str, _Job]:
        found: dict[str, _Job] = {}
        if plan.schedule is not None:
            found[f"schedule:{plan.adapter}"] = (
                jobs_module.run_scheduled,
                cron_trigger(plan.schedule),
                (plan.adapter,),
            )
        if plan.min_new_ratings is not None:
            seconds = self._settings.trainer.check_interval_s
            found[f"ratings:{plan.adapter}"] = (
                jobs_module.check_ratings,
                IntervalTrigger(seconds=seconds, timezone=UTC),
                (plan.adapter,),
            )
        return found


def cron_trigger(expression: str) -> CronTrigger:
    """`minute hour day month weekday` in UTC; the weekdays 0 and 7 are Sunday. Raises InvalidInputError."""
    fields = expression.split()
    try:
        if len(fields) == 5:  # otherwise APScheduler says what is wrong
            fields[4] = weekday_names(fields[4])
        return CronTrigger.from_crontab(" ".join(fields), timezone=UTC)
    except ValueError as error:
        raise InvalidInputError(
            f'schedule = {expression!r}: {error}; expected five fields such as "0 3 * * *" (daily at 03:00 UTC)',
            field="trainer.schedule",
        ) from error


def run_daemon(settings: Settings, database: Database) -> None:
    """The daemon until SIGTERM or SIGINT."""
    launcher = ChildLauncher(settings, database)
    daemon = Daemon(settings, database, launcher, stop_children=launcher.stop)

    def handle(_number: int, _frame: FrameType | None) -> None:
        daemon.stop()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        daemon.run()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminate(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
