"""The base's fingerprint changes with the weights and the architecture, and with nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.fingerprint import base_info, read_base
from scion_adapters.safetensors_file import read_array, read_header
from scion_adapters.settings import load_settings
from tests.helpers.adapters import Tensors, make_base, write_safetensors


def load_tensors(directory: Path) -> Tensors:
    path = directory / "model.safetensors"
    return {name: read_array(path, info) for name, info in read_header(path).items()}


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def split(directory: Path) -> None:
    tensors = load_tensors(directory)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in parts.items():
        write_safetensors(directory / file, {name: tensors[name] for name in part})
    (directory / "model.safetensors").unlink()
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def reorder(directory: Path) -> None:
    tensors = load_tensors(directory)
    write_safetensors(directory / "model.safetensors", dict(reversed(tensors.items())))


def nudge(directory: Path) -> None:
    tensors = load_tensors(directory)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1.0
    write_safetensors(directory / "model.safetensors", tensors)


def rename(directory: Path) -> None:
    tensors = load_tensors(directory)
    tensors["model.final_norm.weight"] = tensors.pop("model.norm.weight")
    write_safetensors(directory / "model.safetensors", tensors)


def widen(directory: Path) -> None:
    write_safetensors(directory / "model.safetensors", load_tensors(directory), "F32")


# what happens to the base, and whether it is another base afterwards
CHANGES: list[tuple[Callable[[Path], object], bool]] = [
    (lambda d: os.utime(d / "model.safetensors"), False),  # touched
    (split, False),  # the same tensors in two files
    (reorder, False),  # the same tensors in another order
    (change_config(transformers_version="9.9", use_cache=False), False),  # what saving rewrites
    (lambda d: (d / "tokenizer.json").write_text("{}"), False),  # not part of the weights
    (nudge, True),  # one value
    (rename, True),  # one name
    (widen, True),  # another dtype is quantized to other bits
    (change_config(rope_theta=5e5), True),  # another architecture over the same weights
    (lambda d: make_base(d, seed=1), True),  # other weights
]


@pytest.mark.parametrize(("change", "differs"), CHANGES)
def test_what_changes_the_fingerprint(tmp_path: Path, change: Callable[[Path], object], differs: bool) -> None:
    directory = make_base(tmp_path / "base")
    before = read_base(directory)
    change(directory)
    os.utime(directory / "config.json", (1, 1))  # tests are quicker than clocks: say that the files changed
    after = read_base(directory)
    assert (after.fingerprint != before.fingerprint) is differs
    assert after.fingerprint.startswith("sha256:")


def test_the_shapes_of_linear_layers_and_of_nothing_else(tmp_path: Path) -> None:
    info = read_base(make_base(tmp_path / "base", layers=2, hidden=16, intermediate=24, vocab=32))
    assert info.modules["model.layers.1.mlp.down_proj"] == (16, 24)
    assert info.modules["model.layers.0.self_attn.k_proj"] == (8, 16)
    assert len(info.modules) == 14
    assert not [name for name in info.modules if "norm" in name or "embed" in name]
    assert (info.vocab_size, info.num_layers) == (32, 2)


def test_large_tensors_are_sampled_from_end_to_end(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base")
    tensors = load_tensors(directory)
    large = np.zeros((1024, 1024), np.float32)  # 2 MiB in bf16

    def fingerprint() -> str:
        write_safetensors(directory / "model.safetensors", {**tensors, "model.large.weight": large})
        os.utime(directory / "model.safetensors", ns=(1, int(large.sum() * 1000)))
        return read_base(directory).fingerprint

    seen = {fingerprint()}
    for row, column in ((0, 0), (1023, 1023)):  # the first and the last value
        large[row, column] = row + 1.0
        seen.add(fingerprint())
    large[100:300] = 7.0  # any region that is not tiny
    seen.add(fingerprint())
    assert len(seen) == 4


def test_the_result_is_remembered(tmp_path: Path) -> None:
    directory = make_base(tmp_path / "base")
    assert read_base(directory) is read_base(directory)


def broken_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def missing_shard(directory: Path) -> None:
    split(directory)
    (directory / "model-2.safetensors").unlink()


def truncated(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


# what is wrong with the base, the error, a piece of its message
BROKEN: list[tuple[Callable[[Path], object], type[Exception], str]] = [
    (lambda d: (d / "config.json").unlink(), NotFoundError, "no config.json"),  # not a model
    (lambda d: (d / "config.json").write_text("{"), InvalidInputError, "not JSON"),  # damaged
    (lambda d: (d / "model.safetensors").unlink(), NotFoundError, "no .safetensors file"),  # pickled weights, or none
    (missing_shard, NotFoundError, "lacks model-2.safetensors"),  # half a download
    (broken_index, InvalidInputError, "not a safetensors index"),  # damaged
    (truncated, InvalidInputError, "truncated"),  # half a file
    (change_config(quantization_config={}), InvalidInputError, "quantized already"),  # not the original
]


@pytest.mark.parametrize(("change", "error", "message"), BROKEN)
def test_a_broken_base_says_what_is_wrong(
    tmp_path: Path, change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    directory = make_base(tmp_path / "base")
    change(directory)
    with pytest.raises(error, match=message):
        read_base(directory)


def test_the_configured_base(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    (tmp_path / "scion.toml").write_text('[base]\nmodel = "base"\n')
    settings = load_settings(tmp_path / "scion.toml")
    assert base_info(settings).fingerprint == read_base(tmp_path / "base").fingerprint


@pytest.mark.parametrize("model", ["somebody/no-such-model", "not/a/valid/id", "/no/such/directory"])
def test_a_base_that_is_nowhere(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "scion.toml").write_text(f'[base]\nmodel = "{model}"\n')
    with pytest.raises(NotFoundError, match=model):
        base_info(load_settings(tmp_path / "scion.toml"))
