"""PEFT's `adapter_config.json`: what of it can be served exactly as it was trained; rank and scale of each module.

A field that changes what an adapter computes and that the server would ignore or refuse is refused here, unknown fields
included. PEFT and the server take the keys of patterns for regular expressions: only those that are names are accepted,
so no expression of a stranger is ever run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from scion_adapters.errors import RejectedError

UNSUPPORTED = "unsupported_config"
UNREADABLE = "unreadable"
MAX_CONFIG_BYTES = 1 << 20
MAX_PATTERNS = 1024
Patterns = tuple[tuple[re.Pattern[str], float], ...]

# Fields that say how the adapter was made or by whom, and nothing about what it computes.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type", "task_type", "bias",
}  # fmt: skip
# Inits that only choose the starting weights. PiSSA, OLoRA, CorDA and LoftQ change the base, which the server does not.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_MODULE_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """`target_modules` None: it does not say which modules must be there (all-linear, a pattern, some layers)."""

    rank: int
    alpha: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    use_rslora: bool
    target_modules: tuple[str, ...] | None

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.rank))

    @property
    def highest_rank(self) -> int:
        """Of the default and all patterns, also those that match nothing: the server compares this with its limit."""
        return max([self.rank, *(int(rank) for _, rank in self.rank_pattern)])

    def scale_of(self, module: str) -> float:
        """The factor on B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski, 2023, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, modules: Iterable[str]) -> set[str] | None:
        """Those of `modules` that this adapter must hold tensors for, or None if the configuration does not say."""
        if self.target_modules is None:
            return None
        targets = set(self.target_modules)
        return {module for module in modules if not targets.isdisjoint(_suffixes(module))}


def load_json_object(raw: bytes, name: str) -> dict[str, Any]:
    """`raw` as a JSON object without NaN or Infinity, or RejectedError(reason="unreadable")."""
    try:
        data = json.loads(
            raw.decode(), parse_constant=_no_constant
        )  # the server reads it as UTF-8 too, and as no other
    except (ValueError, RecursionError) as error:
        raise RejectedError(f"{name} is not valid JSON: {error}", reason=UNREADABLE) from error
    if not isinstance(data, dict):
        raise RejectedError(f"{name} must hold a JSON object, not {type(data).__name__}", reason=UNREADABLE)
    return data


def parse_lora_config(raw: Mapping[str, Any]) -> LoraConfig:
    """The configuration, or RejectedError(reason="unsupported_config") that names the field and the remedy."""
    if raw.get("peft_type") != "LORA":
        _refuse("peft_type", raw.get("peft_type"), "only LORA adapters can be served")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        _refuse("task_type", raw["task_type"], "expected CAUSAL_LM")
    if raw.get("bias", "none") != "none":  # null is not the same to the server
        _refuse("bias", raw["bias"], "the server does not apply biases; train with bias none")
    init = raw.get("init_lora_weights")
    if isinstance(init, list | dict) or init not in _PLAIN_INITS:
        _refuse("init_lora_weights", init, "it changes the base; convert it to a plain LoRA when saving with PEFT")
    for name, value in raw.items():
        if name not in _HARMLESS and name not in _READ and value:  # unset fields are false, empty or null
            _refuse(
                name, value, "the server would ignore it or refuse it, so the version would not be what was trained"
            )
    return LoraConfig(
        rank=_rank("r", raw.get("r")),
        alpha=_alpha("lora_alpha", raw.get("lora_alpha")),
        rank_pattern=tuple((key, _rank("rank_pattern", value)) for key, value in _patterns("rank_pattern", raw)),
        alpha_pattern=tuple((key, _alpha("alpha_pattern", value)) for key, value in _patterns("alpha_pattern", raw)),
        use_rslora=_flag("use_rslora", raw.get("use_rslora")),
        target_modules=_target_modules(raw),
    )


def _target_modules(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    targets = raw.get("target_modules")
    if isinstance(targets, str):
        return None
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        _refuse("target_modules", targets, "expected a list of module names")
    if any(raw.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")):
        return None
    return tuple(targets)


def _patterns(name: str, raw: Mapping[str, Any]) -> list[tuple[re.Pattern[str], Any]]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict) or len(pattern) > MAX_PATTERNS:
        _refuse(name, pattern, f"expected an object of at most {MAX_PATTERNS} module names")
    items = []
    for key, value in pattern.items():
        if not _MODULE_NAME.fullmatch(key.removeprefix("^").replace("\\.", ".")):
            _refuse(name, key, "expected plain module names, without regular expressions")
        # As PEFT's get_pattern_key and vLLM's PEFTHelper._match_pattern have it: a dot stands for any character.
        items.append((re.compile(rf"(.*\.)?({key})$"), value))
    return items


def _first_match(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _suffixes(module: str) -> list[str]:
    """a.b.c, b.c, c"""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        _refuse(name, value, "expected a positive integer")
    return value


def _alpha(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(name, value, "expected a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        _refuse(name, value, "expected true or false")
    return bool(value)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _refuse(field: str, value: Any, remedy: str) -> NoReturn:
    raise RejectedError(
        f"adapter_config.json: {ascii(field[:80])[1:-1]} = {str(value)[:80]!a} cannot be served: {remedy}",
        reason=UNSUPPORTED,
    )
