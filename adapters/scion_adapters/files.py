"""Writing files so that a crash at any moment leaves either the complete thing or nothing under its final name."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


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
