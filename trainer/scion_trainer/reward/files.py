"""A reward model's weights as files: `member-<k>/` in PEFT's format, and all heads in `heads.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scion_trainer.reward.model import Head, RewardModel
from scion_trainer.reward.store import read_manifest
from scion_trainer.roles import Roles, reward_role

HEADS = "heads.safetensors"


def save_weights(model: RewardModel, directory: Path) -> None:
    """In fp32: the calibration was fitted to exactly these weights."""
    for member in range(model.num_members):
        folder, role = directory / f"member-{member}", reward_role(member)
        folder.mkdir(parents=True)
        save_file(model.roles.state(role), str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
        config = model.roles.model.peft_config[role].to_dict()
        config |= {"inference_mode": True, "base_model_name_or_path": ""}  # the fingerprint says which base it is
        text = json.dumps(config, indent=2, sort_keys=True, default=lambda value: sorted(value))
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    weight_KD = torch.stack([head.weight.detach().cpu() for head in model.heads])
    bias_K = torch.stack([head.bias.detach().cpu() for head in model.heads])
    save_file({"weight": weight_KD.contiguous(), "bias": bias_K}, str(directory / HEADS))


def load_reward_model(roles: Roles, directory: Path, *, base_fingerprint: str) -> RewardModel:
    """Add the members in `directory` to `roles`, frozen, and return the model. Raises as `read_manifest` does."""
    manifest = read_manifest(directory, base_fingerprint=base_fingerprint)
    tensors = load_file(str(directory / HEADS))
    heads = []
    for member in range(manifest.num_members):
        roles.add(reward_role(member), directory=directory / f"member-{member}")
        head = Head(tensors["weight"].shape[1])
        head.load_state_dict({"weight": tensors["weight"][member], "bias": tensors["bias"][member]})
        heads.append(head.requires_grad_(False).to(roles.device))
    return RewardModel(roles, heads, disagreement_penalty=manifest.disagreement_penalty)
