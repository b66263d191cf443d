"""Tiny bases and PEFT adapter directories, written with numpy alone: what unit tests publish, check and damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scion_adapters.fingerprint import BaseInfo, read_base
from scion_adapters.preflight import AdapterLimits
from scion_adapters.sections.serving import LORA_TARGETS

Tensors = dict[str, npt.NDArray[np.float32]]
LIMITS = AdapterLimits(max_rank=16, target_modules=LORA_TARGETS)


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[np.float32]], dtype: str = "BF16") -> Path:
    """A valid safetensors file; `dtype` is BF16, F16 or F32."""
    header: dict[str, Any] = {}
    blobs: list[bytes] = []
    position = 0
    for name, array in tensors.items():
        blob = encode(array, dtype)
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + len(blob)]}
        blobs.append(blob)
        position += len(blob)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(blobs))
    return path


def encode(array: npt.NDArray[np.float32], dtype: str) -> bytes:
    """The array's bytes in `dtype`; bf16 is the upper half of a float32."""
    if dtype == "BF16":
        return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return np.ascontiguousarray(array).astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()


def make_base(
    directory: Path, *, layers: int = 2, hidden: int = 16, intermediate: int = 24, vocab: int = 32, seed: int = 0
) -> Path:
    """A Llama-shaped base (config.json, model.safetensors) without a tokenizer; key-value heads are half as many."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj": (hidden, hidden),
            f"{prefix}.self_attn.k_proj": (hidden // 2, hidden),
            f"{prefix}.self_attn.v_proj": (hidden // 2, hidden),
            f"{prefix}.self_attn.o_proj": (hidden, hidden),
            f"{prefix}.mlp.gate_proj": (intermediate, hidden),
            f"{prefix}.mlp.up_proj": (intermediate, hidden),
            f"{prefix}.mlp.down_proj": (hidden, intermediate),
            f"{prefix}.input_layernorm": (hidden,),
            f"{prefix}.post_attention_layernorm": (hidden,),
        }
    random = np.random.default_rng(seed)
    tensors = {f"{name}.weight": random.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def make_loud(tensors: Tensors) -> None:
    """Weights that move log-probs, as training does."""
    for tensor in tensors.values():
        tensor *= 4


def make_adapter(
    directory: Path,
    base: Path | BaseInfo,
    *,
    rank: int = 4,
    alpha: int = 8,
    targets: tuple[str, ...] = LORA_TARGETS,
    dtype: str = "BF16",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    scion: Mapping[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
) -> Path:
    """A PEFT adapter directory for `base`: valid unless `config` (merged in) or `edit` (of the tensors) damage it.

    `scion` is written to scion.json. Different seeds give different weights, hence different digests.
    """
    info = base if isinstance(base, BaseInfo) else read_base(base)
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module, (out_features, in_features) in info.modules.items():
        if module.rpartition(".")[2] in targets:
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = random.normal(0, 0.02, (rank, in_features)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.normal(0, 0.02, (out_features, rank)).astype(np.float32)
    if edit is not None:
        edit(tensors)
    write_safetensors(directory / "adapter_model.safetensors", tensors, dtype)
    content = peft_config(rank=rank, alpha=alpha, targets=targets) | dict(config or {})
    (directory / "adapter_config.json").write_text(json.dumps(content, indent=2))
    if scion is not None:
        (directory / "scion.json").write_text(json.dumps(dict(scion)))
    return directory


def peft_config(*, rank: int = 4, alpha: int = 8, targets: tuple[str, ...] = LORA_TARGETS) -> dict[str, Any]:
    """What PEFT 0.21 writes into adapter_config.json for a plain LoRA."""
    return {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "base",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(targets),
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
