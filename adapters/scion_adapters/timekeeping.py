"""Steps of rollouts last as long as they should, although somebody sets the clock that times them.

A clock that was set is noticed by comparing it with this process's monotonic one; the timers of the present steps are
then moved along. Knows nothing of what happens at the end of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.records import RolloutState
from scion_adapters.tables import rollouts

SET_S = 2.0
"""A clock that differs by more than this from the monotonic one was set; less is a slow database or a slewed clock."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Timekeeper:
    """Remembers when this process looked last, by both clocks."""

    monotonic: Callable[[], float] = time.monotonic
    _last: tuple[float, float] | None = field(default=None)

    def look(self, now: float, trusted_s: float) -> tuple[float, float]:
        """(by how much the clock was set since the last look, seconds since then); zeros if that was too long ago.

        `trusted_s`: after more than this, somebody else may have looked after the timers meanwhile.
        """
        monotonic = self.monotonic()
        last, self._last = self._last, (now, monotonic)
        if last is None or monotonic - last[1] > trusted_s:
            return 0.0, 0.0
        elapsed = monotonic - last[1]
        moved = now - last[0] - elapsed
        return (moved, elapsed) if abs(moved) > SET_S else (0.0, elapsed)


def keep_time(database: Database, now: float, timekeeper: Timekeeper | None, *, trusted_s: float) -> None:
    """Move the timers of progressing rollouts along if the clock was set; none is in the future afterwards."""
    moved, elapsed = timekeeper.look(now, trusted_s) if timekeeper is not None else (0.0, 0.0)
    started, is_progressing = rollouts.c.step_started_at, rollouts.c.state == RolloutState.PROGRESSING
    future = sa.select(sa.func.count()).select_from(rollouts).where(is_progressing, started > now)
    with database.read() as connection:
        if not moved and not connection.execute(future).scalar_one():
            return
    _log.warning("the clock was set, by %+.0f s: the present steps of rollouts last as long as before", moved)
    with database.write() as connection:
        if moved:  # steps that began since the last look did so by the new clock
            is_new = started.between(now - elapsed - SET_S, now)
            timed = is_progressing & rollouts.c.every_s.is_not(None) & ~is_new
            connection.execute(sa.update(rollouts).where(timed).values(step_started_at=started + moved))
        connection.execute(sa.update(rollouts).where(is_progressing, started > now).values(step_started_at=now))
