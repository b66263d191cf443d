"""`scion red-team run`: what a version answers to a suite of probes, for people and for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scion_adapters.cli.output import JsonOption, console, error_console, print_json, print_table
from scion_adapters.errors import RejectedError
from scion_trainer.limits import bind_process

if TYPE_CHECKING:
    from scion_trainer.red_team.inspection import Inspection

_MAX_SHOWN_CHARS = 160


def red_team_run(
    ref: Annotated[str, typer.Argument(metavar="NAME|REF", help="chat (its champion), chat:7, chat@alias or chat:0.")],
    suite: Annotated[
        Path | None, typer.Option("--suite", help="JSON lines of probes. Default: gates.red_team_suite, else ours.")
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep what failed as feedback, which the next run learns from.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Ask a version every probe of a suite, through the server, and show which answers fail their checks."""
    from scion_adapters.database import open_database
    from scion_adapters.registry import open_registry
    from scion_adapters.settings import load_settings
    from scion_feedback.findings import record_findings
    from scion_trainer.red_team.attack import findings
    from scion_trainer.red_team.inspection import inspect_version
    from scion_trainer.red_team.suite import load_suite

    settings = load_settings()
    bind_process(settings.trainer.cores, settings.trainer.threads)
    chosen = load_suite(settings, suite)
    database = open_database(settings)
    registry = open_registry(settings, database)
    found = inspect_version(settings, registry.resolve(ref), chosen, database=database, registry=registry)
    recorded = record_findings(database, found.ref, findings(found.failed, chosen.digest)) if record else []
    if json:
        print_json({**inspection_json(found), "recorded": recorded})
    else:
        _print_inspection(found)
        if record:
            error_console.print(f"{len(recorded)} findings recorded as feedback.")
    limit = settings.gates.red_team_max_share
    if limit is not None and found.failed_share > limit:
        raise typer.Exit(RejectedError.exit_code)


def inspection_json(found: Inspection) -> dict[str, Any]:
    """An inspection as `--json` shows it."""
    from scion_trainer.red_team.attack import by_category

    return {
        "version": str(found.ref),
        "suite": found.suite.origin,
        "suite_digest": found.suite.digest,
        "probes": len(found.attempts),
        "failed": len(found.failed),
        "failed_share": found.failed_share,
        "left_out": found.num_left_out,
        "categories": {
            category: {"probes": asked, "failed": failed}
            for category, (failed, asked) in by_category(found.attempts).items()
        },
        "answers": [
            {
                "probe": attempt.probe.id,
                "category": attempt.probe.category,
                "prompt": attempt.probe.messages[-1]["content"],
                "answer": attempt.answer.text,
                "check": attempt.check,
                "fault": attempt.fault,
            }
            for attempt in found.attempts
        ],
    }


def _print_inspection(found: Inspection) -> None:
    from scion_trainer.red_team.attack import by_category

    print_table(
        ("category", "probes", "failed"),
        [(category, asked, failed) for category, (failed, asked) in by_category(found.attempts).items()],
        title=str(found.ref),
    )
    if found.failed:
        print_table(
            ("probe", "check", "what is wrong", "answer"),
            [(a.probe.id, a.check, a.fault, " ".join(a.answer.text.split())[:_MAX_SHOWN_CHARS]) for a in found.failed],
        )
    left_out = f"; {found.num_left_out} probes do not fit this base and were left out" if found.num_left_out else ""
    console.print(
        f"{found.ref} fails {len(found.failed)} of {len(found.attempts)} probes of {found.suite.origin}{left_out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
