"""Nothing that a safetensors header claims is believed before it is compared with the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from scion_adapters.safetensors_file import HeaderError, raw_chunks, read_array, read_header
from tests.helpers.adapters import write_safetensors

GOOD: dict[str, dict[str, object]] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write_raw(path: Path, header: object, data: bytes = bytes(8), *, claim: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if claim is None else claim) + raw + data)
    return path


def entry(**changes: object) -> dict[str, dict[str, object]]:
    return {"a": {**GOOD["a"], **changes}}


# header (or raw bytes), the data behind it, the length that the file claims for the header, a piece of the message
DAMAGED = [
    (GOOD, bytes(8), 10**12, "claims a header of 1000000000000"),  # would allocate a terabyte
    (GOOD, bytes(8), 2**64 - 1, "claims a header"),  # the largest claim there is
    (GOOD, bytes(7), None, "truncated"),  # the last byte is missing
    (GOOD, bytes(9), None, "something is behind it"),  # one byte too many, which nobody would check
    (b"{", bytes(8), None, "not valid JSON"),  # cut inside the header
    (b"\xff\xfe", bytes(8), None, "not valid JSON"),  # no text at all
    (b"[" * 100_000, bytes(8), None, "not valid JSON"),  # nested beyond the parser's stack
    ([], bytes(8), None, "not a JSON object"),  # JSON, but no header
    (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', bytes(8), None, "occurs twice"),  # two claims
    (entry(dtype="F31"), bytes(8), None, "unknown dtype"),  # no such type
    (entry(dtype=["F32"]), bytes(8), None, "unknown dtype"),  # not even a string
    (entry(shape=[3]), bytes(8), None, "takes 12 bytes"),  # shape and offsets disagree
    (entry(shape=[-2]), bytes(8), None, "non-negative"),  # negative size
    (entry(shape=[2.0]), bytes(8), None, "non-negative"),  # not an integer
    (entry(shape=[True, 2]), bytes(8), None, "non-negative"),  # Python takes True for 1
    (entry(data_offsets=[8, 0]), bytes(8), None, "takes 8 bytes"),  # end before beginning
    (entry(data_offsets=[8, 16]), bytes(16), None, "expected"),  # a hole where anything could hide
    (entry(data_offsets=[0, 8, 16]), bytes(8), None, "non-negative"),  # three offsets
    (entry(shape=[2**63]), bytes(8), None, "non-negative"),  # larger than any file
    (entry(shape=[1] * 17), bytes(8), None, "short lists"),  # more dimensions than any tensor has
    (entry(extra=1), bytes(8), None, "exactly dtype, shape and data_offsets"),  # an unknown field
    (dict.fromkeys("ab", GOOD["a"]), bytes(8), None, "expected"),  # two tensors over the same bytes
]


@pytest.mark.parametrize(("header", "data", "claim", "message"), DAMAGED)
def test_a_damaged_header_is_refused(
    tmp_path: Path, header: object, data: bytes, claim: int | None, message: str
) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, data, claim=claim)
    with pytest.raises(HeaderError, match=message):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_shorter_than_its_prefix_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(HeaderError, match="at least 8"):
        read_header(tmp_path / "x.safetensors")


def test_a_good_file_passes_in_any_order_and_with_metadata(tmp_path: Path) -> None:
    second = {"dtype": "F16", "shape": [0, 5], "data_offsets": [8, 8]}  # empty tensors are allowed
    path = write_raw(tmp_path / "x.safetensors", {"b": second, **GOOD, "__metadata__": {"format": "pt"}})
    header = read_header(path)
    assert set(header) == {"a", "b"}
    assert header["b"].num_items == 0
    assert list(raw_chunks(path, header["b"])) == []


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_values_come_back_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0.0, -1.5, 2.0], [0.25, -1024.0, 0.0078125]], np.float32)  # exact in all three
    path = write_safetensors(tmp_path / "x.safetensors", {"other": np.ones((3,), np.float32), "a": values}, dtype)
    np.testing.assert_array_equal(read_array(path, read_header(path)["a"]), values)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", entry(dtype="I32"))
    with pytest.raises(HeaderError, match="I32 values"):
        list(raw_chunks(path, read_header(path)["a"]))
