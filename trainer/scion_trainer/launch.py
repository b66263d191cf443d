"""Starts runs: creates them, gives each a child process, and says how that process ended.

Used by the command line and by the daemon. It knows nothing of torch; the child (`run.py`) trains.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from scion_adapters.database import Database
from scion_adapters.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    RejectedError,
    ScionError,
    UnavailableError,
)
from scion_adapters.leases import release
from scion_adapters.records import Run, RunState
from scion_adapters.registry import open_registry
from scion_adapters.settings import CONFIG_ENV, Settings
from scion_trainer.config import run_config
from scion_trainer.memory import OutOfMemoryError, killed_message
from scion_trainer.run import HOLDER_ENV
from scion_trainer.run_lease import Holder, claim, lease_name, working_on
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError

MAX_ATTEMPTS = 5
"""A run that died this often is given up: it would die again, and keep the adapter's later runs waiting."""

MALLOC_THRESHOLD_ENV = "MALLOC_MMAP_THRESHOLD_"
"""glibc raises this by itself to 32 MiB and then keeps freed activations in fragments: a run of a 60M-parameter base
took 2.1 GiB, 1.4 with 8 MiB, and 1.0 with 1 MiB at half the speed. Other allocators ignore it."""

Process = subprocess.Popen[bytes]


class RunKilledError(ScionError):
    """The child was ended by a signal, by the kernel's out-of-memory killer as a rule."""


def create_run(
    settings: Settings,
    database: Database,
    adapter: str,
    recipe: str,
    *,
    actor: str,
    since: float | None = None,
) -> Run:
    """A new run that goes on from the adapter's champion. Raises ConflictError while another one works."""
    if adapter not in settings.adapters:
        raise NotFoundError(
            f"adapter {adapter!r} is not configured: the configuration has {', '.join(sorted(settings.adapters))}; "
            f"add [adapters.{adapter}]"
        )
    if (holder := working_on(database, adapter)) is not None:
        raise ConflictError(
            f"adapter {adapter} is being trained by {holder.describe()}: "
            "wait until it is done (`scion runs list`), or stop that process"
        )
    registry = open_registry(settings, database)
    registry.ensure_adapter(adapter)
    parent = registry.resolve(adapter)
    return RunStore(database).create(
        adapter,
        run_config(settings, recipe, since=since),
        parent=parent.number,
        directory=registry.store.runs_path,
        actor=actor,
    )


def resumable_run(database: Database, adapter: str) -> Run:
    """The newest unfinished run that no process works on. Raises NotFoundError or ConflictError."""
    run = RunStore(database).unfinished(adapter)
    if run is None:
        raise NotFoundError(f"adapter {adapter} has no unfinished run: start one with `scion train {adapter}`")
    holder = working_on(database, adapter)
    if holder is not None:
        raise ConflictError(f"{holder.describe()} is running already: there is nothing to resume")
    return run


def launch_run(
    settings: Settings, database: Database, run: Run, *, started: Callable[[Process], None] = lambda _process: None
) -> Run:
    """Train `run` in a child process and wait for its end. Returns the run once it has published.

    `started` is given the process, so that the caller can stop it. Raises ConflictError while another run of the
    adapter works, RunInterruptedError when the run was stopped and can be resumed, RunKilledError when a signal ended
    it, and otherwise the error that the child ended with.
    """
    runs = RunStore(database)
    if run.attempt >= MAX_ATTEMPTS:
        runs.fail(run.id, f"given up after {run.attempt} attempts; the last one: {run.error or 'its process died'}")
        raise ScionError(
            f"{run.id} died {run.attempt} times and is given up: start a new run, with less memory perhaps"
        )
    holder = Holder.of(run.id)
    try:
        claim(database, run.adapter, holder)
    except ConflictError as error:
        _give_up_unstarted(database, run, error)
        raise
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "scion_trainer.run", run.id],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # our stdout is for the command's result
            env={**os.environ, **child_environment(settings), HOLDER_ENV: str(holder)},
        )
        started(process)
        status = _wait(process)
    finally:
        release(database, lease_name(run.adapter), str(holder))  # if the child never took it
    return _outcome(runs, run.id, status)


def _give_up_unstarted(database: Database, run: Run, refusal: ConflictError) -> None:
    """End a run that came second: whoever waits for it has been told, and no restart of the daemon may begin it late.

    A run that has begun may be resumed later, and one that another process is about to begin is that process's.
    """
    winner = working_on(database, run.adapter)
    if run.attempt == 0 and winner is not None and winner.run_id != run.id:
        RunStore(database).fail(run.id, f"never started: {refusal}")


def child_environment(settings: Settings) -> dict[str, str]:
    """What the child needs to read the same configuration, and to look for no model on the network."""
    environment = {"PYTHONUNBUFFERED": "1", MALLOC_THRESHOLD_ENV: os.environ.get(MALLOC_THRESHOLD_ENV, "8388608")}
    if (file := type(settings).file) is not None:
        environment[CONFIG_ENV] = str(file)
    if settings.base_path is not None:
        environment["HF_HUB_OFFLINE"] = "1"
    return environment


def _wait(process: Process) -> int:
    """Wait for the child. Ctrl-C reaches it too, as it shares the terminal: it then writes a checkpoint and ends."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.kill()
            return process.wait()


def _outcome(runs: RunStore, run_id: str, status: int) -> Run:
    run = runs.get(run_id)
    if run.state is RunState.SUCCEEDED:
        return run
    if status < 0:
        name = signal.Signals(-status).name
        runs.interrupt(run_id, killed_message(name))
        raise RunKilledError(f"{run_id}: {killed_message(name)}")
    if run.state is RunState.FAILED:
        raise _error_for(status, run.error or "it failed without a message")
    if run.state is RunState.QUEUED and run.error:
        raise _error_for(status, f"{run.error} (resume with `scion train {run.adapter} --resume`)")
    message = f"the training process ended with status {status}; its last lines on stderr say why"
    if status != ConflictError.exit_code:
        runs.interrupt(run_id, message)
    raise _error_for(status, f"{run_id}: {message}")


def _error_for(status: int, message: str) -> ScionError:
    """The error of the child as one of ours, by its exit status."""
    kinds: dict[int, Callable[[str], Any]] = {
        InvalidInputError.exit_code: InvalidInputError,
        NotFoundError.exit_code: NotFoundError,
        ConflictError.exit_code: ConflictError,
        RejectedError.exit_code: lambda text: RejectedError(text, reason="preflight"),
        OutOfMemoryError.exit_code: UnavailableError,
        RunInterruptedError.exit_code: RunInterruptedError,
    }
    error = kinds.get(status, ScionError)(message)
    assert isinstance(error, ScionError)
    return error
