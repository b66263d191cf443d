"""`scion rollout` and `scion rollback`: carrying a version to users, and back.

What may be done, and what it does, is decided in rollouts.py; here it is asked for, waited for and shown.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scion_adapters.cli.output import (
    JsonOption,
    ReasonOption,
    actor,
    console,
    error_console,
    format_time,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from scion_adapters.database import Database
    from scion_adapters.records import Rollout
    from scion_adapters.rollouts import Rollouts
    from scion_adapters.settings import Settings

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The adapter, such as chat.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Return only when it is done; see --timeout.")]
TimeoutOption = Annotated[
    str | None,
    typer.Option("--timeout", metavar="TIME", help="With --wait: give up waiting after this, e.g. 30m."),
]


def register(app: typer.Typer) -> None:
    """Add `rollout` and `rollback` to `scion`."""
    group = typer.Typer(name="rollout", help="Carry a version to users in steps.", no_args_is_help=True)
    group.command("start")(start)
    group.command("status")(status)
    group.command("pause")(pause)
    group.command("resume")(resume)
    group.command("approve")(approve)
    group.command("promote")(promote)
    group.command("abort")(abort)
    app.add_typer(group)
    app.command("rollback")(rollback)


def start(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="An accepted version, such as chat:8.")],
    steps: Annotated[
        str | None, typer.Option(metavar="LIST", help="Shares of users, such as 10%,50%,100%; default rollout.steps.")
    ] = None,
    every: Annotated[
        str | None, typer.Option(metavar="TIME", help="How long each step lasts, e.g. 5m; default rollout.every_s.")
    ] = None,
    after_requests: Annotated[
        int | None, typer.Option(metavar="N", help="Or: each step lasts until the version has answered N requests.")
    ] = None,
    guard: Annotated[
        bool | None,
        typer.Option("--guard/--no-guard", help="Abort when users like it less; default rollout.guard."),
    ] = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Start a rollout. With --wait: exit code 0 when it was promoted, 1 when it was aborted."""
    from scion_adapters.records import RolloutState, parse_version_ref
    from scion_adapters.rollout_plan import parse_duration, parse_steps

    timeout_s = None if timeout is None else parse_duration(timeout, field="timeout")
    settings, _database, rollouts = _open()
    rollout = rollouts.start(
        parse_version_ref(version),
        steps=settings.rollout.steps if steps is None else parse_steps(steps),
        every_s=None if every is None else parse_duration(every),
        after_requests=after_requests,
        guard=settings.rollout.guard if guard is None else guard,
        actor=actor(),
        reason=reason,
    )
    if wait:
        rollout = _wait_until_ended(rollouts, rollout, settings, timeout_s)
    _show(rollout, as_json)
    if rollout.state is RolloutState.ABORTED:
        raise typer.Exit(1)


def status(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this adapter, its past included.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the newest first.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show rollouts that run, and with NAME those that ended."""
    from scion_adapters.rollout_progress import read_progress

    settings, database, rollouts = _open()
    found = [r for r in rollouts.list(name, limit=limit) if name is not None or r.state.is_active]
    shown = [(rollout, read_progress(database, rollout, settings)) for rollout in found]
    if as_json:
        print_json([{**rollout_json(rollout), "progress": progress} for rollout, progress in shown])
        return
    if not shown:
        console.print(f"{name} never had a rollout." if name else "No rollout runs: `scion rollout start VERSION`.")
        return
    columns = ("rollout", "version", "from", "state", "step", "share", "step's progress", "loaded", "liked", "message")
    print_table(
        columns,
        [
            (
                rollout.id,
                f"{rollout.adapter}:{rollout.number}",
                "base" if rollout.stable == 0 else rollout.stable,
                rollout.state,
                f"{rollout.step + 1}/{len(rollout.steps)}" if rollout.state.is_active else None,
                f"{rollout.weight:.0%}" if rollout.state.is_active else None,
                progress.step_text,
                progress.loaded_text,
                progress.liked_text,
                rollout.message,
            )
            for rollout, progress in shown
        ],
    )


def pause(name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Keep the present share until you decide; also the guard stands still."""
    _show(_open()[2].pause(name, actor=actor(), reason=reason), as_json)


def resume(name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Go on with a paused rollout; its step begins anew."""
    _show(_open()[2].resume(name, actor=actor(), reason=reason), as_json)


def approve(name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Let a rollout go on that waits for a person; see gates.approve_first."""
    _show(_open()[2].approve(name, actor=actor(), reason=reason), as_json)


def promote(name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Give the challenger all users now and make it champion."""
    _show(_open()[2].promote(name, actor=actor(), reason=reason), as_json)


def abort(name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Give all users back to the champion now."""
    _show(_open()[2].abort(name, actor=actor(), reason=reason), as_json)


def rollback(
    name: NameArgument,
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", help="The version to return to; 0 is the base."),
    ] = None,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Return to the version before: a running rollout is aborted; else the previous version serves again."""
    from scion_adapters.records import RolloutState
    from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s, wait_until_routed
    from scion_adapters.rollout_plan import parse_duration

    timeout_s = 60.0 if timeout is None else parse_duration(timeout, field="timeout")
    settings, database, rollouts = _open()
    started = time.monotonic()
    result = rollouts.rollback(name, to=to, actor=actor(), reason=reason)
    data: dict[str, Any] = dataclasses.asdict(result)
    back_to = "the base" if result.to_number == 0 else f"{name}:{result.to_number}"
    text = f"{name}: from {result.from_number or 'the base'} back to {back_to}"
    if wait:
        revision = result.routing_revision
        if result.rollout_id is not None:
            ended = _wait_until_ended(rollouts, rollouts.get(result.rollout_id), settings, timeout_s)
            data["state"] = ended.state
            revision = rollouts.routing_revision()
        ledger = ReplicaLedger(database)
        live = wait_until_routed(
            ledger,
            revision,
            timeout_s,
            heartbeat_ttl_s(settings),
            poll_s=min(settings.rollout.poll_interval_s, 0.05),
        )
        data |= {"seconds": round(time.monotonic() - started, 3), "servers": [replica.id for replica in live]}
        text += f"; {len(live)} live servers act on it after {data['seconds']} s" if live else "; no server is live"
    elif result.pending:
        text += f", as soon as all servers have loaded it ({result.rollout_id}; `scion rollout status {name}`)"
    if as_json:
        print_json(data)
    else:
        console.print(text + ".", soft_wrap=True, highlight=False)
    if data.get("state") == RolloutState.ABORTED:
        raise typer.Exit(1)


def _open() -> tuple[Settings, Database, Rollouts]:
    from scion_adapters.registry import open_registry
    from scion_adapters.rollouts import open_rollouts
    from scion_adapters.settings import load_settings

    settings = load_settings()
    database = open_registry(settings).database
    return settings, database, open_rollouts(settings, database)


def _wait_until_ended(rollouts: Rollouts, rollout: Rollout, settings: Settings, timeout_s: float | None) -> Rollout:
    """Follow the rollout on stderr until it has ended. Interrupting ends the waiting, not the rollout."""
    from scion_adapters.errors import UnavailableError
    from scion_adapters.records import RolloutState

    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    said = None
    with error_console.status("") as spinner:
        while True:
            news = (rollout.state, rollout.share, rollout.message)
            if news != said:
                said = news
                share = "" if rollout.state is RolloutState.ABORTED else f"{rollout.share:.0%}"
                line = f"{time.strftime('%H:%M:%S')}  {share:>4}  {rollout.message}"
                error_console.print(line, highlight=False, markup=False)
                spinner.update(f"{rollout.adapter}:{rollout.number} {rollout.state}")
            if not rollout.state.is_active:
                return rollout
            if deadline is not None and time.monotonic() >= deadline:
                raise UnavailableError(
                    f"rollout {rollout.id} has not ended after {timeout_s:g} s, it goes on: {rollout.message}"
                )
            time.sleep(settings.rollout.poll_interval_s)
            rollout = rollouts.get(rollout.id)


def rollout_json(rollout: Rollout) -> dict[str, Any]:
    """Its record, its version's name, and as `weight` the share of users that this version has by it."""
    version = f"{rollout.adapter}:{rollout.number}"
    return {**dataclasses.asdict(rollout), "version": version, "weight": rollout.share}


def _show(rollout: Rollout, as_json: bool) -> None:
    from scion_adapters.records import RolloutState

    if as_json:
        print_json(rollout_json(rollout))
        return
    share = "" if rollout.state is RolloutState.ABORTED else f" at {rollout.share:.0%} of users"
    begun = f", since {format_time(rollout.step_started_at)}" if rollout.state.is_active else ""
    console.print(
        f"{rollout.adapter}:{rollout.number} {rollout.state}{share}{begun} ({rollout.id}): {rollout.message}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
