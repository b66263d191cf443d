"""The errors of every package: one base class, subclasses that are also the standard error a caller would expect.

A message names the value, what was expected and the remedy. `exit_code` is what the command line exits with.
"""

from __future__ import annotations


class ScionError(Exception):
    """Base of all errors that we raise on purpose."""

    exit_code = 1


class InvalidInputError(ScionError, ValueError):
    """The caller's value is wrong. `field` names the setting or JSON field, if there is one."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(ScionError, LookupError):
    """The named adapter, version, run, feedback row... does not exist."""

    exit_code = 3

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # LookupError subclasses such as KeyError would add quotes


class ConflictError(ScionError, ValueError):
    """The request is well formed and contradicts the present state (a second rollout, a reused id)."""

    exit_code = 4


class RejectedError(ScionError, ValueError):
    """An adapter was refused by a check. `reason` is the short machine-readable name of the check."""

    exit_code = 5

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnavailableError(ScionError, RuntimeError):
    """Something that we depend on (database, server, disk) does not answer; trying again may help."""

    exit_code = 6
