"""Notices that the files of a resident version are gone or cut short, and takes the version out of traffic.

The engine is not touched: its copy of the weights is whole and answers until the routing drops the version. A store
that is gone altogether (not mounted, not readable) says nothing about one version, so then nobody is quarantined.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from scion_adapters.records import VersionRef
from vllm_scion.loader import WantedVersion

logger = logging.getLogger("vllm_scion")


class Store(Protocol):
    """What is asked of the artifact store."""

    @property
    def root(self) -> Path: ...
    @property
    def is_remote(self) -> bool: ...
    def has(self, digest: str) -> bool: ...


@dataclass(slots=True)
class FileWatch:
    """`quarantine(ref, reason)` writes to the database; all of this runs in a thread."""

    store: Store
    quarantine: Callable[[VersionRef, str], object]
    _store_is_gone: bool = field(default=False, init=False)

    def check(self, resident: Collection[WantedVersion]) -> None:
        """Look for each version's files once. Files of a remote store are a cache, and simply fetched again."""
        if self.store.is_remote:
            return
        missing = [version for version in resident if not self.store.has(version.digest)]
        if missing and not self._store_answers():
            if not self._store_is_gone:
                logger.error("the artifact store %s is not there; serving goes on from memory", self.store.root)
            self._store_is_gone = True
            return
        self._store_is_gone = False
        for version in missing:
            reason = f"its files are missing or incomplete in {self.store.root}"
            logger.error("%s: %s; it gets no more traffic", version.ref, reason)
            self.quarantine(version.ref, reason)

    def _store_answers(self) -> bool:
        """Whether the place for all versions is there, though one version's folder is not."""
        try:
            return (self.store.root / "versions").is_dir()
        except OSError:
            return False
