"""What the base is: a fingerprint of its weights and the shapes of its linear layers, read without torch.

The fingerprint covers the architecture (config.json without the fields that tools rewrite) and every tensor's name,
dtype, shape and bytes: small tensors whole, large ones in evenly spaced samples, so that a 100 GB base takes seconds
and two bases of one architecture still differ. How tensors are cut into files does not matter. The tokenizer is not
covered.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.safetensors_file import HeaderError, TensorInfo, read_bytes, read_header
from scion_adapters.settings import Settings

_WHOLE_BYTES = 1 << 20  # tensors up to this size are hashed completely
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 32
_VOLATILE = {"transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype"}
_NOT_LINEAR = {"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "position_embeddings"}


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """`modules` maps each linear layer's name, such as `model.layers.0.mlp.up_proj`, to (out_features, in_features).

    `quantization` is how server and trainer hold it; None where only the files are known.
    """

    fingerprint: str
    modules: Mapping[str, tuple[int, int]]
    vocab_size: int
    num_layers: int
    quantization: str | None = None


def base_info(settings: Settings) -> BaseInfo:
    """The configured base. Raises NotFoundError or InvalidInputError when its files are missing or unreadable."""
    return replace(read_base(resolve_base(settings)), quantization=settings.base.quantization)


def resolve_base(settings: Settings) -> Path:
    """The base as a local directory: `base.model` itself, or where the Hugging Face cache holds it."""
    if settings.base_path is not None:
        return settings.base_path
    name = settings.base.model
    from huggingface_hub import snapshot_download  # slow to import, and only needed for ids
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise NotFoundError(
            f"base.model {name!r} is neither a directory below {settings.home} nor a downloaded model: "
            f"correct it in the configuration, or download it with `hf download {name}`"
        ) from error


def read_base(directory: Path) -> BaseInfo:
    """The base in `directory`; the result is remembered for as long as the files keep their sizes and times."""
    if not (directory / "config.json").is_file():
        raise NotFoundError(f"{directory} is not a model: it has no config.json")
    files = (directory / "config.json", *_weight_files(directory))
    stats = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _read(stats)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"{index} is not a safetensors index: {error}") from error
        files = sorted(directory / str(name) for name in names)
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {missing[0]}" if missing else "has no .safetensors file"
        raise NotFoundError(f"the base {directory} {what}: download it completely, in safetensors format")
    return files


@lru_cache(maxsize=8)
def _read(stats: tuple[tuple[str, int, int], ...]) -> BaseInfo:
    config_path, *weight_paths = (Path(name) for name, _, _ in stats)
    try:
        config: dict[str, Any] = json.loads(config_path.read_bytes())
    except ValueError as error:
        raise InvalidInputError(f"{config_path} is not JSON: {error}") from error
    if "quantization_config" in config:
        raise InvalidInputError(
            f"the base {config_path.parent} is quantized already: name the original checkpoint (bf16 or fp16) in "
            "base.model; server and trainer both quantize it while loading"
        )
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for path in weight_paths:
        try:
            tensors.update({name: (path, info) for name, info in read_header(path).items()})
        except HeaderError as error:
            raise InvalidInputError(f"the base is damaged: {error}") from error
    text_config = config.get("text_config", config)
    return BaseInfo(
        fingerprint=_fingerprint(config, tensors),
        modules=_linear_modules({name: info for name, (_, info) in tensors.items()}),
        vocab_size=int(text_config.get("vocab_size", 0)),
        num_layers=int(text_config.get("num_hidden_layers", 0)),
    )


def _linear_modules(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    modules = {}
    for name, info in sorted(tensors.items()):
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) == 2 and module.rpartition(".")[2] not in _NOT_LINEAR:
            modules[module] = (info.shape[0], info.shape[1])
    return modules


def _fingerprint(config: Mapping[str, Any], tensors: Mapping[str, tuple[Path, TensorInfo]]) -> str:
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(stable, sort_keys=True).encode())
    for name, (path, info) in sorted(tensors.items()):
        digest.update(f"\0{name}\0{info.dtype}\0{info.shape}\0".encode())
        for offset, count in _samples(info.end - info.begin):
            digest.update(read_bytes(path, info.begin + offset, count))
    return f"sha256:{digest.hexdigest()}"


def _samples(size_bytes: int) -> list[tuple[int, int]]:
    """(offset, count) of the bytes that are hashed of a tensor; the first and the last are among them."""
    if size_bytes <= _WHOLE_BYTES:
        return [(0, size_bytes)]
    last = size_bytes - _SAMPLE_BYTES
    return [(last * index // (_NUM_SAMPLES - 1), _SAMPLE_BYTES) for index in range(_NUM_SAMPLES)]
