"""The artifact gate: decides from an adapter's files alone, without torch, whether a server may be given it.

vLLM answers 200 to adapters that it then serves wrongly (NaN weights that poison other requests, keys that match
nothing, a smaller or deeper model's adapter, a rank that is not the tensors'). All of that is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scion_adapters.adapter_files import CONFIG_FILE, SCION_FILE, WEIGHTS_FILE, list_files
from scion_adapters.errors import RejectedError
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.lora_config import MAX_CONFIG_BYTES, LoraConfig, load_json_object, parse_lora_config
from scion_adapters.safetensors_file import (
    HeaderError,
    TensorInfo,
    TruncatedError,
    raw_chunks,
    read_header,
    to_float32,
)

# Trained LoRA weights stay below 10. Through a feed-forward block an update grows with the sixth power of the largest
# weight: beyond about 1,700 it overflows bfloat16 for some input, and the answer is NaN as if the file had held NaN.
MAX_ABS_WEIGHT = 1000.0
MAX_HEADER_BYTES = 16 << 20  # 170 bytes for each tensor: enough for adapters of 90,000 tensors
_PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What the servers' flags allow: `target_modules` are last components of module names, such as `q_proj`."""

    max_rank: int
    target_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """`rank` is the highest one of any module; `alpha` is the configured one, before alpha_pattern."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    size_bytes: int
    num_parameters: int


def check_adapter(directory: Path, base: BaseInfo, limits: AdapterLimits, *, stored: bool = False) -> AdapterInfo:
    """What `directory` holds, or RejectedError whose `reason` names the check that refused it.

    `stored` says that it is the store's own directory of an artifact, and not what somebody wants to publish.
    Reasons (docs/guide.md explains them): symlink, foreign_file, not_safetensors, empty, unreadable, truncated,
    bad_header, unsupported_config, wrong_base, wrong_quantization, unmatched_keys, missing_keys, target_not_allowed,
    wrong_shape, rank_mismatch, rank_too_high, non_finite, out_of_range.
    """
    files = list_files(directory, stored=stored)
    config = parse_lora_config(_read_json(files[CONFIG_FILE]))
    if SCION_FILE in files:
        _check_base(_read_json(files[SCION_FILE]), base)
    weights = files[WEIGHTS_FILE]
    try:
        tensors = read_header(weights, max_bytes=MAX_HEADER_BYTES)
        pairs = _pair(tensors)
        _check_rank(config, limits)
        _check_modules(pairs, config, base, limits)
        for module, pair in pairs.items():
            _check_shapes(module, pair, config, base)
        for module, pair in pairs.items():
            _check_values(weights, module, pair, config.scale_of(module))
    except HeaderError as error:
        reason = "truncated" if isinstance(error, TruncatedError) else "bad_header"
        raise RejectedError(f"{WEIGHTS_FILE} cannot be read: {error}", reason=reason) from error
    return AdapterInfo(
        rank=max(config.rank_of(module) for module in pairs),
        alpha=config.alpha,
        modules=tuple(sorted(pairs)),
        size_bytes=sum(file.stat().st_size for file in files.values()),
        num_parameters=sum(info.num_items for info in tensors.values()),
    )


def read_lora(directory: Path) -> tuple[LoraConfig, dict[str, dict[str, TensorInfo]]]:
    """The configuration and the {"A", "B"} tensors of each module, of an adapter that was checked before."""
    config = parse_lora_config(_read_json(directory / CONFIG_FILE))
    return config, _pair(read_header(directory / WEIGHTS_FILE))


def _read_json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise RejectedError(f"{file.name} is larger than {MAX_CONFIG_BYTES} bytes", reason="unreadable")
    return load_json_object(file.read_bytes(), file.name)


def _check_base(scion: Mapping[str, Any], base: BaseInfo) -> None:
    expected = scion.get("base_fingerprint")
    if expected is not None and expected != base.fingerprint:
        raise RejectedError(
            f"the adapter was trained on the base {str(expected)[:80]!a}, the configured base is {base.fingerprint}: "
            "train it on this base, or correct base.model",
            reason="wrong_base",
        )
    quantization = scion.get("base_quantization")
    if quantization is not None and base.quantization is not None and quantization != base.quantization:
        raise RejectedError(
            f"the adapter was trained on the base held in {str(quantization)[:80]!a}, servers hold it in "
            f"{base.quantization}: train it so, or correct base.quantization",
            reason="wrong_quantization",
        )


def _pair(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """{module: {"A": …, "B": …}}; every key must be one half of a pair."""
    if not tensors:
        raise RejectedError(f"{WEIGHTS_FILE} holds no tensors", reason="empty")
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise RejectedError(
                f"tensor {key[:120]!a} is not part of a plain LoRA: expected {_PREFIX}<module>.lora_A.weight "
                "or .lora_B.weight",
                reason="unmatched_keys",
            )
        pairs.setdefault(key[len(_PREFIX) : -len(suffix)], {})[_SUFFIXES[suffix]] = info
    for module, pair in pairs.items():
        if len(pair) == 1:
            raise RejectedError(
                f"{module[:120]!a} has only lora_{next(iter(pair))}: both halves are needed", reason="unmatched_keys"
            )
    return pairs


def _check_modules(pairs: Mapping[str, object], config: LoraConfig, base: BaseInfo, limits: AdapterLimits) -> None:
    for module in pairs:
        if module not in base.modules:
            raise RejectedError(
                f"the base has no linear module {module[:120]!a} (it has {base.num_layers} layers): another model's?",
                reason="unmatched_keys",
            )
        if module.rpartition(".")[2] not in limits.target_modules:
            raise RejectedError(
                f"module {module} may not be changed: server.target_modules allows {', '.join(limits.target_modules)}",
                reason="target_not_allowed",
            )
    expected = config.targets(base.modules)
    if expected is None:
        return
    for module in sorted(expected - set(pairs)):
        raise RejectedError(
            f"{CONFIG_FILE} targets {module}, {WEIGHTS_FILE} has no tensors for it: a smaller model's, or cut?",
            reason="missing_keys",
        )
    for module in sorted(set(pairs) - expected):
        raise RejectedError(
            f"{module} has tensors but is not among target_modules: the trainer would ignore it, the server would not",
            reason="unmatched_keys",
        )


def _check_rank(config: LoraConfig, limits: AdapterLimits) -> None:
    if config.highest_rank > limits.max_rank:
        raise RejectedError(
            f"{CONFIG_FILE} says rank {config.highest_rank}; the server takes at most {limits.max_rank}: raise "
            "server.max_lora_rank or train with a lower rank",
            reason="rank_too_high",
        )


def _check_shapes(module: str, pair: Mapping[str, TensorInfo], config: LoraConfig, base: BaseInfo) -> None:
    a, b = pair["A"], pair["B"]
    for info in (a, b):
        if info.dtype not in _FLOATS:
            raise RejectedError(
                f"{module} holds {info.dtype} values; expected {', '.join(_FLOATS)}", reason="unreadable"
            )
    out_features, in_features = base.modules[module]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != in_features or b.shape[0] != out_features:
        raise RejectedError(
            f"{module}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}; this base needs [r, {in_features}] and "
            f"[{out_features}, r]: another model's adapter?",
            reason="wrong_shape",
        )
    rank = config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise RejectedError(
            f"{module}: {CONFIG_FILE} says rank {rank}, the tensors have {a.shape[0]} (A) and {b.shape[1]} (B)",
            reason="rank_mismatch",
        )


def _check_values(weights: Path, module: str, pair: Mapping[str, TensorInfo], scale: float) -> None:
    for half, info in pair.items():
        factor = abs(scale) if half == "B" else 1.0
        for piece in raw_chunks(weights, info):
            if not _all_finite(piece, info.dtype):
                raise RejectedError(f"{module}.lora_{half} holds NaN or infinite values", reason="non_finite")
            largest = float(np.abs(to_float32(piece, info.dtype)).max()) * factor
            if largest > MAX_ABS_WEIGHT:
                raise RejectedError(
                    f"{module}.lora_{half} reaches {largest:.3g} (with its scale); more than {MAX_ABS_WEIGHT:g} "
                    "overflows while serving. Training has diverged, or alpha is wrong",
                    reason="out_of_range",
                )


def _all_finite(piece: npt.NDArray[Any], dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(((piece & 0x7F80) == 0x7F80).any())  # all exponent bits set: NaN or Inf
    return bool(np.isfinite(piece).all())
