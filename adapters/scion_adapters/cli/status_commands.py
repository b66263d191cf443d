"""`scion status` and `scion events`: what is going on, and what led to it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from scion_adapters.cli.output import (
    JsonOption,
    console,
    format_age,
    format_bytes,
    format_time,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from scion_adapters.status import AdapterStatus, Status


def register(app: typer.Typer) -> None:
    """Add `status` and `events` to `scion`."""
    app.command()(status)
    app.command()(events)


def status(as_json: JsonOption = False) -> None:
    """Show adapters, servers, rollouts, runs and feedback."""
    from scion_adapters.cli.rollout_commands import rollout_json
    from scion_adapters.clock import now
    from scion_adapters.registry import open_registry
    from scion_adapters.settings import load_settings
    from scion_adapters.status import read_status

    settings = load_settings()
    present = read_status(open_registry(settings).database, settings)
    if as_json:
        rollouts = [rollout_json(rollout) for rollout in present.rollouts]
        print_json({**dataclasses.asdict(present), "rollouts": rollouts})
    else:
        _print_status(present, now())


def events(
    name: Annotated[str | None, typer.Argument(help="Only this adapter's events.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the newest ones.")] = 30,
    after: Annotated[int, typer.Option("--after", min=0, help="Only events after this id.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show who changed what, when and why."""
    from scion_adapters.events import list_events
    from scion_adapters.registry import open_registry
    from scion_adapters.settings import load_settings

    registry = open_registry(load_settings())
    if name is not None:
        registry.aliases(name)  # a name that does not exist is an error, not an empty list
    found = list_events(registry.database, adapter=name, after_id=after, limit=limit, newest=True)
    if as_json:
        print_json(found)
        return
    rows = [
        (event.id, format_time(event.at), event.kind, _subject(event.adapter, event.number), event.actor, event.reason)
        for event in found
    ]
    print_table(("id", "time", "event", "of", "by", "why"), rows)


def _subject(adapter: str | None, number: int | None) -> str | None:
    return adapter if number is None else f"{adapter}:{number}"


def _print_status(present: Status, now_s: float) -> None:
    print_table(
        ("adapter", "champion", "challenger", "share", "previous", "aliases", "versions"),
        [
            (
                item.adapter,
                "base" if item.champion == 0 else item.champion,
                item.challenger,
                f"{item.weight:.0%}" if item.challenger is not None else None,
                "base" if item.previous == 0 else item.previous,
                ", ".join(f"{alias}={number}" for alias, number in item.aliases.items()) or None,
                _versions_text(item),
            )
            for item in present.adapters
        ],
        title="Adapters",
    )
    print_table(
        ("server", "url", "heartbeat", "slots", "loaded", "in flight", "trouble"),
        [
            (
                item.id,
                item.url,
                f"{format_age(item.heartbeat_age_s)} ago",
                f"{len(item.loaded)} of {item.slots}",
                ", ".join(item.loaded) or None,
                item.in_flight,
                "; ".join(f"{version}: {why}" for version, why in item.failed.items())
                or ("has not seen the newest routing" if item.behind else None),
            )
            for item in present.replicas
        ],
        title="Servers",
    )
    if present.rollouts:
        print_table(
            ("rollout", "of", "state", "share", "message"),
            [
                (item.id, f"{item.adapter}:{item.number}", item.state, f"{item.weight:.0%}", item.message)
                for item in present.rollouts
            ],
            title="Rollouts",
        )
    if present.runs:
        print_table(
            ("run", "adapter", "recipe", "state", "candidate", "started", "error"),
            [
                (
                    run["id"],
                    run["adapter"],
                    run["recipe"],
                    run["state"],
                    run["candidate"],
                    _ago(run, now_s),
                    run["error"],
                )
                for run in present.runs
            ],
            title="Latest runs",
        )
    journal = "none here" if present.journal_bytes is None else format_bytes(present.journal_bytes)
    access = "open, no API keys" if present.is_open else f"{present.num_valid_keys} API keys"
    console.print(
        f"{present.num_completions} completions, {present.num_feedback} votes"
        f" ({present.num_counting_feedback} counting)"
        f"; journal: {journal}; access: {access}; routing revision {present.routing_revision}",
        soft_wrap=True,
    )


def _versions_text(item: AdapterStatus) -> str | None:
    text = ", ".join(f"{count} {state}" for state, count in item.states.items()) or None
    return f"{text} (evaluating {', '.join(map(str, item.evaluating))})" if item.evaluating else text


def _ago(run: dict[str, object], now_s: float) -> str:
    created_at = run["created_at"]
    return f"{format_age(now_s - created_at)} ago" if isinstance(created_at, float) else "-"
