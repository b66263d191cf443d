"""Registers this package's commands. Nothing heavy is imported before a command runs: `scion --help` must be quick."""

from __future__ import annotations

import typer

from scion_adapters.cli import (
    adapters_commands,
    configuration_commands,
    database_commands,
    keys_commands,
    rollout_commands,
    status_commands,
)


def register(app: typer.Typer) -> None:
    """Add `init`, `doctor`, `db`, `adapters`, `status`, `events`, `rollout`, `rollback` and `keys` to `scion`."""
    configuration_commands.register(app)
    database_commands.register(app)
    adapters_commands.register(app)
    status_commands.register(app)
    rollout_commands.register(app)
    keys_commands.register(app)
