"""Rollouts as people command them: start, pause, resume, promote, abort, and roll back.

Each verb is one transaction that checks, changes the rollout and the aliases, writes the events and raises the
routing revision; servers act on it when they see the new revision. A person's verb needs no server to be up, and
whatever it wrote the controller leaves alone: the controller's own changes are in controller.py, what a change
consists of in transitions.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import sqlalchemy as sa

from scion_adapters import tables, transitions
from scion_adapters.aliases import load_aliases, set_alias_in
from scion_adapters.clock import Clock, new_id
from scion_adapters.database import Database, time_in
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError
from scion_adapters.events import bump_routing, record
from scion_adapters.records import (
    BASE_NUMBER,
    CHAMPION,
    PREVIOUS,
    Rollout,
    RolloutState,
    Version,
    VersionRef,
    VersionState,
)
from scion_adapters.replicas import describe_lacking, heartbeat_ttl_s, lacking, live_in, settle
from scion_adapters.rollout_plan import check_duration, check_steps, format_share
from scion_adapters.routing import read_revision, routing_in
from scion_adapters.settings import Settings
from scion_adapters.slots import check_slots
from scion_adapters.transitions import Cause
from scion_adapters.versions import load_version, lock_adapter, require_adapter

LOADING = "waiting until all live servers have loaded it"
UNAPPROVED = "waiting for approval: see the report, then `scion rollout approve {0}`, or `scion rollout abort {0}`"


@dataclass(frozen=True, slots=True)
class RollbackResult:
    """`pending`: `to_number` has to be loaded first, by the rollout `rollout_id`. Else it is done once servers see
    `routing_revision`."""

    adapter: str
    from_number: int
    to_number: int
    pending: bool
    rollout_id: str | None
    routing_revision: int


class Rollouts:
    """A handle; cheap to share between threads. `default_every_s`: a step's length when nothing is said.

    Time is the database's own clock unless one is injected, as for the controller and the servers' heartbeats.
    """

    def __init__(
        self, database: Database, clock: Clock | None = None, *, default_every_s: float = 300.0, ttl_s: float = 10.0
    ) -> None:
        self._database = database
        self._clock = clock
        self._default_every_s = default_every_s
        self._ttl_s = ttl_s

    # --- looking ---

    def get(self, rollout_id: str) -> Rollout:
        with self._database.read() as connection:
            rollout = transitions.find_rollout(connection, rollout_id)
        if rollout is None:
            raise NotFoundError(f"rollout {rollout_id[:80]!r} does not exist: `scion rollout status` lists them")
        return rollout

    def active(self, adapter: str) -> Rollout | None:
        """The adapter's rollout that has not ended."""
        with self._database.read() as connection:
            return transitions.find_active(connection, adapter)

    def list(self, adapter: str | None = None, *, limit: int = 100) -> list[Rollout]:
        """The newest `limit` rollouts, newest first."""
        columns = tables.rollouts.c
        query = sa.select(tables.rollouts).order_by(columns.created_at.desc(), columns.id.desc()).limit(limit)
        with self._database.read() as connection:
            if adapter is not None:
                require_adapter(connection, adapter)
                query = query.where(columns.adapter == adapter)
            return [transitions.to_rollout(row) for row in connection.execute(query).mappings()]

    def routing_revision(self) -> int:
        """What servers act on once they have seen every change so far."""
        return read_revision(self._database)

    # --- a rollout ---

    def start(
        self,
        ref: VersionRef,
        *,
        steps: Sequence[float],
        every_s: float | None = None,
        after_requests: int | None = None,
        guard: bool = True,
        approve_first: int = 0,
        actor: str,
        reason: str = "",
    ) -> Rollout:
        """Begin to carry an accepted version to users; it gets traffic once all live servers have loaded it.

        Until `approve_first` versions of the adapter have been promoted, it waits for `approve` before that.

        `steps` are shares in (0, 1], ascending, the last one 1.0; each lasts `every_s` seconds, or until the
        challenger has answered `after_requests` requests on it. Raises InvalidInputError, NotFoundError or
        ConflictError and changes nothing.
        """
        checked = check_steps(steps)
        every_s, after_requests = check_duration(every_s, after_requests, self._default_every_s)
        if ref.number == BASE_NUMBER:
            raise InvalidInputError(
                f"{ref} is the base, which needs no rollout: `scion rollback {ref.adapter} --to 0` returns to it",
                field="version",
            )
        with self._changing(ref.adapter, actor, reason) as (connection, cause):
            version = self._startable(connection, ref)
            check_slots(routing_in(connection), ref, version.lora_id, live_in(connection, cause.at, self._ttl_s))
            if needs_approval(_num_promoted(connection, ref.adapter), approve_first):
                state, message = RolloutState.UNAPPROVED, UNAPPROVED.format(ref.adapter)
            else:
                state, message = RolloutState.PROGRESSING, LOADING
            return _begin(connection, ref, checked, every_s, after_requests, guard, cause, state, message)

    def approve(self, adapter: str, *, actor: str, reason: str = "") -> Rollout:
        """Let a rollout that waits for a person go on."""
        with self._changing(adapter, actor, reason) as (connection, cause):
            rollout = self._active(connection, adapter)
            if rollout.state is not RolloutState.UNAPPROVED:
                raise ConflictError(f"the rollout of {_ref(rollout)} needs no approval: it is {rollout.state}")
            return transitions.approve(connection, rollout, _said("approved", actor, reason) + f"; {LOADING}", cause)

    def pause(self, adapter: str, *, actor: str, reason: str = "") -> Rollout:
        """Keep the present share until a person decides; the controller, its guard included, stands still."""
        with self._changing(adapter, actor, reason) as (connection, cause):
            rollout = self._active(connection, adapter)
            if rollout.state is RolloutState.UNAPPROVED:
                raise ConflictError(f"the rollout of {_ref(rollout)} has not begun: it waits for approval")
            if rollout.state is RolloutState.PAUSED:
                raise ConflictError(f"the rollout of {_ref(rollout)} is already paused, by {rollout.paused_by}")
            message = _said(f"paused at {format_share(rollout.weight)} of users", actor, reason)
            return transitions.pause(connection, rollout, message, cause)

    def resume(self, adapter: str, *, actor: str, reason: str = "") -> Rollout:
        """Continue a paused rollout; its step begins anew."""
        with self._changing(adapter, actor, reason) as (connection, cause):
            rollout = self._active(connection, adapter)
            if rollout.state is not RolloutState.PAUSED:
                remedy = f": `scion rollout approve {adapter}`" if rollout.state is RolloutState.UNAPPROVED else ""
                raise ConflictError(f"the rollout of {_ref(rollout)} is not paused: it is {rollout.state}{remedy}")
            return transitions.resume(connection, rollout, _said("resumed", actor, reason), cause)

    def promote(self, adapter: str, *, actor: str, reason: str = "") -> Rollout:
        """Make the challenger champion now. ConflictError while a live server has not loaded it."""
        with self._changing(adapter, actor, reason) as (connection, cause):
            rollout = self._active(connection, adapter)
            version = load_version(connection, VersionRef(adapter, rollout.number), lock=True)
            if lacks := lacking(live_in(connection, cause.at, self._ttl_s), version.lora_id):
                raise ConflictError(
                    f"{version.ref} cannot be promoted: not loaded by {describe_lacking(lacks)}; wait, or "
                    f"`scion rollout abort {adapter}`"
                )
            return transitions.promote(connection, rollout, _said("promoted", actor, reason), cause)

    def abort(self, adapter: str, *, actor: str, reason: str = "") -> Rollout:
        """Give all traffic back to the champion, at once."""
        with self._changing(adapter, actor, reason) as (connection, cause):
            rollout = self._active(connection, adapter)
            return transitions.abort(connection, rollout, _said("aborted", actor, reason), cause)

    # --- back ---

    def rollback(self, adapter: str, *, to: int | None = None, actor: str, reason: str = "") -> RollbackResult:
        """Away from what users meet now. A refusal changes nothing; without a live server nothing is waited for.

        Without `to`, at once or not at all: a rollout that has traffic is aborted; else the previous version becomes
        champion again, a rollout without traffic is aborted, and there is no `previous` any more, so that a second
        rollback does not bring back what the first one removed. Refused while a live server lacks the previous
        version: the operator must hear that the champion would stay, and what gets users away from it.
        With `to`: that version, or 0 for the base; at once if it is the base, or `previous` and loaded by all live
        servers, else as a rollout to all users once it is loaded.
        """
        with self._changing(adapter, actor, reason or "rollback") as (connection, cause):
            rollout = transitions.find_active(connection, adapter)
            aliases = load_aliases(connection, adapter)
            champion, previous = aliases.get(CHAMPION, BASE_NUMBER), aliases.get(PREVIOUS)
            if to == champion and rollout is None:
                raise ConflictError(f"{adapter}:{to} is the champion already")
            if to is not None and rollout is not None and to == rollout.number:
                raise ConflictError(f"{_ref(rollout)} is the challenger: use `scion rollout promote {adapter}`")
            target = _target_without_to(adapter, champion, previous, rollout) if to is None else to
            lacks: dict[str, str] = {}
            if target == previous and target not in (champion, BASE_NUMBER):
                lora_id = _accepted(connection, VersionRef(adapter, target)).lora_id
                lacks = lacking(live_in(connection, cause.at, self._ttl_s), lora_id)
            if lacks and to is None:
                verb = f"rollback {adapter} --to {target}"
                if rollout is not None and rollout.number == target:
                    verb = f"rollout promote {adapter}"
                raise ConflictError(
                    f"{adapter}:{target} is not loaded by {describe_lacking(lacks)}: nothing was changed, users still "
                    f"meet {adapter}:{champion}; `scion rollback {adapter} --to 0` gives them the base at once, "
                    f"`scion {verb}` returns to {adapter}:{target} once it is loaded"
                )
            leaving = champion
            if rollout is not None:
                if rollout.weight > 0.0 or target == champion:
                    leaving = rollout.number
                transitions.abort(connection, rollout, _said("rolled back", actor, reason), cause)
            if lacks or target not in (champion, previous, BASE_NUMBER):
                started = self._start_return(connection, VersionRef(adapter, target), cause)
                return RollbackResult(adapter, leaving, target, True, started.id, bump_routing(connection))
            if target != champion:
                self._return_to(connection, VersionRef(adapter, target), cause)
            record(
                connection,
                cause.at,
                "rollout.rolled_back",
                actor=actor,
                reason=cause.reason,
                adapter=adapter,
                number=target,
                data={"from": leaving, "to": target},
            )
            return RollbackResult(adapter, leaving, target, False, None, bump_routing(connection))

    # --- inside a transaction ---

    @contextmanager
    def _changing(self, adapter: str, actor: str, reason: str) -> Iterator[tuple[sa.Connection, Cause]]:
        """A write transaction that no other change of this adapter's traffic runs beside."""
        settle(self._database, self._clock)
        with self._database.write() as connection:
            require_adapter(connection, adapter)
            lock_adapter(connection, adapter)
            yield connection, Cause(actor, reason, time_in(connection, self._clock))

    def _active(self, connection: sa.Connection, adapter: str) -> Rollout:
        rollout = transitions.find_active(connection, adapter)
        if rollout is None:
            raise ConflictError(f"{adapter} has no active rollout: `scion rollout start {adapter}:N` begins one")
        return rollout

    def _startable(self, connection: sa.Connection, ref: VersionRef) -> Version:
        version = _accepted(connection, ref)
        if (running := transitions.find_active(connection, ref.adapter)) is not None:
            raise ConflictError(
                f"{ref.adapter} has an active rollout already, {running.id} of {_ref(running)} ({running.state}): "
                f"wait, or `scion rollout promote|abort {ref.adapter}`"
            )
        if ref.number == transitions.champion_of(connection, ref.adapter):
            raise ConflictError(f"{ref} is the champion already")
        return version

    def _start_return(self, connection: sa.Connection, ref: VersionRef, cause: Cause) -> Rollout:
        """A rollout to everybody as soon as `ref` is loaded; ratings have no say in it. See transitions.is_return."""
        version = _accepted(connection, ref)
        check_slots(routing_in(connection), ref, version.lora_id, live_in(connection, cause.at, self._ttl_s))
        return _begin(connection, ref, (1.0,), None, None, False, cause)

    def _return_to(self, connection: sa.Connection, ref: VersionRef, cause: Cause) -> None:
        if ref.number != BASE_NUMBER:
            _accepted(connection, ref)
        for alias, number in ((CHAMPION, ref.number), (PREVIOUS, None)):
            set_alias_in(
                connection, ref.adapter, alias, number, clock_value=cause.at, actor=cause.actor, reason=cause.reason
            )


def needs_approval(num_promoted: int, approve_first: int) -> bool:
    """Pure. `num_promoted`: versions of the adapter that have been champion. Rejected ones earn no trust."""
    return num_promoted < approve_first


def _target_without_to(adapter: str, champion: int, previous: int | None, rollout: Rollout | None) -> int:
    """Where a rollback goes that names no version: away from what users meet. Pure."""
    if rollout is not None and rollout.weight > 0.0:
        return champion
    if previous is not None:
        return previous
    if rollout is not None and champion == BASE_NUMBER:
        return champion  # they are on the base, which nothing comes before: what waits must not follow
    waiting = "" if rollout is None else f"; `scion rollout abort {adapter}` ends the rollout that waits"
    raise ConflictError(
        f"{adapter} has no previous version to return to (champion is {adapter}:{champion}): "
        f"name one with --to N; `scion adapters show {adapter}` lists them, 0 is the base{waiting}"
    )


def open_rollouts(settings: Settings, database: Database) -> Rollouts:
    """Rollouts with the configured defaults."""
    return Rollouts(database, default_every_s=settings.rollout.every_s, ttl_s=heartbeat_ttl_s(settings))


def _begin(
    connection: sa.Connection,
    ref: VersionRef,
    steps: tuple[float, ...],
    every_s: float | None,
    after_requests: int | None,
    guard: bool,
    cause: Cause,
    state: RolloutState = RolloutState.PROGRESSING,
    message: str = LOADING,
) -> Rollout:
    rollout = Rollout(
        id=new_id("rollout"),
        adapter=ref.adapter,
        number=ref.number,
        stable=transitions.champion_of(connection, ref.adapter),
        state=state,
        steps=steps,
        step=-1,
        every_s=every_s,
        after_requests=after_requests,
        guard=guard,
        step_started_at=cause.at,
        message=message,
        actor=cause.actor[:128],
        created_at=cause.at,
        updated_at=cause.at,
        revision=1,
    )
    transitions.start(connection, rollout, cause)
    return rollout


def _num_promoted(connection: sa.Connection, adapter: str) -> int:
    """How many versions of the adapter a rollout has made champion. A return is a way back, and earns no trust."""
    columns = tables.rollouts.c
    query = sa.select(sa.func.count(columns.number.distinct())).where(
        columns.adapter == adapter, columns.state == RolloutState.PROMOTED, ~transitions.ARE_RETURNS
    )
    return int(connection.execute(query).scalar_one())


def _accepted(connection: sa.Connection, ref: VersionRef) -> Version:
    version = load_version(connection, ref, lock=True)
    if version.state is not VersionState.ACCEPTED:
        why = f" ({version.reason})" if version.reason else ""
        remedy = (
            f"; `scion evaluate {ref}` puts it through the gates" if version.state is VersionState.CANDIDATE else ""
        )
        raise ConflictError(f"{ref} is {version.state}{why}: only an accepted version may meet users{remedy}")
    return version


def _said(what: str, actor: str, reason: str) -> str:
    return f"{what} by {actor}" + (f": {reason}" if reason else "")


def _ref(rollout: Rollout) -> VersionRef:
    return VersionRef(rollout.adapter, rollout.number)
