"""One run at a time per adapter: who holds the lease `run:<adapter>`, and whether that process still lives.

The process that creates a run claims the lease and hands it to the child that trains. A holder names its run, host and
process, so that a run whose process was killed can be resumed at once on the same host, and after the lease's time
anywhere.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil
import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError
from scion_adapters.leases import current_holder, release, try_acquire
from scion_adapters.tables import leases

LEASE_TTL_S = 30.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that works on a run."""

    run_id: str  # or another name for what is done
    host: str
    pid: int
    started_at: int  # of the process, Unix seconds: process numbers are reused

    @classmethod
    def of(cls, run_id: str, pid: int | None = None) -> Holder:
        """This process, or the process `pid` of this host."""
        process = psutil.Process(pid)
        return cls(run_id, socket.gethostname()[:48], process.pid, int(process.create_time()))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        parts = text.split("/")
        if len(parts) != 4 or not parts[2].isdigit() or not parts[3].isdigit():
            return None
        return cls(parts[0], parts[1], int(parts[2]), int(parts[3]))

    def __str__(self) -> str:
        return f"{self.run_id}/{self.host}/{self.pid}/{self.started_at}"

    def describe(self) -> str:
        """For messages."""
        return f"{self.run_id} (process {self.pid} on {self.host})"

    def is_dead(self) -> bool:
        """True only when that is certain: a process of this host that has gone."""
        if self.host != socket.gethostname()[:48]:
            return False
        try:
            process = psutil.Process(self.pid)
            return int(process.create_time()) != self.started_at or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def lease_name(adapter: str) -> str:
    return f"run:{adapter}"


def working_on(database: Database, adapter: str) -> Holder | None:
    """The live process that trains `adapter`, as far as one can know, or None."""
    text = current_holder(database, lease_name(adapter))
    holder = Holder.parse(text) if text else None
    return None if holder is None or holder.is_dead() else holder


def claim(database: Database, adapter: str, holder: Holder, *, ttl_s: float = LEASE_TTL_S) -> None:
    """Take the lease for `holder`, also from a dead process. Raises ConflictError that names the running run."""
    name = lease_name(adapter)
    free_if_dead(database, name)
    if not try_acquire(database, name, str(holder), ttl_s):
        running = Holder.parse(current_holder(database, name) or "")
        who = running.describe() if running is not None else "another process"
        raise ConflictError(
            f"adapter {adapter} is being trained by {who}: "
            "wait until it is done (`scion runs list`), or stop that process"
        )


def free_if_dead(database: Database, name: str) -> None:
    """Release the lease `name` if the process that holds it is certainly gone, instead of waiting for its end."""
    text = current_holder(database, name)
    holder = Holder.parse(text) if text else None
    if text and holder is not None and holder.is_dead():
        release(database, name, text)


def hand_over(database: Database, adapter: str, giver: str, taker: Holder) -> bool:
    """Pass the lease on without a moment in which nobody holds it. False when `giver` does not hold it."""
    with database.write() as connection:
        passed = (
            sa.update(leases)
            .where(leases.c.name == lease_name(adapter), leases.c.holder == giver)
            .values(holder=str(taker))
        )
        return connection.execute(passed).rowcount == 1
