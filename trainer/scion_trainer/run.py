"""One run in a process of its own: `python -m scion_trainer.run RUN_ID`. The same command again resumes it.

What it does is in execution.py. Here are its lease, how it ends and what is written down of that. Nothing heavy is
imported before the process is bound to its cores and threads, because torch reads them once. Exit status: 0 published,
75 stopped and resumable, otherwise the error's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from scion_adapters.database import Database, open_database
from scion_adapters.errors import InvalidInputError, ScionError, UnavailableError
from scion_adapters.leases import HeldLease
from scion_adapters.records import Run
from scion_adapters.settings import Settings, load_settings
from scion_trainer.execution import execute
from scion_trainer.limits import bind_process, quiet_libraries
from scion_trainer.lowering import is_out_of_memory
from scion_trainer.memory import OutOfMemoryError
from scion_trainer.run_lease import LEASE_TTL_S, Holder, claim, hand_over, lease_name
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError, StopRequest

HOLDER_ENV = "SCION_RUN_HOLDER"
"""Set by the process that created the run: the holder that passes the lease on to this process."""

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Execute the run that the arguments name; returns the exit status."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m scion_trainer.run RUN_ID\n")
        return InvalidInputError.exit_code
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that we do not use
    quiet_libraries()
    run_id = argv[1]
    stop = StopRequest()
    stop.install()
    try:
        settings = load_settings()
        bind_process(settings.trainer.cores, settings.trainer.threads)
        database = open_database(settings)
        run = RunStore(database).get(run_id)
        holder = Holder.of(run_id)
        giver = os.environ.pop(HOLDER_ENV, "")
        if not (giver and hand_over(database, run.adapter, giver, holder)):
            claim(database, run.adapter, holder)
        with HeldLease(database, lease_name(run.adapter), str(holder), ttl_s=LEASE_TTL_S) as lease:
            return _attempt(settings, database, run, lambda: stop.is_set() or lease.lost.is_set())
    except ScionError as error:
        sys.stderr.write(f"{run_id}: {error}\n")
        return error.exit_code


def _attempt(settings: Settings, database: Database, run: Run, stop_requested: Callable[[], bool]) -> int:
    """Execute the run and write down how that ended."""
    runs = RunStore(database)
    try:
        execute(settings, database, run.id, stop_requested=stop_requested)
    except OutOfMemoryError as error:
        runs.fail(run.id, str(error))
        return error.exit_code
    except (RunInterruptedError, UnavailableError) as error:  # nothing is wrong with the run: it can go on later
        runs.interrupt(run.id, str(error))
        return error.exit_code
    except ScionError as error:
        runs.fail(run.id, str(error))
        return error.exit_code
    except Exception as error:
        if is_out_of_memory(error):
            shortage = OutOfMemoryError(
                f"memory ran out ({type(error).__name__}: {str(error)[:200]}): "
                "lower trainer.micro_batch_size or trainer.max_length, and start a new run"
            )
            runs.fail(run.id, str(shortage))
            return shortage.exit_code
        logger.exception("run %s failed", run.id)
        runs.fail(run.id, f"{type(error).__name__}: {error}")
        return ScionError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
