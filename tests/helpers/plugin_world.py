"""The plugin in vLLM's real application with stubbed handlers, on a registry with real (tiny) adapter files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from scion_adapters import tables
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Version
from scion_adapters.registry import Registry, limits_of, open_registry
from scion_adapters.rollouts import Rollouts
from scion_adapters.settings import Settings, load_settings
from scion_feedback.recorder import Recorder, RecorderObserver, open_recorder
from scion_feedback.recorder_process import open_recorder_process
from tests.helpers.adapters import make_adapter, make_base
from tests.helpers.serving import to_toml
from tests.helpers.vllm_app import VllmApp
from vllm_scion.endpoint import ScionEndpointPlugin
from vllm_scion.metrics import Metrics
from vllm_scion.runtime import OpenRecorder


class PluginWorld:
    """`home` holds scion.toml, the base, the store and (unless `url` is given) the SQLite database."""

    def __init__(
        self,
        home: Path,
        *,
        adapters: Sequence[str] = ("chat",),
        url: str | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.home = home
        self.base = make_base(home / "base")
        sections: dict[str, dict[str, Any]] = {
            "rollout": {"poll_interval_s": 0.02, "heartbeat_s": 0.2},
            "capture": {"flush_interval_s": 0.01},
        }
        if url is not None:
            sections["database"] = {"url": url}
        for name, values in (config or {}).items():
            sections.setdefault(name, {}).update(values)
        (home / "scion.toml").write_text(to_toml(sections, adapters))
        self.settings: Settings = load_settings(home / "scion.toml")
        self.registry: Registry = open_registry(self.settings)
        self.database = self.registry.database
        self.rollouts = Rollouts(self.database)

    def candidate(self, adapter: str = "chat", *, seed: int = 1) -> Version:
        """A published version that no gate has seen."""
        directory = make_adapter(self.home / f"{adapter}-{seed}", self.base, seed=seed)
        return self.registry.publish(
            adapter,
            directory,
            parent=0,
            base=base_info(self.settings),
            limits=limits_of(self.settings),
            actor="test",
        )

    def accepted(self, adapter: str = "chat", *, seed: int = 1) -> Version:
        version = self.candidate(adapter, seed=seed)
        return self.registry.accept(version.ref, actor="test", reason="looks good")

    def champion(self, adapter: str = "chat", *, seed: int = 1) -> Version:
        """A new version that serves everybody. Needs no server: none is live, or those that are have loaded it."""
        version = self.accepted(adapter, seed=seed)
        self.rollouts.start(version.ref, steps=[1.0], every_s=0.0, guard=False, actor="test")
        return version

    def plugin(self, *, own_process: bool = False) -> ScionEndpointPlugin:
        """A plugin with metrics of its own. It records in threads, which start faster than a process."""

        def in_threads(settings: Settings, observer: RecorderObserver) -> Recorder:
            return open_recorder(settings, self.database, observer)

        opening: OpenRecorder = open_recorder_process if own_process else in_threads
        self.last_plugin = ScionEndpointPlugin(self.settings, Metrics(CollectorRegistry()), opening)
        return self.last_plugin

    def is_champion(self, number: int) -> bool:
        return self.registry.aliases("chat").get("champion") == number

    def is_followed(self, champion: int) -> bool:
        """Whether requests for `chat` go to that version now."""
        return self.last_plugin.gateway.serving.published.routing.adapters["chat"].champion == champion

    @asynccontextmanager
    async def serving(
        self, plugin: ScionEndpointPlugin | None = None, arguments: Sequence[str] = (), **options: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        """The application with the plugin, from start to shutdown. `self.app` is the application."""
        self.app = VllmApp([plugin or self.plugin()], arguments)
        async with self.app.running(**options) as client:
            yield client

    def completions(self) -> list[dict[str, Any]]:
        """The recorded completions, oldest first."""
        with self.database.read() as connection:
            query = sa.select(tables.completions).order_by(tables.completions.c.created_at)
            return [dict(row) for row in connection.execute(query).mappings()]

    def close(self) -> None:
        self.database.dispose()
