"""Reward models on disk: what was learned, whose gate it passed, and the digest that says the files are the same still.

`reward.json` is written last and the directory gets its name when it is complete. This module imports no torch: weights
are written and read by files.py.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError, RejectedError
from scion_adapters.files import publish_directory, remove_tree, write_file
from scion_adapters.records import RunState
from scion_adapters.tables import runs
from scion_trainer.gates.types import Verdict
from scion_trainer.reward.calibration import Platt

DIRECTORY = "reward_model"
MANIFEST = "reward.json"
FORMAT = 1
RECIPE = "reward"
GATE_METRIC = "reward_gate"
"""Where `runs.metrics` has the gate's result."""
PINNED = "reward_model_used.json"
"""Which reward model a run began with: a resumed run climbs the same one, whatever has passed its gate since."""


@dataclass(frozen=True, slots=True)
class RewardManifest:
    """What `reward.json` says. `gate` is a GateResult as JSON; `digest` covers all other files."""

    base_fingerprint: str
    base_quantization: str | None
    rank: int
    num_members: int
    disagreement_penalty: float
    calibration: Platt
    gate: Mapping[str, Any]
    digest: str


def write_reward_model(
    target: Path,
    write_weights: Callable[[Path], None],
    *,
    base_fingerprint: str,
    base_quantization: str | None,
    rank: int,
    num_members: int,
    disagreement_penalty: float,
    calibration: Platt,
    gate: Mapping[str, Any],
) -> RewardManifest:
    """Write a reward model to `target`, in the place of one that an earlier attempt of the same run left there."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    try:
        write_weights(temporary)
        manifest = RewardManifest(
            base_fingerprint=base_fingerprint,
            base_quantization=base_quantization,
            rank=rank,
            num_members=num_members,
            disagreement_penalty=disagreement_penalty,
            calibration=calibration,
            gate=gate,
            digest=digest_of(temporary),
        )
        document = {
            "format": FORMAT,
            "base_fingerprint": manifest.base_fingerprint,
            "base_quantization": manifest.base_quantization,
            "rank": manifest.rank,
            "num_members": manifest.num_members,
            "disagreement_penalty": manifest.disagreement_penalty,
            "calibration": {"slope": calibration.slope, "intercept": calibration.intercept},
            "gate": dict(gate),
            "digest": manifest.digest,
        }
        write_file(temporary / MANIFEST, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
        remove_tree(target)
        publish_directory(temporary, target)
    finally:
        remove_tree(temporary)
    return manifest


def read_manifest(directory: Path, *, base_fingerprint: str | None = None) -> RewardManifest:
    """What is there, its files checked against the digest.

    Raises NotFoundError when it is no reward model, RejectedError when its files changed, InvalidInputError when it
    was trained on another base than `base_fingerprint` (None: any).
    """
    try:
        data = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{directory} is not a reward model: it has no {MANIFEST}; make one with `scion train NAME --recipe reward`"
        ) from error
    except ValueError as error:
        raise _damaged(directory, f"{MANIFEST} is no JSON") from error
    if data.get("format") != FORMAT:
        raise RejectedError(
            f"the reward model {directory} has format {data.get('format')!r}, this program reads {FORMAT}: train a new "
            "one with `scion train NAME --recipe reward`",
            reason="unsupported_format",
        )
    if (found := digest_of(directory)) != data["digest"]:
        raise _damaged(directory, f"its files have the digest {found[:19]}…, expected {data['digest'][:19]}…")
    if base_fingerprint not in (None, data["base_fingerprint"]):
        raise InvalidInputError(
            f"the reward model {directory} was trained on the base {data['base_fingerprint'][:19]}…, and base.model is "
            f"{str(base_fingerprint)[:19]}…: train a new one with `scion train NAME --recipe reward`",
            field="base.model",
        )
    return RewardManifest(
        base_fingerprint=data["base_fingerprint"],
        base_quantization=data["base_quantization"],
        rank=data["rank"],
        num_members=data["num_members"],
        disagreement_penalty=data["disagreement_penalty"],
        calibration=Platt(**data["calibration"]),
        gate=data["gate"],
        digest=data["digest"],
    )


def newest_reward_model(database: Database, adapter: str, base_fingerprint: str) -> Path | None:
    """The directory of the newest reward model of `adapter` on this base that passed its gate; None without one.

    Files are not hashed here: `read_manifest` does that when the model is loaded.
    """
    query = (
        sa.select(runs.c.directory, runs.c.metrics)
        .where(runs.c.adapter == adapter, runs.c.recipe == RECIPE, runs.c.state == RunState.SUCCEEDED)
        .order_by(runs.c.created_at.desc(), runs.c.id.desc())
    )
    with database.read() as connection:
        found = connection.execute(query).all()
    for directory, metrics in found:
        if metrics.get(GATE_METRIC, {}).get("verdict") != Verdict.PASS:
            continue
        path = Path(directory) / DIRECTORY
        try:
            fingerprint = json.loads((path / MANIFEST).read_bytes())["base_fingerprint"]
        except (OSError, ValueError, KeyError):
            continue  # cleaned up, or on another host
        if fingerprint == base_fingerprint:
            return path
    return None


def digest_of(directory: Path) -> str:
    """Of the names and contents of all files but the manifest."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return f"sha256:{total.hexdigest()}"


def _damaged(directory: Path, problem: str) -> RejectedError:
    return RejectedError(
        f"the reward model {directory} is damaged: {problem}; train a new one with `scion train NAME --recipe reward`",
        reason="digest_mismatch",
    )


def pinned_reward_model(directory: Path, newest: Path | None) -> Path:
    """The reward model that the run in `directory` began with; the first time, that is `newest`.

    Raises NotFoundError with the remedy when there is none, or when it is gone.
    """
    note = directory / PINNED
    if note.is_file():
        path = Path(json.loads(note.read_text(encoding="utf-8"))["path"])
        if not path.is_dir():
            raise NotFoundError(f"the reward model {path} that this run began with is gone: start a new run")
        return path
    if newest is None:
        raise NotFoundError(
            "no reward model of this adapter has passed its gate on this base, and without one ppo has nothing to "
            "climb: train it with `scion train NAME --recipe reward`, or learn from the thumbs with `--recipe kto`"
        )
    note.write_text(json.dumps({"path": str(newest)}) + "\n", encoding="utf-8")
    return newest
