"""What PPO carries from step to step, and its checkpoints: a resumed run goes on as if it had not stopped.

All randomness is drawn from generators seeded by (seed, step, purpose), so there is no state of a generator to keep.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scion_trainer.checkpoints import CHECKPOINTS, mark_complete
from scion_trainer.ppo.maths import Moments
from scion_trainer.reward.model import Head
from scion_trainer.roles import POLICY, VALUE, Roles

FILE = "ppo.pt"
KEPT = 2


@dataclass(slots=True)
class State:
    """After `step` rounds. `within` is the newest policy that was measured to be within the KL budget."""

    kl_coefficient: float
    step: int = 0
    moments: Moments = field(default_factory=Moments)
    within: dict[str, torch.Tensor] | None = None


def save(directory: Path, state: State, roles: Roles, head: Head, optimizers: dict[str, torch.optim.Optimizer]) -> Path:
    """Write a checkpoint and delete all but the newest two. It is marked complete when its files are on the disk."""
    path = directory / CHECKPOINTS / f"checkpoint-{state.step}"
    shutil.rmtree(path, ignore_errors=True)  # from an attempt that was killed while it wrote
    path.mkdir(parents=True)
    torch.save(
        {
            "step": state.step,
            "kl_coefficient": state.kl_coefficient,
            "moments": astuple(state.moments),
            "within": state.within,
            "roles": {role: roles.state(role) for role in (POLICY, VALUE)},
            "head": head.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        },
        path / FILE,
    )
    mark_complete(path)
    others = sorted((p for p in path.parent.glob("checkpoint-*")), key=lambda p: int(p.name.rpartition("-")[2]))
    for old in others[:-KEPT]:
        shutil.rmtree(old)
    return path


def load(path: Path, roles: Roles, head: Head, optimizers: dict[str, torch.optim.Optimizer]) -> State:
    """Put everything back as it was at `save`."""
    saved: dict[str, Any] = torch.load(path / FILE, map_location="cpu", weights_only=True)
    for role, weights in saved["roles"].items():
        roles.load_state(role, weights)
    head.load_state_dict(saved["head"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    return State(saved["kl_coefficient"], saved["step"], Moments(*saved["moments"]), saved["within"])


def seed_for(seed: int, step: int, purpose: str) -> int:
    """A seed of 63 bits for one use of randomness at one step."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
