"""The adapter under training: a fresh LoRA, or the parent version made trainable; and its export as files.

Owns PEFT's side of a run. It knows nothing of what the adapter is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from scion_adapters.errors import InvalidInputError
from scion_trainer.base import LoadedBase
from scion_trainer.config import RunConfig
from scion_trainer.lean_lora import use_lean_forward

ADAPTER = "default"
"""The name under which PEFT holds the trained role. TRL expects this one."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the adapter is like, and a note when that is not what the settings ask for."""

    rank: int
    alpha: int
    target_modules: tuple[str, ...]
    note: str | None = None


def start_adapter(base: LoadedBase, config: RunConfig, parent: Path | None) -> tuple[Any, Shape]:
    """A PeftModel on `base` with one trainable adapter in fp32: a copy of `parent`, or one that changes nothing yet.

    A parent keeps its rank, alpha and target modules, whatever the settings say: they cannot change without losing it.
    """
    use_lean_forward()
    if parent is None:
        torch.manual_seed(config.seed)
        fresh = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_present(base, config.target_modules),
        )
        model = get_peft_model(base.model, fresh, adapter_name=ADAPTER)
    else:
        inherited = LoraConfig.from_pretrained(str(parent))
        inherited.lora_dropout = config.dropout
        inherited.base_model_name_or_path = base.model.name_or_path  # the exporting machine's name means nothing here
        model = PeftModel.from_pretrained(
            base.model, str(parent), adapter_name=ADAPTER, is_trainable=True, config=inherited
        )
    keep_full_precision(model)
    return model, _shape(model.peft_config[ADAPTER], config)


def keep_full_precision(model: Any) -> None:
    """Hold the trained weights in fp32; the forward runs under bf16 autocast anyway.

    TRL casts them to bf16 on a quantized base. A bf16 weight of 0.02 has steps of 1e-4, so that Adam's updates at the
    learning rates of large models (5e-6 to 5e-5) would round to nothing. Call it again after a TRL trainer was built.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export_adapter(model: Any, directory: Path, *, base_model: str, lineage: Mapping[str, Any]) -> Path:
    """Write the adapter as vLLM wants it (bf16, files at the root), and `scion.json` with where it comes from."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False).items()
    }
    save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {**model.peft_config[ADAPTER].to_dict(), "inference_mode": True, "base_model_name_or_path": base_model}
    _write_json(directory / "adapter_config.json", config)
    _write_json(directory / "scion.json", dict(lineage))
    return directory


def _shape(adapter: LoraConfig, config: RunConfig) -> Shape:
    targets = (
        tuple(sorted(adapter.target_modules))
        if not isinstance(adapter.target_modules, str)
        else (adapter.target_modules,)
    )
    note = None
    if (adapter.r, adapter.lora_alpha) != (config.rank, config.alpha):
        note = (
            f"rank {adapter.r} and alpha {adapter.lora_alpha} are the parent's and stay so "
            f"(settings: {config.rank} and {config.alpha}); roll back to version 0 to start afresh"
        )
    return Shape(adapter.r, adapter.lora_alpha, targets, note)


def _present(base: LoadedBase, wanted: tuple[str, ...]) -> list[str]:
    """The wanted module names that the base has."""
    names = {name.rsplit(".", 1)[-1] for name, _ in base.model.named_modules()}
    present = [name for name in wanted if name in names]
    if not present:
        raise InvalidInputError(
            f"server.target_modules = {', '.join(wanted)}: the base has none of them; it has linear modules such as "
            f"{', '.join(sorted(n for n in names if n.endswith(('proj', 'fc1', 'fc2', 'qkv')))[:8]) or 'none known'}",
            field="server.target_modules",
        )
    return present


def _write_json(path: Path, data: dict[str, Any]) -> None:
    # Sets (PEFT's target_modules) are sorted, so that the same adapter always has the same bytes.
    text = json.dumps(data, indent=2, sort_keys=True, default=lambda value: sorted(value))
    path.write_text(text + "\n", encoding="utf-8")
