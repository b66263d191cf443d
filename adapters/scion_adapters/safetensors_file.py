"""Reading safetensors files without torch: a strict header parser and numpy access to the tensors' bytes.

Every claim of a header is checked against the file before a byte is believed: sizes, offsets, shapes, gaps, duplicates.
Format: https://github.com/huggingface/safetensors#format. Knows nothing of adapters.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_CHUNK_ITEMS = 1 << 22
_MAX_SIZE = 1 << 63  # of one dimension or offset: multiplying larger claims would take hours
_MAX_SIZES = 16  # dimensions of one tensor


class HeaderError(ValueError):
    """The file is not a well-formed safetensors file."""


class TruncatedError(HeaderError):
    """The file ends before what its header describes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. `begin` and `end` are absolute byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_items(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path, *, max_bytes: int = MAX_HEADER_BYTES) -> dict[str, TensorInfo]:
    """The tensors of `path` by name. Raises HeaderError when anything in the header is not exactly true of the file.

    A header longer than `max_bytes` is not read.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise TruncatedError(f"{path.name} has {size_bytes} bytes; a safetensors file has at least 8")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > min(max_bytes, size_bytes - 8):
            raise HeaderError(
                f"{path.name} claims a header of {header_bytes} bytes and has {size_bytes} bytes in all; "
                f"a header may have {max_bytes}"
            )
        raw = file.read(header_bytes)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"the header of {path.name} is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError(f"the header of {path.name} is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _tensor_info(path.name, name, entry, start) for name, entry in header.items()}
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise HeaderError(f"{path.name}: tensor {name[:120]!r} begins at byte {info.begin}, expected {position}")
        position = info.end
    if position != size_bytes:
        kind, what = (TruncatedError, "truncated") if position > size_bytes else (HeaderError, "something is behind it")
        raise kind(f"{path.name} has {size_bytes} bytes, its header describes {position}: {what}")
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _tensor_info(file_name: str, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{file_name}: tensor {name[:120]!r}"
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise HeaderError(f"{where} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise HeaderError(f"{where}: shape and data_offsets must be short lists of non-negative integers")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise HeaderError(f"{where}: {dtype}{list(shape)} takes {expected} bytes, its offsets say {offsets}")
    return TensorInfo(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_SIZES
        and all(type(item) is int and 0 <= item < _MAX_SIZE for item in value)
    )


def raw_chunks(path: Path, info: TensorInfo) -> Iterator[npt.NDArray[Any]]:
    """The tensor's items in order, in flat pieces that fit in memory. BF16 comes as its bits, uint16."""
    dtype = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}.get(info.dtype)
    if dtype is None:
        raise HeaderError(f"{path.name} holds {info.dtype} values; expected BF16, F16 or F32")
    item_bytes = _ITEM_BYTES[info.dtype]
    with path.open("rb") as file:
        file.seek(info.begin)
        left = info.num_items
        while left:
            piece = np.fromfile(file, dtype=dtype, count=min(left, _CHUNK_ITEMS))
            if not piece.size:
                raise HeaderError(f"{path.name} ended {left * item_bytes} bytes early: it changed while it was read")
            left -= piece.size
            yield piece


def read_array(path: Path, info: TensorInfo) -> npt.NDArray[np.float32]:
    """The whole tensor as float32."""
    pieces = [to_float32(piece, info.dtype) for piece in raw_chunks(path, info)]
    flat = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    return flat.reshape(info.shape)


def to_float32(piece: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Items from `raw_chunks` as float32 (bf16 is the upper half of a float32)."""
    if dtype == "BF16":
        return (piece.astype(np.uint32) << 16).view(np.float32)
    return piece.astype(np.float32)


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes at `offset`."""
    with path.open("rb") as file:
        return os.pread(file.fileno(), count, offset)
