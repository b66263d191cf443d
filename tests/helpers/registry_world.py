"""A registry with a tiny base, and a publisher of ever new adapters."""

from __future__ import annotations

import threading
from pathlib import Path

from scion_adapters.aliases import set_alias_in
from scion_adapters.events import list_events, routing_revision
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.records import Version
from scion_adapters.registry import Registry
from tests.helpers.adapters import LIMITS, make_adapter


class RegistryWorld:
    def __init__(self, registry: Registry, base: BaseInfo, directory: Path) -> None:
        self.registry = registry
        self.base = base
        self._directory = directory
        self._lock = threading.Lock()
        self._count = 0

    def adapter_directory(self) -> Path:
        with self._lock:
            self._count += 1
            count = self._count
        return make_adapter(self._directory / f"adapter-{count}", self.base, seed=count)

    def publish(self, adapter: str = "chat", *, parent: int = 0, run_id: str | None = None) -> Version:
        return self.registry.publish(
            adapter,
            self.adapter_directory(),
            parent=parent,
            base=self.base,
            limits=LIMITS,
            actor="test",
            reason="because",
            run_id=run_id,
        )

    def accepted(self) -> Version:
        return self.registry.accept(self.publish().ref, actor="gates", reason="passed")

    def kinds(self) -> list[str]:
        return [event.kind for event in list_events(self.registry.database)]

    def revision(self) -> int:
        with self.registry.database.read() as connection:
            return routing_revision(connection)

    def set_traffic(self, alias: str, number: int | None) -> None:
        with self.registry.database.write() as connection:
            set_alias_in(connection, "chat", alias, number, clock_value=5.0, actor="rollouts", reason="moved")
