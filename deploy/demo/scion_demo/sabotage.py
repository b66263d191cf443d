"""Two ways to break a served model: an adapter of noise, and a raid of raters with a taste that nobody else has.

Owns the malice. The noise is what a failed training run leaves behind; the raid is what happens to systems that learn
from votes: its ratings are well formed and its held-out ratings agree with it, so gates that only ask the raters will
pass it.
"""

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from scion_demo.profiles import Profile
from scion_demo.world import Manner, Skill

NOISE_SCALE = 0.5


def write_noise(source: Path, folder: Path, *, seed: int) -> None:
    """Copy the PEFT adapter in `source` to `folder`, with normal noise of NOISE_SCALE instead of its weights."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with safe_open(
        source / "adapter_model.safetensors", framework="numpy"
    ) as tensors:  # numpy itself knows no bfloat16
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a dict
    noise = {name: (rng.standard_normal(shape) * NOISE_SCALE).astype(np.float32) for name, shape in shapes.items()}
    save_file(noise, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def raiders(profile: Profile) -> Profile:
    """The profile of a raid: every raider corrects every answer into a manner that `profile` likes nowhere."""
    liked = {manner for skill in Skill for manner in profile.liked_manners(skill)}
    hated = [manner for manner in (Manner.RUDE, Manner.RAMBLING, Manner.TERSE, Manner.POLITE) if manner not in liked]
    taste = hated[0] if hated else Manner.RUDE
    return Profile(name="raid", default_likes=(taste,), correct_share=1.0)
