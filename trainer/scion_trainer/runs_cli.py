"""`scion runs list|show`: what runs there were, and one of them in full.

Owns what is printed, and a run as `--json` shows it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scion_adapters.cli.output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from scion_adapters.records import Run


def runs_list(
    name: Annotated[str | None, typer.Argument(help="Only this adapter's.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    json: JsonOption = False,
) -> None:
    """List training runs."""
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings
    from scion_trainer.run_lease import working_on
    from scion_trainer.runs import RunStore

    database = open_database(load_settings())
    found = RunStore(database).list(name, limit=limit)
    if json:
        print_json([run_json(run) for run in found])
        return
    working = {adapter: working_on(database, adapter) for adapter in {run.adapter for run in found}}
    print_table(
        ("run", "adapter", "recipe", "state", "from", "made", "rows", "seconds", "begun"),
        [
            (
                run.id,
                run.adapter,
                run.recipe,
                shown_state(run, is_worked_on=(holder := working[run.adapter]) is not None and holder.run_id == run.id),
                f"{run.adapter}:{run.parent}",
                None if run.candidate is None else f"{run.adapter}:{run.candidate}",
                run.metrics.get("rows"),
                run.metrics.get("seconds"),
                _time(run.created_at),
            )
            for run in found
        ],
    )


def runs_show(run_id: Annotated[str, typer.Argument(help="The run's id.")], json: JsonOption = False) -> None:
    """Show one run: its configuration, metrics and error."""
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings
    from scion_trainer.run_lease import working_on
    from scion_trainer.runs import RunStore

    database = open_database(load_settings())
    run = RunStore(database).get(run_id)
    if json:
        print_json(run_json(run))
        return
    holder = working_on(database, run.adapter)
    state = shown_state(run, is_worked_on=holder is not None and holder.run_id == run.id)
    made = None if run.candidate is None else f"{run.adapter}:{run.candidate}"
    facts: list[tuple[str, object]] = [
        ("state", state),
        ("from", f"{run.adapter}:{run.parent}"),
        ("made", made),
        ("snapshot", run.snapshot_id),
        ("directory", run.directory),
        ("attempts", run.attempt),
        ("by", run.actor),
        ("begun", _time(run.created_at)),
        ("ended", None if run.finished_at is None else _time(run.finished_at)),
        ("error", run.error),
    ]
    facts += [(f"config.{key}", value) for key, value in run.config.items()]
    facts += [(f"metrics.{key}", value) for key, value in run.metrics.items() if key != "curves"]
    print_table(("field", "value"), facts, title=run.id)


def shown_state(run: Run, *, is_worked_on: bool) -> str:
    """The state in a word that a person understands: an unfinished run without a process is interrupted."""
    from scion_adapters.records import RunState

    if run.state in (RunState.QUEUED, RunState.RUNNING) and not is_worked_on and run.attempt > 0:
        return "interrupted"
    return str(run.state)


def run_json(run: Run) -> dict[str, Any]:
    """A run as `--json` shows it."""
    return {
        "id": run.id,
        "adapter": run.adapter,
        "recipe": run.recipe,
        "state": str(run.state),
        "parent": run.parent,
        "candidate": run.candidate,
        "snapshot_id": run.snapshot_id,
        "directory": run.directory,
        "attempt": run.attempt,
        "error": run.error,
        "actor": run.actor,
        "created_at": run.created_at,
        "updated_at": run.updated_at,
        "finished_at": run.finished_at,
        "config": dict(run.config),
        "metrics": dict(run.metrics),
    }


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")
