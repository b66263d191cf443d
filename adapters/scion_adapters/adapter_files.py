"""The files of an adapter's directory: which belong to it, their manifest's entries, and the digest that names them.

Knows nothing of where directories lie, nor of what the tensors say (preflight.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scion_adapters.errors import RejectedError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SCION_FILE = "scion.json"
MANIFEST_FILE = "manifest.json"
_REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
_IGNORED = {"README.md", ".gitattributes"}  # PEFT and the model hub write them beside every adapter
_COPY_BYTES = 1 << 20


def list_files(directory: Path, *, stored: bool = False) -> dict[str, Path]:
    """The files of an adapter directory by name; `stored`: of one of ours, beside whose files a manifest lies.

    Raises RejectedError: symlink, foreign_file, not_safetensors, empty, unreadable. Hard links are files like others:
    what enters the store is a copy.
    """
    if directory.is_symlink() or not directory.is_dir():
        reason = "symlink" if directory.is_symlink() else "unreadable"
        raise RejectedError(
            f"{directory} is not a directory of its own: expected a PEFT adapter directory", reason=reason
        )
    files: dict[str, Path] = {}
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(found.st_mode):
            raise RejectedError(f"{entry.name[:120]!a} is a symbolic link: copy the file itself", reason="symlink")
        if not stat.S_ISREG(found.st_mode):
            raise _foreign(entry.name)
        if (stored and entry.name == MANIFEST_FILE) or not belongs(entry.name):
            continue
        if found.st_size == 0:
            raise RejectedError(f"{entry.name} has 0 bytes: expected what PEFT saved", reason="empty")
        files[entry.name] = Path(entry.path)
    for name in _REQUIRED:
        if name not in files:
            reason = "empty" if name == WEIGHTS_FILE else "unreadable"
            raise RejectedError(f"there is no {name}: expected the files that PEFT saved", reason=reason)
    return files


def belongs(name: str) -> bool:
    """Whether a file of that name is part of an adapter; False for what tools write beside one, which is left out.

    Raises RejectedError for any other name: not_safetensors, foreign_file.
    """
    if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")):
        raise RejectedError(
            f"{name[:120]!a} can run code when it is loaded: save as safetensors", reason="not_safetensors"
        )
    if name not in (*_REQUIRED, SCION_FILE, *_IGNORED):
        raise _foreign(name)
    return name not in _IGNORED


def _foreign(name: str) -> RejectedError:
    message = f"{name[:120]!a} does not belong to an adapter: give {CONFIG_FILE} and {WEIGHTS_FILE} alone"
    return RejectedError(message, reason="foreign_file")


def copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copy, flush and hash in one pass: the manifest's entry is that of the copy. Links are never followed."""
    digest, size_bytes = hashlib.sha256(), 0
    descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as reader, target.open("xb") as writer:
        while piece := reader.read(_COPY_BYTES):
            digest.update(piece)
            size_bytes += len(piece)
            writer.write(piece)
        writer.flush()
        os.fsync(writer.fileno())
    return {"sha256": digest.hexdigest(), "size_bytes": size_bytes}


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as reader:
        return {"sha256": hashlib.file_digest(reader, "sha256").hexdigest(), "size_bytes": file.stat().st_size}


def digest_of(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """`sha256:…` over the names, sizes and hashes of a manifest's entries."""
    lines = (f"{name}\0{entry['size_bytes']}\0{entry['sha256']}\n" for name, entry in sorted(entries.items()))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def is_complete(target: Path) -> bool:
    """Whether every file that the manifest names is there with its size."""
    try:
        files = json.loads((target / MANIFEST_FILE).read_bytes())["files"]
        return all((target / name).stat().st_size == entry["size_bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def is_intact(target: Path, digest: str) -> bool:
    """Whether the files, read again, are exactly those that the digest stands for."""
    try:
        files = list_files(target, stored=True)
    except RejectedError:
        return False
    return is_complete(target) and digest_of({name: _entry(file) for name, file in files.items()}) == digest
