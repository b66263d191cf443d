"""The controller carries rollouts forward. `decide` is pure; `tick` reads, asks it, and writes once per rollout.

It runs inside every server, one at a time under the lease "controller". It never touches a paused rollout, and a
write that was decided on an older state than the present one is dropped: a person's decision outranks it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from scion_adapters import analysis, transitions
from scion_adapters.analysis import UserVotes, Verdict
from scion_adapters.clock import Clock
from scion_adapters.database import Database, time_in
from scion_adapters.errors import UnavailableError
from scion_adapters.events import record
from scion_adapters.records import BASE_NUMBER, Replica, Rollout, RolloutState, VersionRef
from scion_adapters.replicas import describe_lacking, lacking, live_in
from scion_adapters.rollout_plan import format_duration, format_share
from scion_adapters.tables import completions, rollouts
from scion_adapters.timekeeping import Timekeeper, keep_time
from scion_adapters.transitions import Cause, StaleRolloutError
from scion_adapters.versions import load_version, lock_adapter

ACTOR = "controller"
LEASE = "controller"
CLOCKS_DIFFER_S = 24 * 3600.0
"""By so much at most, between hosts or after one was set: bounds a search that the rollout's id already decides."""

_log = logging.getLogger(__name__)


class Action(StrEnum):
    HOLD = "hold"
    SET_STEP = "set_step"
    PROMOTE = "promote"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now and, in words, why or what is waited for. `step` is set for SET_STEP only."""

    action: Action
    message: str
    step: int | None = None


def decide(
    rollout: Rollout,
    *,
    live: Sequence[Replica],
    lora_id: int,
    requests_on_step: int,
    votes: Mapping[int, UserVotes],
    now: float,
) -> Decision:
    """The one next move of a rollout.

    `lora_id` is the challenger's; `requests_on_step` its answers since the present step began; `votes` the ratings of
    this rollout's randomised traffic by version number. A message stays the same while nothing changes, so that
    holding writes nothing.
    """
    if rollout.state is not RolloutState.PROGRESSING:
        return Decision(Action.HOLD, rollout.message)
    if rollout.guard and rollout.step >= 0:
        judgement = analysis.judge(votes.get(rollout.stable, UserVotes()), votes.get(rollout.number, UserVotes()))
        if judgement.verdict is Verdict.FAILED:
            return Decision(Action.ABORT, f"users like {_less_than(rollout)}: {judgement.message}")
    if not live:
        return Decision(Action.HOLD, "no live server: waiting for one to report")
    if lacks := lacking(live, lora_id):
        if failed := {r.id: r.failed[lora_id] for r in live if r.id in lacks and lora_id in r.failed}:
            return Decision(Action.HOLD, f"could not be loaded by {describe_lacking(failed)}")
        return Decision(Action.HOLD, f"waiting until it is loaded by {', '.join(lacks)}")
    if rollout.step < 0:
        return _to_step(rollout, 0)
    if not _step_is_over(rollout, requests_on_step, now):
        return Decision(Action.HOLD, _step_message(rollout, rollout.step))
    if rollout.step + 1 < len(rollout.steps):
        return _to_step(rollout, rollout.step + 1)
    return Decision(Action.PROMOTE, f"all {len(rollout.steps)} steps passed")


def tick(
    database: Database,
    clock: Clock | None = None,
    *,
    heartbeat_ttl_s: float,
    timekeeper: Timekeeper | None = None,
) -> None:
    """Move every progressing rollout by at most one step.

    Time is the database's own clock unless one is injected. A `timekeeper` that sees every tick of this process lets
    steps last as long as they should although that clock was set; without one, a step that began in the future begins
    anew. A rollout that cannot be read or moved is reported in its message and as an event, once, and does not stop the
    others. Raises UnavailableError when the database does not answer.
    """
    with database.read() as connection:
        now = time_in(connection, clock)
    keep_time(database, now, timekeeper, trusted_s=heartbeat_ttl_s)
    with database.read() as connection:
        query = sa.select(rollouts).where(rollouts.c.state == RolloutState.PROGRESSING).order_by(rollouts.c.id)
        rows = connection.execute(query).mappings().all()
        live = live_in(connection, now, heartbeat_ttl_s) if rows else []
    for row in rows:
        try:
            _move(database, transitions.to_rollout(row), live, now)
        except StaleRolloutError:
            continue  # a person was faster; the next tick sees what they decided
        except UnavailableError:
            raise
        except Exception as error:
            _log.exception("rollout %s could not be moved", row["id"])
            _report_failure(database, row, error, now)


def _move(database: Database, rollout: Rollout, live: Sequence[Replica], now: float) -> None:
    with database.read() as connection:
        version = load_version(connection, VersionRef(rollout.adapter, rollout.number))
        requests = requests_on_step(connection, rollout) if rollout.after_requests is not None else 0
        votes: Mapping[int, UserVotes] = {}
        if rollout.guard and rollout.step >= 0:
            numbers = (rollout.stable, rollout.number)
            votes = analysis.votes_in(connection, rollout.adapter, numbers, votes_since(rollout), rollout_id=rollout.id)
    decision = decide(rollout, live=live, lora_id=version.lora_id, requests_on_step=requests, votes=votes, now=now)
    if decision.action is Action.HOLD and decision.message == rollout.message:
        return
    cause = Cause(ACTOR, decision.message, now)
    with database.write() as connection:
        lock_adapter(connection, rollout.adapter)
        if decision.action is Action.HOLD:
            transitions.note(connection, rollout, decision.message, now)
        elif decision.action is Action.SET_STEP:
            assert decision.step is not None
            transitions.set_step(connection, rollout, decision.step, decision.message, cause)
        elif decision.action is Action.PROMOTE:
            transitions.promote(connection, rollout, decision.message, cause)
        else:
            transitions.abort(connection, rollout, decision.message, cause)


def votes_since(rollout: Rollout) -> float:
    """Answers before this are not looked at: none is older than the rollout, but clocks may have been set since."""
    return rollout.created_at - CLOCKS_DIFFER_S


def requests_on_step(connection: sa.Connection, rollout: Rollout) -> int:
    """How many requests the challenger has answered, as drawn by this rollout, since its present step began."""
    query = sa.select(sa.func.count()).where(
        completions.c.adapter == rollout.adapter,
        completions.c.number == rollout.number,
        completions.c.created_at >= rollout.step_started_at,
        completions.c.rollout_id == rollout.id,
    )
    return int(connection.execute(query).scalar_one())


def _report_failure(database: Database, row: sa.RowMapping, error: Exception, now: float) -> None:
    message = f"the controller failed: {type(error).__name__}: {error}"[:2000]
    if row["message"] == message:
        return
    with database.write() as connection:
        unchanged = sa.update(rollouts).where(rollouts.c.id == row["id"], rollouts.c.revision == row["revision"])
        values = {"message": message, "revision": row["revision"] + 1, "updated_at": now}
        if connection.execute(unchanged.values(values)).rowcount == 1:
            record(
                connection,
                now,
                "controller.failed",
                actor=ACTOR,
                reason=message,
                adapter=row["adapter"],
                number=row["number"],
                data={"rollout_id": row["id"]},
            )


def _to_step(rollout: Rollout, step: int) -> Decision:
    return Decision(Action.SET_STEP, _step_message(rollout, step), step)


def _step_is_over(rollout: Rollout, requests_on_step: int, now: float) -> bool:
    if rollout.after_requests is not None:
        return requests_on_step >= rollout.after_requests
    return now - rollout.step_started_at >= (rollout.every_s or 0.0)


def _step_message(rollout: Rollout, step: int) -> str:
    length = f"for {format_duration(rollout.every_s or 0.0)}"
    until = f"until {rollout.after_requests} answers" if rollout.after_requests is not None else length
    return f"step {step + 1} of {len(rollout.steps)}: {format_share(rollout.steps[step])} of users, {until}"


def _less_than(rollout: Rollout) -> str:
    stable = "the base" if rollout.stable == BASE_NUMBER else f"{rollout.adapter}:{rollout.stable}"
    return f"{VersionRef(rollout.adapter, rollout.number)} less than {stable}"
