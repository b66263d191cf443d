"""The artifact store: adapter directories named by their contents' digest; places for reports, snapshots and runs.

Under the store's root: versions/<digest>/ (complete or absent), reports/<adapter>/<number>/, snapshots/, runs/, tmp/.
For a remote store the root is the local cache, and remote_store.py moves files. Which files an adapter has is for
adapter_files.py. Knows nothing of numbers or states.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scion_adapters.adapter_files import MANIFEST_FILE, copy_file, digest_of, is_complete, is_intact, list_files
from scion_adapters.errors import NotFoundError, RejectedError
from scion_adapters.files import fsync_path, publish_directory, remove_tree, write_file, writing_to
from scion_adapters.records import VersionRef, check_adapter_name
from scion_adapters.remote_store import RemoteStore
from scion_adapters.settings import Settings

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_STALE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Artifact:
    """`digest` is "sha256:<64 hex>" over the names and bytes of the files; `size_bytes` is their sum."""

    digest: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class StagedArtifact:
    """A private copy of a directory, flushed and not yet published: what is checked here is what gets published."""

    path: Path
    artifact: Artifact
    entries: Mapping[str, Mapping[str, Any]]


class ArtifactStore:
    """Artifacts below `root`, and, if `remote` is given, in a remote store of which `root` is the cache."""

    def __init__(self, root: Path, remote: RemoteStore | None = None) -> None:
        self.root = root
        self._remote = remote

    @contextmanager
    def stage(self, directory: Path) -> Iterator[StagedArtifact]:
        """A flushed private copy of `directory`; it is gone after the block unless `commit` published it."""
        files = list_files(directory)
        temporary = self.new_temporary()
        try:
            with writing_to(self.root):
                entries = {name: copy_file(source, temporary / name) for name, source in files.items()}
            artifact = Artifact(digest_of(entries), sum(int(entry["size_bytes"]) for entry in entries.values()))
            yield StagedArtifact(temporary, artifact, entries)
        finally:
            remove_tree(temporary)

    def commit(self, staged: StagedArtifact) -> Artifact:
        """Publish a staged copy: manifest last, rename, upload. Does nothing when the same contents are there."""
        digest = staged.artifact.digest
        target = self._directory(digest)
        with writing_to(self.root):
            if os.path.lexists(target) and not is_intact(target, digest):
                self._set_aside(target)  # damaged by someone else: the copy at hand is the right one
            if not target.exists():
                manifest = {"digest": digest, "files": staged.entries}
                write_file(staged.path / MANIFEST_FILE, json.dumps(manifest, indent=2, sort_keys=True).encode())
                publish_directory(staged.path, target)  # False: another process was first, with the same bytes
            os.utime(target)  # young again: gc leaves it alone until its new version is there
        if self._remote is not None:
            self._remote.upload(target, _key(digest), last=MANIFEST_FILE)
        return staged.artifact

    def add(self, directory: Path) -> Artifact:
        """Copy `directory` into the store. The same contents give the same artifact, however often they are added."""
        with self.stage(directory) as staged:
            return self.commit(staged)

    def path(self, digest: str) -> Path:
        """The local directory that holds the artifact, fetched and verified first if it is only in the remote store."""
        target = self._directory(digest)
        if is_complete(target):
            return target
        if self._remote is not None:
            self._fetch(digest, target)
            return target
        raise NotFoundError(f"artifact {digest} is not in {self.root}: was it removed, or is store.url another one?")

    def verify(self, digest: str) -> None:
        """Read all of it again. Raises RejectedError as `list_files` does, and with digest_mismatch when the bytes are
        not those of the name.
        """
        target = self.path(digest)
        list_files(target, stored=True)  # a link or another file has a reason of its own
        if not is_intact(target, digest):
            raise RejectedError(
                f"the files in {target} are not those of {digest}: they were changed after publishing; publish again",
                reason="digest_mismatch",
            )

    @property
    def is_remote(self) -> bool:
        """Whether `root` is only the cache of a remote store."""
        return self._remote is not None

    def has(self, digest: str) -> bool:
        """Whether the local directory of the artifact is complete; the bytes are not read."""
        return is_complete(self._directory(digest))

    def younger_than(self, digests: Collection[str], seconds: float) -> set[str]:
        """Those of `digests` that were published, or published again, within the last `seconds`."""
        found = set()
        for digest in digests:
            with suppress(FileNotFoundError):
                if time.time() - self._directory(digest).stat().st_mtime < seconds:
                    found.add(digest)
        return found

    def stored(self) -> set[str]:
        """The digests of all local directories, complete or not."""
        directory = self.root / "versions"
        return {f"sha256:{entry.name}" for entry in directory.iterdir()} if directory.is_dir() else set()

    def remove(self, digest: str) -> None:
        """Delete the artifact, from a remote store too. Killed half-way it leaves a leftover in tmp/, never a part."""
        target = self._directory(digest)
        if self._remote is not None:
            self._remote.remove(_key(digest), first=MANIFEST_FILE)
        if target.exists():
            self._set_aside(target)

    def report_path(self, ref: VersionRef) -> Path:
        """The local, writable directory of a version's report."""
        return self._writable("reports", check_adapter_name(ref.adapter), str(ref.number))

    def report_files(self, ref: VersionRef) -> list[Path]:
        """What there is of a version's report on this host."""
        directory = self.root / "reports" / check_adapter_name(ref.adapter) / str(ref.number)
        return sorted(directory.iterdir()) if directory.is_dir() else []

    def sync_report(self, ref: VersionRef) -> None:
        """Upload a version's report to a remote store; nothing to do for a directory."""
        if self._remote is not None:
            self._remote.upload(self.report_path(ref), f"reports/{ref.adapter}/{ref.number}")

    @property
    def snapshots_path(self) -> Path:
        return self._writable("snapshots")

    @property
    def runs_path(self) -> Path:
        return self._writable("runs")

    def _fetch(self, digest: str, target: Path) -> None:
        assert self._remote is not None
        temporary = self.new_temporary()
        try:
            self._remote.download(_key(digest), temporary)
            if not is_intact(temporary, digest):
                raise RejectedError(
                    f"artifact {digest} in the remote store is damaged: publish it again", reason="digest_mismatch"
                )
            for file in temporary.iterdir():
                fsync_path(file)
            if target.exists():  # incomplete, or `path` would have returned it
                self._set_aside(target)
            publish_directory(temporary, target)
        finally:
            remove_tree(temporary)

    def _directory(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise NotFoundError(f"{digest[:80]!r} is not a digest: expected sha256: and 64 hexadecimal digits")
        return self.root / "versions" / match[1]

    def _writable(self, *parts: str) -> Path:
        directory = self.root.joinpath(*parts)
        with writing_to(self.root):
            directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _set_aside(self, target: Path) -> None:
        """Take a directory out of the store at one stroke, then delete it. Needs no space: a full disk can be freed."""
        aside = self._writable("tmp") / uuid.uuid4().hex
        os.rename(target, aside)
        remove_tree(aside)

    def new_temporary(self) -> Path:
        """An empty directory on the store's disk, for the caller to remove."""
        parent = self._writable("tmp")
        for left_over in parent.iterdir():  # of processes that were killed
            with suppress(FileNotFoundError):  # or of one that is just finishing
                if time.time() - left_over.lstat().st_mtime > _STALE_S:
                    remove_tree(left_over)
        temporary = parent / uuid.uuid4().hex
        with writing_to(self.root):
            temporary.mkdir()
        return temporary


def open_store(settings: Settings) -> ArtifactStore:
    """The configured store: `store.url` as a directory, or a remote store with `store.cache` as its local cache."""
    url = settings.store.url
    if "://" not in url or url.startswith("file://"):
        return ArtifactStore(settings.path(url.removeprefix("file://")).resolve())
    return ArtifactStore(settings.path(settings.store.cache).resolve(), RemoteStore(url))


def _key(digest: str) -> str:
    return f"versions/{digest.removeprefix('sha256:')}"
