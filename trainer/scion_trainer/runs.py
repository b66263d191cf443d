"""The book of runs: one row per training job, from its creation to the version it published.

Owns the table `runs` and its events. A run is `queued` until a process works on it (and again when that process was
stopped), `running` while one does, and ends as `succeeded` or `failed`. It knows nothing of torch or of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters.clock import Clock, new_id, now
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError
from scion_adapters.events import record
from scion_adapters.records import Run, RunState
from scion_adapters.tables import runs
from scion_trainer.config import RunConfig

UNFINISHED = (RunState.QUEUED, RunState.RUNNING)


class RunStore:
    """A handle; cheap to share between threads."""

    def __init__(self, database: Database, clock: Clock = now) -> None:
        self.database = database
        self._clock = clock

    def create(self, adapter: str, config: RunConfig, *, parent: int, directory: Path, actor: str) -> Run:
        """A new queued run. `directory` is the folder of all runs; the run gets one of its own in it."""
        run_id, at = new_id("run"), self._clock()
        values = {
            "id": run_id,
            "adapter": adapter,
            "recipe": config.recipe,
            "state": RunState.QUEUED,
            "parent": parent,
            "config": config.to_json(),
            "metrics": {},
            "directory": str(directory / run_id),
            "attempt": 0,
            "actor": actor[:128],
            "created_at": at,
            "updated_at": at,
        }
        with self.database.write() as connection:
            connection.execute(sa.insert(runs).values(values))
            record(
                connection,
                at,
                "run.created",
                adapter=adapter,
                actor=actor,
                data={"run": run_id, "recipe": config.recipe},
            )
        return self.get(run_id)

    def get(self, run_id: str) -> Run:
        with self.database.read() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.id == run_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no run {run_id[:80]!r}; `scion runs list` shows those there are")
        return _to_run(row)

    def list(self, adapter: str | None = None, *, limit: int = 50) -> list[Run]:
        """The newest runs first."""
        query = sa.select(runs).order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(limit)
        if adapter is not None:
            query = query.where(runs.c.adapter == adapter)
        with self.database.read() as connection:
            return [_to_run(row) for row in connection.execute(query).mappings()]

    def newest(self, adapter: str) -> Run | None:
        """The run that was created last, whatever came of it."""
        found = self.list(adapter, limit=1)
        return found[0] if found else None

    def unfinished(self, adapter: str) -> Run | None:
        """The newest run that did not end. Whether a process works on it is for the lease to say."""
        return next((run for run in self.list(adapter) if run.state in UNFINISHED), None)

    def superseded(self, adapter: str) -> Sequence[tuple[Run, Run]]:
        """Unfinished runs with the newest run after them that succeeded: they would go on from an old parent.

        A run that published nothing, such as one of a reward model, supersedes only those of its recipe.
        """
        later = runs.alias("later")
        query = (
            sa.select(runs.c.id, later.c.id)
            .join(later, later.c.adapter == runs.c.adapter)
            .where(
                runs.c.adapter == adapter,
                runs.c.state.in_(UNFINISHED),
                later.c.state == RunState.SUCCEEDED,
                sa.tuple_(later.c.created_at, later.c.id) > sa.tuple_(runs.c.created_at, runs.c.id),
                sa.or_(later.c.candidate.is_not(None), later.c.recipe == runs.c.recipe),
            )
            .order_by(later.c.created_at, later.c.id)
        )
        with self.database.read() as connection:
            newest = {row[0]: row[1] for row in connection.execute(query)}
        return [(self.get(old), self.get(new)) for old, new in newest.items()]

    def start(self, run_id: str) -> Run:
        """A process begins, or goes on, with the run. Raises ConflictError when it has ended."""
        with self.database.write() as connection:
            begun = connection.execute(
                sa.update(runs)
                .where(runs.c.id == run_id, runs.c.state.in_(UNFINISHED))
                .values(state=RunState.RUNNING, attempt=runs.c.attempt + 1, error=None, updated_at=self._clock())
            )
            if begun.rowcount == 0:
                state = connection.execute(sa.select(runs.c.state).where(runs.c.id == run_id)).scalar()
                if state is not None:
                    raise ConflictError(f"{run_id} has {state}: start a new one with `scion train`")
        return self.get(run_id)

    def set_recipe(self, run_id: str, config: RunConfig, *, metrics: Mapping[str, Any], why: str) -> Run:
        """The run, begun as `auto`, is one of `config.recipe` from now on, also when it is resumed."""
        run = self.get(run_id)
        at = self._clock()
        values = {"recipe": config.recipe, "config": config.to_json(), "metrics": {**run.metrics, **metrics}}
        with self.database.write() as connection:
            connection.execute(sa.update(runs).where(runs.c.id == run_id).values(**values, updated_at=at))
            record(
                connection,
                at,
                "run.recipe_chosen",
                adapter=run.adapter,
                actor=run.actor,
                reason=why,
                data={"run": run_id, "recipe": config.recipe},
            )
        return self.get(run_id)

    def set_micro_batch(self, run_id: str, size: int) -> None:
        """The run has `size` examples in memory at once from now on, also when it is resumed."""
        self._update(run_id, config={**self.get(run_id).config, "micro_batch_size": size})

    def note(self, run_id: str, metrics: Mapping[str, Any]) -> None:
        """Keep `metrics` beside those the run has, while it goes on; they stay when it fails."""
        self._update(run_id, metrics={**self.get(run_id).metrics, **metrics})

    def set_snapshot(self, run_id: str, snapshot_id: str) -> None:
        self._update(run_id, snapshot_id=snapshot_id)

    def succeed(self, run_id: str, *, candidate: int | None, metrics: Mapping[str, Any]) -> Run:
        """The run published `candidate`; None: its product, such as a reward model, is in its directory."""
        return self._end(run_id, RunState.SUCCEEDED, candidate=candidate, metrics=dict(metrics), error=None)

    def fail(self, run_id: str, error: str) -> Run:
        """The run ended without a version and will not go on."""
        return self._end(run_id, RunState.FAILED, error=error)

    def interrupt(self, run_id: str, reason: str) -> Run:
        """The run's process is gone; the run waits to be resumed. Does nothing to a run that has ended."""
        self._update(run_id, RunState.RUNNING, state=RunState.QUEUED, error=reason)
        return self.get(run_id)

    def _update(self, run_id: str, only: RunState | None = None, **values: Any) -> None:
        statement = sa.update(runs).where(runs.c.id == run_id).values(**values, updated_at=self._clock())
        if only is not None:
            statement = statement.where(runs.c.state == only)
        with self.database.write() as connection:
            connection.execute(statement)

    def _end(self, run_id: str, state: RunState, **values: Any) -> Run:
        at = self._clock()
        run = self.get(run_id)
        with self.database.write() as connection:
            ended = connection.execute(
                sa.update(runs)
                .where(runs.c.id == run_id, runs.c.state.in_(UNFINISHED))
                .values(state=state, updated_at=at, finished_at=at, **values)
            )
            if ended.rowcount:
                record(
                    connection,
                    at,
                    f"run.{state}",
                    adapter=run.adapter,
                    number=values.get("candidate"),
                    actor=run.actor,
                    reason=values.get("error") or "",
                    data={"run": run_id},
                )
        return self.get(run_id)


def _to_run(row: sa.RowMapping) -> Run:
    return Run(**{**row, "state": RunState(row["state"])})
