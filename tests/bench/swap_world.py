"""The operator's side of a swap storm: publishes marker versions, moves traffic, and notes each change as it was done.

Works on the database and the store from outside, as `scion` on another terminal would.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.gc import collect
from scion_adapters.records import RolloutState, Version, VersionState
from scion_adapters.registry import Registry, limits_of, open_registry
from scion_adapters.replicas import ReplicaLedger, wait_until_loaded
from scion_adapters.retirement import retire
from scion_adapters.rollouts import Rollouts
from scion_adapters.settings import Settings
from tests.bench.markers import Marker
from tests.bench.storm import Change

TTL_S = 10.0
TIMEOUT_S = 60.0
LOOK_S = 0.01


@dataclass
class Operator:
    """Moves the traffic of `chat`. `changes` says what was done when; `markers` gives each version's word."""

    settings: Settings
    templates: list[Marker]
    work: Path
    changes: list[Change] = field(default_factory=list)
    markers: dict[str, str] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)
    champion: str = ""
    previous: str = ""

    def __post_init__(self) -> None:
        self.registry: Registry = open_registry(self.settings)
        self.rollouts = Rollouts(self.registry.database)
        self.ledger = ReplicaLedger(self.registry.database)
        self.base: BaseInfo = base_info(self.settings)
        self._numbers = count()

    def publish(self) -> Version:
        """A version of its own bytes, accepted; the next marker in turn."""
        number = next(self._numbers)
        marker = self.templates[number % len(self.templates)]
        directory = self.work / f"{number}"
        shutil.copytree(marker.directory, directory)
        (directory / "scion.json").write_text(json.dumps({"storm": number}))
        made = self.registry.publish(
            "chat", directory, parent=0, base=self.base, limits=limits_of(self.settings), actor="storm"
        )
        shutil.rmtree(directory)
        self.markers[str(made.ref)] = marker.word
        return self.registry.accept(made.ref, actor="storm", reason="a marker")

    def serve_first(self) -> None:
        """The first champion, before the storm; no server is up yet."""
        began = time.monotonic()
        version = self.publish()
        self.rollouts.start(version.ref, steps=[1.0], guard=False, actor="storm")
        self.rollouts.promote("chat", actor="storm")
        self.champion = str(version.ref)
        self._note("start", began)

    def promote_by_hand(self) -> None:
        """Load, and give it to everybody at once."""
        version = self.publish()
        self.rollouts.start(version.ref, steps=[0.001, 1.0], every_s=3600.0, guard=False, actor="storm")
        self.wait_loaded(version)
        began = time.monotonic()
        self.rollouts.promote("chat", actor="storm")
        self._promoted(version, began)

    def promote_in_steps(self, every_s: float = 0.15) -> None:
        """Through 30% and 60% to everybody, by the servers' own controller."""
        version = self.publish()
        began = time.monotonic()
        rollout = self.rollouts.start(version.ref, steps=[0.3, 0.6, 1.0], every_s=every_s, guard=False, actor="storm")
        seen = -1
        deadline = began + TIMEOUT_S
        while rollout.state is not RolloutState.PROMOTED:
            assert time.monotonic() < deadline, f"{version.ref} hangs: {rollout.message}"
            time.sleep(LOOK_S)
            rollout = self.rollouts.get(rollout.id)
            if rollout.state.is_active and rollout.step > seen:
                seen = rollout.step
                self._note("step", began, challenger=str(version.ref), weight=rollout.weight)
                began = time.monotonic()
        self._promoted(version, began)

    def rollback(self) -> tuple[str, float]:
        """Back to the version before; returns the one that was left, and when the command was given."""
        began = time.monotonic()
        bad = self.champion
        self.rollouts.rollback("chat", actor="storm", reason="storm")
        self.champion, self.previous = self.previous, ""
        self._note("rollback", began)
        return bad, began

    def retire_unused(self) -> None:
        """Every accepted version that neither serves nor stands by."""
        for version in self.registry.versions("chat"):
            if version.state is VersionState.ACCEPTED and str(version.ref) not in (self.champion, self.previous):
                retire(self.registry.database, version.ref, actor="storm", reason="storm")
                self.operations["retire"] += 1

    def collect(self) -> None:
        """Delete what nothing can reach any more."""
        collect(self.registry, rollback_window_s=0.0, grace_s=0.0)
        self.operations["gc"] += 1

    def wait_loaded(self, version: Version) -> None:
        wait_until_loaded(self.ledger, version.lora_id, timeout_s=TIMEOUT_S, ttl_s=TTL_S, poll_s=LOOK_S)

    def _promoted(self, version: Version, began: float) -> None:
        self.champion, self.previous = str(version.ref), self.champion
        self._note("promote", began)

    def _note(self, kind: str, began: float, challenger: str | None = None, weight: float = 0.0) -> None:
        versions = {self.champion} | ({challenger} if challenger is not None else set())
        self.operations[kind] += 1
        self.changes.append(
            Change(kind, began, time.monotonic(), frozenset(versions), self.champion, challenger, weight)
        )
