"""Versions that are to be asked by exact name are loaded on every live server for as long as that takes.

Owns the asking and its undoing. Loading itself is done by the servers, which follow the routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from scion_adapters.clock import Clock
from scion_adapters.database import Database
from scion_adapters.errors import UnavailableError
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.records import Version, VersionState
from scion_adapters.registry import Registry
from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s, wait_until_loaded
from scion_adapters.routing import load_routing
from scion_adapters.settings import Settings
from scion_trainer.gates.types import Progress


@contextmanager
def loaded(
    versions: Sequence[Version],
    base: BaseInfo,
    settings: Settings,
    registry: Registry,
    database: Database,
    *,
    progress: Progress = lambda what, done, total: None,
    clock: Clock | None = None,
) -> Iterator[None]:
    """While this is open, every live server holds `versions`. Raises UnavailableError when that cannot be had."""
    ledger = ReplicaLedger(database, clock)
    ttl_s = heartbeat_ttl_s(settings)
    live = ledger.live(ttl_s)
    if not live:
        raise UnavailableError("no server of ours is running: start one with `scion serve`")
    for replica in live:
        if replica.base_fingerprint and replica.base_fingerprint != base.fingerprint:
            raise UnavailableError(
                f"server {replica.id} serves another base than base.model: restart it with this configuration"
            )
    with ExitStack() as stack:
        for version in versions:
            stack.callback(_ask_servers_to_load(version, registry, database))
        for step, version in enumerate(versions):
            progress(f"loading {version.ref}", step, len(versions))
            wait_until_loaded(ledger, version.lora_id, timeout_s=settings.gates.server_timeout_s, ttl_s=ttl_s)
        yield


def _ask_servers_to_load(version: Version, registry: Registry, database: Database) -> Callable[[], None]:
    """Returns what undoes it. Versions that serve, or have an alias, are loaded anyway."""
    ref, actor = version.ref, "gates"
    if version.state is VersionState.CANDIDATE:
        registry.request_evaluation(ref)
        return lambda: registry.finish_evaluation(ref)
    if version.lora_id in load_routing(database).wanted:
        return lambda: None
    alias = f"evaluation-{ref.number}"
    registry.set_alias(ref.adapter, alias, ref.number, actor=actor, reason="being evaluated, or compared with")
    return lambda: registry.remove_alias(ref.adapter, alias, actor=actor, reason="evaluated")
