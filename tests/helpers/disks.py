"""Small disks that tests fill up or make read-only: a tmpfs of its own, hence for root only; others skip."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MAX_FILES = 400


class SmallDisk:
    """A mounted file system of a few MiB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    @contextmanager
    def full(self) -> Iterator[None]:
        """Neither a byte nor a name is left during the block."""
        self._filler.mkdir()
        with (self._filler / "bytes").open("wb", buffering=0) as file:
            piece = b"\0" * 65536
            while piece:
                try:
                    file.write(piece)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    piece = piece[: len(piece) // 2]
        for number in range(_MAX_FILES):
            try:
                (self._filler / str(number)).touch()
            except OSError:
                break
        try:
            yield
        finally:
            shutil.rmtree(self._filler)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written during the block, not even by root. Files open for writing would prevent it."""
        _run("mount", "-o", "remount,ro", str(self.path))
        try:
            yield
        finally:
            _run("mount", "-o", "remount,rw", str(self.path))


@contextmanager
def small_disk(path: Path, mib: int = 4) -> Iterator[SmallDisk]:
    """Mount one at `path` for the block; pytest.skip where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        pytest.skip("only root can mount a disk that a test may fill")
    try:
        _run("mount", "-t", "tmpfs", "-o", f"size={mib}m,nr_inodes={_MAX_FILES}", "tmpfs", str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let root mount a tmpfs: {error}")
    try:
        yield SmallDisk(path)
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
