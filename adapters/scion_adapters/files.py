"""Writing files so that a crash at any moment leaves either the complete thing or nothing under its final name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scion_adapters.errors import UnavailableError

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or raise the quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable for this account",
    errno.EPERM: "make it writable for this account",
    errno.EIO: "look after the disk",
}


@contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """What the disk of `place` refuses becomes UnavailableError, which names the place and the remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        is_elsewhere = error.filename is not None and not Path(os.fsdecode(error.filename)).is_relative_to(place)
        if remedy is None or is_elsewhere:
            raise
        raise UnavailableError(
            f"{place} cannot be written: {error.strerror}: {remedy} and try again; nothing was changed"
        ) from error


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it; for files in a directory that is published as a whole."""
    path.write_bytes(data)
    fsync_path(path)


def publish_directory(temporary: Path, target: Path) -> bool:
    """Give a complete directory its final name. False if `target` is there already; `temporary` is then left alone.

    Both must lie on one file system, and the files in `temporary` must be flushed already.
    """
    fsync_path(temporary)
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_path(target.parent.parent)
    try:
        os.rename(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    fsync_path(target.parent)
    return True


def remove_tree(path: Path) -> None:
    """Delete a directory; nothing happens if it is gone already."""
    shutil.rmtree(path, ignore_errors=True)
