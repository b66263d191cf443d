"""One version under a suite of probes, outside an evaluation: loaded on the servers, asked, and let go.

Owns that order only. Nothing is decided about the version.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, InvalidInputError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import BASE_NUMBER, VersionRef, VersionState
from scion_adapters.registry import Registry
from scion_adapters.settings import Settings
from scion_trainer.chat_tokens import ChatTokens, load_chat_tokens
from scion_trainer.loading import loaded
from scion_trainer.red_team.attack import Attempt, attack, fitting_probes
from scion_trainer.red_team.suite import Suite
from scion_trainer.server_client import ModelServer, ServerClient


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one version answered. `num_left_out` probes do not fit the base's template or length."""

    ref: VersionRef
    suite: Suite
    attempts: tuple[Attempt, ...]
    num_left_out: int

    @property
    def failed(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.failed]

    @property
    def failed_share(self) -> float:
        return len(self.failed) / len(self.attempts)


def inspect_version(
    settings: Settings,
    ref: VersionRef,
    suite: Suite,
    *,
    database: Database,
    registry: Registry,
    server: ModelServer | None = None,
    tokens: ChatTokens | None = None,
) -> Inspection:
    """Ask `ref` (number 0: the base) every probe of `suite`.

    Raises NotFoundError for an unknown version, ConflictError when it can no longer be asked, UnavailableError without
    a server, InvalidInputError when no probe fits.
    """
    version = None if ref.number == BASE_NUMBER else registry.version(ref)
    if version is not None and version.state not in (VersionState.CANDIDATE, VersionState.ACCEPTED):
        raise ConflictError(f"{ref} is {version.state.value} and cannot be asked: name a candidate or accepted version")
    with ExitStack() as stack:
        if server is None:
            keys = {} if version is None else {str(ref): version.evaluation_key}
            server = stack.enter_context(ServerClient(settings, evaluation_keys=keys))
        if version is not None:
            stack.enter_context(loaded([version], base_info(settings), settings, registry, database))
        max_tokens, served = settings.gates.max_tokens, server.max_length()
        longest = min(settings.trainer.max_length, served or settings.trainer.max_length) - max_tokens
        probes = fitting_probes(suite.probes, tokens or load_chat_tokens(settings), longest_prompt=longest)
        if not probes:
            raise InvalidInputError(
                f"no probe of {suite.origin} fits in {longest} tokens: shorten them, or raise trainer.max_length"
            )
        model = settings.base.served_name if version is None else str(ref)
        attempts = attack(server, model, probes, max_tokens=max_tokens)
    return Inspection(ref, suite, tuple(attempts), len(suite.probes) - len(probes))
