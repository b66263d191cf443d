"""One run at a time per adapter: who holds the lease `run:<adapter>`, and whether that process still lives.

The process that creates a run claims the lease and hands it to the child that trains. A holder names its run, host and
process, so that a run whose process was killed can be resumed at once on the same host, and after the lease's time
anywhere.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError
from scion_adapters.leases import current_holder, release, try_acquire
from scion_adapters.tables import leases

LEASE_TTL_S = 30.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_STEADY = re.compile(r"[0-9]+@[0-9a-f]{12}")
_BY_CLOCK = re.compile(r"[0-9]+")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that works on a run."""

    run_id: str  # or another name for what is done
    host: str
    pid: int
    started: str  # when the process did, see `_started`: process numbers are reused

    @classmethod
    def of(cls, run_id: str, pid: int | None = None) -> Holder:
        """This process, or the process `pid` of this host."""
        process = psutil.Process(pid)
        return cls(run_id, socket.gethostname()[:48], process.pid, _started(process))

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        parts = text.split("/")
        if len(parts) != 4 or not parts[2].isdigit():
            return None
        if not (_STEADY.fullmatch(parts[3]) or _BY_CLOCK.fullmatch(parts[3])):
            return None
        return cls(parts[0], parts[1], int(parts[2]), parts[3])

    def __str__(self) -> str:
        return f"{self.run_id}/{self.host}/{self.pid}/{self.started}"

    def describe(self) -> str:
        """For messages."""
        return f"{self.run_id} (process {self.pid} on {self.host})"

    def is_dead(self) -> bool:
        """True only when that is certain: a process of this host that has gone."""
        if self.host != socket.gethostname()[:48]:
            return False
        try:
            process = psutil.Process(self.pid)
            return process.status() == psutil.STATUS_ZOMBIE or _certainly_differ(self.started, _started(process))
        except psutil.NoSuchProcess:
            return True


def _started(process: psutil.Process) -> str:
    """When `process` started, as `ticks since boot@boot`, or in Unix seconds where the system does not tell.

    Linux knows no Unix time of a start: psutil adds the ticks to a boot time that moves when the clock is set.
    """
    try:
        # The command's name, in brackets, may contain anything; the start is field 22, and the name field 2.
        fields = Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        steady = f"{fields[19]}@{BOOT_ID.read_text().strip().replace('-', '')[:12]}"
    except (OSError, IndexError):
        steady = ""
    return steady if _STEADY.fullmatch(steady) else str(int(process.create_time()))


def _certainly_differ(stored: str, found: str) -> bool:
    """Whether two start times belong to two processes with the same number.

    Unix seconds never say so: earlier releases stored them, and a set clock makes those of a live process differ. If
    the number of a dead one was reused, its lease is free once it runs out, which it does as nobody renews it.
    """
    return bool(_STEADY.fullmatch(stored) and _STEADY.fullmatch(found)) and stored != found


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
