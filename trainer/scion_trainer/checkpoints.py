"""Which checkpoints of a run can be trusted.

transformers writes a checkpoint file by file, so a killed process leaves a directory that looks like one. A checkpoint
counts only when our marker, written last and after fsync, lists its files and they are as listed. This module knows
nothing of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from scion_adapters.errors import ScionError

CHECKPOINTS = "checkpoints"
MARKER = "scion_checkpoint.json"
_PREFIX = "checkpoint-"


class CorruptCheckpointError(ScionError):
    """No checkpoint of the run is intact, although some were completed."""


@dataclass(frozen=True, slots=True)
class Found:
    """What can be resumed from; `path` None means from the beginning. `notes` say what was passed over."""

    path: Path | None
    step: int
    notes: tuple[str, ...] = ()


def mark_complete(checkpoint: Path) -> None:
    """Declare that `checkpoint` is complete: its files are on disk before the marker is."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARKER:
            files[path.relative_to(checkpoint).as_posix()] = _digest(path)
            _fsync(path)
    partial = checkpoint / (MARKER + ".partial")
    partial.write_text(json.dumps({"step": _step(checkpoint), "files": files}, indent=1), encoding="utf-8")
    _fsync(partial)
    partial.rename(checkpoint / MARKER)
    _fsync(checkpoint)
    _fsync(checkpoint.parent)


def newest_complete(directory: Path) -> Found:
    """The newest intact checkpoint under `directory`; unfinished ones are deleted, damaged ones passed over.

    Raises CorruptCheckpointError when checkpoints were completed and none of them is intact.
    """
    notes: list[str] = []
    damaged: list[str] = []
    candidates = sorted((p for p in directory.glob(_PREFIX + "*") if p.is_dir()), key=_step, reverse=True)
    for checkpoint in candidates:
        if not (checkpoint / MARKER).is_file():
            shutil.rmtree(checkpoint)  # transformers would count it when it deletes old ones
            notes.append(f"{checkpoint.name} was being written when the run died and is not used")
            continue
        problem = _problem(checkpoint)
        if problem is None:
            return Found(checkpoint, _step(checkpoint), tuple(notes))
        damaged.append(f"{checkpoint.name}: {problem}")
        notes.append(f"{checkpoint.name} is damaged ({problem}) and is not used")
    if damaged:
        raise CorruptCheckpointError(
            f"no checkpoint in {directory} is intact ({'; '.join(damaged)}): this run cannot be resumed; "
            "check that disk, then start a new run by the same command without --resume"
        )
    return Found(None, 0, tuple(notes))


def _problem(checkpoint: Path) -> str | None:
    """What is wrong with a marked checkpoint, or None."""
    try:
        listed = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return f"{MARKER} cannot be read"
    for name, digest in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} has changed"
    return None


def _step(checkpoint: Path) -> int:
    text = checkpoint.name.removeprefix(_PREFIX)
    return int(text) if text.isdigit() else -1


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
