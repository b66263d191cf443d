"""Rollouts from servers of ours, at low priority: each step's adapter is loaded everywhere under a fresh name.

Owns the order of a step: the new adapter is loaded before the old one is dropped, and sampled only once every live
server has it. How adapters reach servers stands in scion_adapters.steps, what is asked of them in sampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx

from scion_adapters.errors import ConflictError, NotFoundError, UnavailableError
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.records import Version
from scion_adapters.registry import Registry, limits_of
from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s, wait_until_loaded
from scion_adapters.routing import load_routing
from scion_adapters.settings import Settings
from scion_adapters.steps import StepLine
from scion_trainer.rollouts.sampling import Sampling, check_server, sample
from scion_trainer.rollouts.types import Rollout
from scion_trainer.server_client import ServerClient

SLOTS = 2
"""The step that is sampled, and the next one, which is loaded before that is dropped."""
POLL_S = 0.02


class ServerSource:
    """`RolloutSource` over the servers on `registry`'s database. Nothing happens before the first `update`.

    `concurrency`: answers sampled at once; a user who comes waits for the end of a step with all of them. `transport`
    replaces HTTP in tests. Raises UnavailableError when no server is live, or none can be sampled from.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        base: BaseInfo,
        sampling: Sampling,
        *,
        actor: str,
        concurrency: int,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._base = base
        self._sampling = sampling
        self._actor = actor
        self._concurrency = concurrency
        self._transport = transport
        self._ledger = ReplicaLedger(registry.database)
        self._line: StepLine | None = None
        self._current: Version | None = None
        self._client: ServerClient | None = None

    def update(self, adapter_directory: Path, step: int) -> None:
        """As in RolloutSource; also raises RejectedError when the adapter is unsound, NaN for example."""
        line = self._line or self._open()
        version = line.add(adapter_directory)
        try:
            self.wait_loaded(version)
        except BaseException:
            line.drop(version)
            raise
        previous, self._current = self._current, version
        self._connect({str(version.ref): version.evaluation_key})
        if previous is not None:
            line.drop(previous)

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        """As in RolloutSource. Raises ConflictError before the first `update`."""
        if self._current is None or self._client is None:
            raise ConflictError("there is no policy to sample from yet: call update() with its adapter first")
        try:
            return sample(self._client, str(self._current.ref), prompts, self._sampling, seed=seed)
        except NotFoundError as error:  # a server that came, or came back, loads it first
            raise UnavailableError(f"{error} (it is a step of {self._actor})") from error

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._line is not None:
            self._line.close()
            self._line = None
        self._current = None

    def abandon(self) -> None:
        """As `close`, without waiting until servers have let go: they end anyway."""
        if self._line is not None:
            self._line.abandon()
            self._line = None
        self.close()

    def wait_loaded(self, version: Version | None = None) -> None:
        """Until every live server has `version`, the current one by default."""
        version = version or self._current
        if version is not None:
            timeout_s, ttl_s = self._settings.gates.server_timeout_s, heartbeat_ttl_s(self._settings)
            wait_until_loaded(self._ledger, version.lora_id, timeout_s, ttl_s, poll_s=POLL_S)

    def check(self) -> None:
        """Raises UnavailableError, with the remedy, when there is no server that rollouts can come from."""
        live = self._ledger.live(heartbeat_ttl_s(self._settings))
        if not live:
            raise UnavailableError("no server of ours is running: start one with `scion serve`")
        for replica in live:
            if replica.base_fingerprint and replica.base_fingerprint != self._base.fingerprint:
                raise UnavailableError(f"server {replica.id} serves another base than base.model")
            free = replica.max_cpu_loras - len(load_routing(self._registry.database).wanted)
            if free < SLOTS:
                raise UnavailableError(
                    f"server {replica.id} has {free} free of {replica.max_cpu_loras} slots (server.max_cpu_loras), "
                    f"rollouts need {SLOTS}: raise it and restart"
                )
        with self._client_for({}) as client:
            check_server(client, self._settings.base.served_name)

    def _open(self) -> StepLine:
        self.check()
        line = StepLine(self._registry, base=self._base, limits=limits_of(self._settings), actor=self._actor)
        self._line = line.__enter__()
        return self._line

    def _connect(self, keys: dict[str, str]) -> None:
        previous, self._client = self._client, self._client_for(keys)
        if previous is not None:
            previous.close()

    def _client_for(self, keys: dict[str, str]) -> ServerClient:
        return ServerClient(
            self._settings, evaluation_keys=keys, concurrency=self._concurrency, transport=self._transport
        )
