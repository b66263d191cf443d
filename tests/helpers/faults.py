"""Adapters that must never reach an engine: what is done to a good one, and the reason with which it is refused.

The checks have tables of their own in tests/unit/adapters; here is one adapter for each kind of accident or attack.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scion_adapters.fingerprint import read_base
from tests.helpers.adapters import Tensors, make_adapter, make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
FAR = Path("elsewhere")  # beside the adapter's directory


@dataclass(frozen=True, slots=True)
class Fault:
    """`make(directory, base)` leaves the bad adapter in `directory`; the message of the refusal holds `says`.

    `only_directory`: it lies in the file system and cannot be sent over HTTP.
    """

    name: str
    reason: str
    says: str
    make: Callable[[Path, Path], object]
    only_directory: bool = False


def adapter(**changes: Any) -> Callable[[Path, Path], object]:
    """A bad adapter that `make_adapter` can write."""
    return lambda directory, base: make_adapter(directory, base, **changes)


def config(**fields: Any) -> Callable[[Path, Path], object]:
    return adapter(config=fields)


def then(change: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """A good adapter whose files are changed."""

    def make(directory: Path, base: Path) -> None:
        change(make_adapter(directory, base))

    return make


def of_base(**shape: int) -> Callable[[Path, Path], object]:
    """A good adapter of another model."""
    return lambda directory, base: make_adapter(directory, make_base(directory.parent / "other-base", **shape))


def header(change: Callable[[dict[str, Any]], object], *, padding: bytes = b"") -> Callable[[Path, Path], object]:
    """A good adapter whose weights have a changed header, and `padding` behind them."""

    def rewrite(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :] + padding)

    return then(rewrite)


def claim(length: int) -> Callable[[Path, Path], object]:
    """A good adapter whose weights claim a header of `length` bytes."""

    def rewrite(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        (directory / WEIGHTS).write_bytes(struct.pack("<Q", length) + raw[8:])

    return then(rewrite)


def poison(value: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{Q0}.lora_B.weight"][-1, -1] = value

    return edit


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    """Rename in all keys."""

    def edit(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def scale(factor: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for array in tensors.values():
            array *= factor

    return edit


def add_deeper_layer(tensors: Tensors) -> None:
    prefix = "base_model.model.model.layers.2.self_attn.q_proj"
    tensors[f"{prefix}.lora_A.weight"] = np.ones((4, 16), np.float32)
    tensors[f"{prefix}.lora_B.weight"] = np.ones((16, 4), np.float32)


def overlap(entries: dict[str, Any]) -> None:
    """Two tensors of one shape over the same bytes."""
    first, second = (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in (0, 1))
    entries[second]["data_offsets"] = entries[first]["data_offsets"]


def move_on(entries: dict[str, Any]) -> None:
    """The last tensor begins four bytes later: a gap in which anything could hide."""
    last = max(entries.values(), key=lambda entry: entry["data_offsets"][1])
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]


def grow(entries: dict[str, Any]) -> None:
    """A tensor of more rows than anybody can count."""
    entries[f"{Q0}.lora_A.weight"]["shape"] = [2**64, 16]


def cut(path: Path, count: int) -> None:
    """Leave the last `count` bytes out."""
    os.truncate(path, path.stat().st_size - count)


def pipe(directory: Path) -> None:
    """Opening it would wait for ever."""
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


def pickled(directory: Path, name: str) -> None:
    (directory / name).write_bytes(pickle.dumps({"weight": [0.0] * 1000}))


def linked(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        target = directory.parent / FAR
        (directory / name).rename(target)
        (directory / name).symlink_to(target)

    return change


def linked_directory(directory: Path) -> None:
    target = directory.parent / FAR
    directory.rename(target)
    directory.symlink_to(target)


def other_fingerprint(directory: Path, base: Path) -> None:
    other = read_base(make_base(directory.parent / "other-base", seed=9))
    make_adapter(directory, base, scion={"base_fingerprint": other.fingerprint})


FAULTS = [
    # values
    Fault("NaN", "non_finite", "q_proj.lora_B holds NaN", adapter(edit=poison(np.nan))),
    Fault("Inf", "non_finite", "q_proj.lora_B holds NaN", adapter(edit=poison(np.inf))),
    Fault("minus Inf in float32", "non_finite", "holds NaN", adapter(edit=poison(-np.inf), dtype="F32")),
    Fault("all huge", "out_of_range", "overflows while serving", adapter(edit=scale(1e7))),
    Fault("huge by its alpha", "out_of_range", "overflows while serving", config(lora_alpha=1e9)),
    # modules
    Fault("no matching module", "unmatched_keys", "no linear module", adapter(edit=rename("model.layers", "h"))),
    Fault("some unmatched modules", "unmatched_keys", "no linear module", adapter(edit=rename("1.mlp.up", "1.mlp.x"))),
    Fault("keys of no LoRA", "unmatched_keys", "not part of a plain LoRA", adapter(edit=rename("lora_A", "weight"))),
    Fault("no tensors", "empty", "holds no tensors", adapter(edit=lambda tensors: tensors.clear())),
    Fault("half of a pair", "unmatched_keys", "both halves", adapter(edit=lambda t: t.pop(f"{Q0}.lora_A.weight"))),
    # rank
    Fault("rank too high", "rank_too_high", "raise server.max_lora_rank", adapter(rank=17)),
    Fault("rank too high for some", "rank_too_high", "rank 512", config(rank_pattern={"no_such_module": 512})),
    Fault("rank not the tensors'", "rank_mismatch", "says rank 8", config(r=8)),
    # what the server cannot run
    Fault("DoRA", "unsupported_config", "use_dora", config(use_dora=True)),
    Fault("bias", "unsupported_config", "bias", config(bias="lora_only")),
    Fault("LoRA bias", "unsupported_config", "lora_bias", config(lora_bias=True)),
    Fault("modules to save", "unsupported_config", "modules_to_save", config(modules_to_save=["lm_head"])),
    Fault("PiSSA", "unsupported_config", "init_lora_weights", config(init_lora_weights="pissa")),
    Fault("OLoRA", "unsupported_config", "init_lora_weights", config(init_lora_weights="olora")),
    Fault("trainable tokens", "unsupported_config", "trainable_token_indices", config(trainable_token_indices=[1])),
    Fault("another kind", "unsupported_config", "peft_type", config(peft_type="LOHA")),
    Fault("a field of tomorrow", "unsupported_config", "lora_teleport", config(lora_teleport=True)),
    Fault("an endless expression", "unsupported_config", "regular expressions", config(rank_pattern={"(a+)+$": 4})),
    # another base
    Fault("wrong base", "wrong_base", "trained on the base", other_fingerprint),
    Fault("wrong quantization", "wrong_quantization", "none", adapter(scion={"base_quantization": "none"})),
    Fault("a smaller model's", "wrong_shape", "another model", of_base(hidden=8)),
    Fault("a shallower model's", "missing_keys", "a smaller model", of_base(layers=1)),
    Fault("a deeper model's", "unmatched_keys", "no linear module", adapter(edit=add_deeper_layer)),
    # the weights' file
    Fault("truncated", "truncated", "truncated", then(lambda d: cut(d / WEIGHTS, 1))),
    Fault("truncated in the prefix", "truncated", "at least 8", then(lambda d: os.truncate(d / WEIGHTS, 5))),
    Fault("header too large", "bad_header", "claims a header", claim(10**12)),
    Fault("header of the largest size", "bad_header", "claims a header", claim(2**64 - 1)),
    Fault("header too small", "bad_header", "not valid JSON", claim(100)),
    Fault("overlapping tensors", "bad_header", "begins at byte", header(overlap)),
    Fault("a gap", "bad_header", "begins at byte", header(move_on, padding=bytes(4))),
    Fault("something behind", "bad_header", "something is behind it", header(lambda _: None, padding=b"x")),
    Fault("a tensor of 2^64 rows", "bad_header", "short lists", header(grow)),
    Fault("zero-size weights", "empty", "0 bytes", then(lambda d: os.truncate(d / WEIGHTS, 0))),
    Fault("zero-size configuration", "empty", "0 bytes", then(lambda d: os.truncate(d / CONFIG, 0))),
    Fault("no weights", "empty", "there is no adapter_model", then(lambda d: (d / WEIGHTS).unlink())),
    Fault("no configuration", "unreadable", "there is no adapter_config", then(lambda d: (d / CONFIG).unlink())),
    Fault("configuration of no JSON", "unreadable", "not valid JSON", then(lambda d: (d / CONFIG).write_text("{"))),
    # other files
    Fault("pickle", "not_safetensors", "can run code", then(lambda d: pickled(d, "adapter_model.bin"))),
    Fault("pickle by another name", "bad_header", "claims a header", then(lambda d: pickled(d, WEIGHTS))),
    Fault("extra file", "foreign_file", "does not belong", then(lambda d: (d / "run.py").write_text("import os"))),
    Fault("the store's own", "foreign_file", "does not belong", then(lambda d: (d / "manifest.json").write_text("{}"))),
    # the file system
    Fault("weights linked out", "symlink", "symbolic link", then(linked(WEIGHTS)), True),
    Fault("configuration linked out", "symlink", "symbolic link", then(linked(CONFIG)), True),
    Fault("a folder inside", "foreign_file", "does not belong", then(lambda d: (d / "reference").mkdir()), True),
    Fault("a pipe for weights", "foreign_file", "does not belong", then(pipe), True),
    Fault("no directory", "unreadable", "not a directory", lambda directory, base: None, True),
]  # fmt: skip

# a name under which nothing can be published, the reason, and why somebody would try
BAD_NAMES = [
    ("", "invalid_name"),  # nothing
    ("base", "base_name"),  # requests for the base would get the adapter
    ("champion", "reserved_name"),  # an alias of every adapter
    ("challenger", "reserved_name"),  # another
    ("previous", "reserved_name"),  # another
    ("chat@champion", "invalid_name"),  # moves no traffic
    ("chat:7", "invalid_name"),  # a number is given, not taken
    ("../chat", "invalid_name"),  # a way out
    ("/etc/chat", "invalid_name"),  # an absolute path
    ("chat/../../x", "invalid_name"),  # a way out in the middle
    ("..", "invalid_name"),  # the folder above
    ("chat\\..", "invalid_name"),  # another system's way out
    ("chаt", "invalid_name"),  # a Cyrillic а
    ("ｃｈａｔ", "invalid_name"),  # full-width letters
    ("ch\u200bat", "invalid_name"),  # a space of no width
    ("chat\u200f", "invalid_name"),  # a mark that turns the direction of writing
    ("\u202etahc", "invalid_name"),  # the same, which shows as `chat`
    ("cha\u0300t", "invalid_name"),  # a letter of two characters
    ("chat\0", "invalid_name"),  # where C would end
    ("chat\t", "invalid_name"),  # a column of a log
    ("Chat", "invalid_name"),  # names differ by more than case
    (" chat", "invalid_name"),  # invisible
    ("x" * 65, "invalid_name"),  # longer than its column
    ("x" * 5000, "invalid_name"),  # longer than a path may be
]
