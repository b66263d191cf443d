"""The distance between two versions, compared with the full matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scion_adapters.difference import compare_adapters, total
from scion_adapters.safetensors_file import read_array, read_header
from tests.helpers.adapters import make_adapter, make_base

MODULE = "model.layers.0.mlp.down_proj"


def full_update(directory: Path, scale: float) -> np.ndarray:
    weights = directory / "adapter_model.safetensors"
    header = read_header(weights)
    a, b = (read_array(weights, header[f"base_model.model.{MODULE}.lora_{half}.weight"]) for half in "AB")
    return scale * b.astype(np.float64) @ a.astype(np.float64)


def test_norms_are_those_of_the_full_matrices(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    first = make_adapter(tmp_path / "first", base, rank=4, alpha=8)
    second = make_adapter(tmp_path / "second", base, rank=9, alpha=18, seed=1, config={"use_rslora": True})
    (found,) = [item for item in compare_adapters(first, second) if item.module == MODULE]

    ours, theirs = full_update(first, 8 / 4), full_update(second, 18 / 3)
    assert found.norm_first == pytest.approx(np.linalg.norm(ours))
    assert found.norm_second == pytest.approx(np.linalg.norm(theirs))
    assert found.norm_difference == pytest.approx(np.linalg.norm(ours - theirs))
    assert found.relative == pytest.approx(np.linalg.norm(ours - theirs) / np.linalg.norm(ours))


def test_a_version_does_not_differ_from_itself(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"))
    assert total(compare_adapters(adapter, adapter)).relative == pytest.approx(0, abs=1e-12)


def test_the_base_changes_nothing(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base"), targets=("q_proj",))
    (first, second) = compare_adapters(None, adapter)
    assert (first.norm_first, first.relative) == (0.0, None)
    assert first.norm_difference == first.norm_second > 0
    assert total([first, second]).norm_second == pytest.approx(np.hypot(first.norm_second, second.norm_second))


def test_modules_that_only_one_changes_count_whole(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layers=1)
    first = make_adapter(tmp_path / "first", base, targets=("q_proj",))
    second = make_adapter(tmp_path / "second", base, targets=("v_proj",))
    found = {item.module.rpartition(".")[2]: item for item in compare_adapters(first, second)}
    assert found["q_proj"].relative == 1.0
    assert found["v_proj"].relative is None
