"""Leases: of all processes on one database, at most one holds a name ("controller", "run:chat") at a time.

One row per name, taken over atomically once it has expired. Time is the database's own clock unless one is injected, so
hosts need not agree on theirs. A holder that was paused past its expiry does not know that it lost: guard your writes,
too, as the controller does with a rollout's revision.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

import sqlalchemy as sa

from scion_adapters.clock import Clock
from scion_adapters.database import Database, insert_ignore, time_in
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.tables import leases

_log = logging.getLogger(__name__)


def try_acquire(database: Database, name: str, holder: str, ttl_s: float, clock: Clock | None = None) -> bool:
    """Take the lease for `ttl_s` seconds, or renew it. False while somebody else holds it.

    When the clock is set back, whoever holds the lease keeps it and can renew it, and nobody else gets in early; from
    the first that asks then, it lasts as long as it was taken for, not for as long as the clock went back.
    """
    with database.write() as connection:
        now = time_in(connection, clock)
        mine = {"holder": holder, "renewed_at": now, "expires_at": now + ttl_s}
        if insert_ignore(connection, leases, [{"name": name, **mine}]):
            return True
        this = leases.c.name == name
        length = leases.c.expires_at - leases.c.renewed_at
        from_now = sa.update(leases).where(this, leases.c.renewed_at > now)
        connection.execute(from_now.values(renewed_at=now, expires_at=now + length))
        may_have = sa.or_(leases.c.holder == holder, leases.c.expires_at <= now)
        return connection.execute(sa.update(leases).where(this, may_have).values(mine)).rowcount == 1


def release(database: Database, name: str, holder: str) -> bool:
    """Give the lease back before it expires. False when `holder` did not hold it."""
    with database.write() as connection:
        given = sa.delete(leases).where(leases.c.name == name, leases.c.holder == holder)
        return connection.execute(given).rowcount == 1


def current_holder(database: Database, name: str, clock: Clock | None = None) -> str | None:
    """Who holds the lease now, or None."""
    with database.read() as connection:
        now = time_in(connection, clock)
        held = sa.select(leases.c.holder).where(leases.c.name == name, leases.c.expires_at > now)
        return connection.execute(held).scalar()


class HeldLease:
    """A lease for the length of a `with` block, renewed by a thread three times per `ttl_s`.

    Entering raises ConflictError when somebody else holds it. `lost` is set once it is not certain any more that we
    hold it: another process took it, or it could not be renewed (database gone) before it runs out. Stop working then.
    """

    def __init__(
        self, database: Database, name: str, holder: str, *, ttl_s: float = 30.0, clock: Clock | None = None
    ) -> None:
        self.lost = threading.Event()
        self._database = database
        self._name = name
        self._holder = holder
        self._ttl_s = ttl_s
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._certain_until = 0.0

    def __enter__(self) -> HeldLease:
        asked_at = time.monotonic()
        if not try_acquire(self._database, self._name, self._holder, self._ttl_s, self._clock):
            other = current_holder(self._database, self._name, self._clock) or "another process"
            raise ConflictError(
                f"{self._name} is held by {other}; wait until it is done "
                f"(if that process is dead, at most {self._ttl_s:g} s)"
            )
        self._certain_until = asked_at + self._ttl_s
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost.is_set():
            try:
                release(self._database, self._name, self._holder)
            except UnavailableError as unavailable:  # it expires by itself
                _log.warning("lease %s could not be released: %s", self._name, unavailable)

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_s / 3):
            asked_at = time.monotonic()
            try:
                if not try_acquire(self._database, self._name, self._holder, self._ttl_s, self._clock):
                    self.lost.set()
                    return
                self._certain_until = asked_at + self._ttl_s
            except UnavailableError as error:
                _log.warning("lease %s could not be renewed: %s", self._name, error)
                if time.monotonic() + self._ttl_s / 3 >= self._certain_until:  # the next attempt would come too late
                    self.lost.set()
                    return
