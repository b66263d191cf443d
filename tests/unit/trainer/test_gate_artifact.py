"""The artifact gate looks at the stored bytes again, and says which check refused them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scion_adapters.artifacts import ArtifactStore
from scion_adapters.fingerprint import BaseInfo, read_base
from scion_trainer.gates.artifact import ArtifactGate
from scion_trainer.gates.types import GateContext, Verdict
from tests.helpers.adapters import Tensors, make_adapter, make_base
from tests.helpers.gates import VERSION, gate_context


@pytest.fixture
def base(tmp_path: Path) -> BaseInfo:
    return read_base(make_base(tmp_path / "base"))


def context_of(directory: Path, base: BaseInfo, store: ArtifactStore, *, made_for: str | None = None) -> GateContext:
    artifact = store.add(directory)
    version = replace(VERSION, digest=artifact.digest, base_fingerprint=made_for or base.fingerprint)
    return gate_context(
        version=version,
        base_info=base,
        artifact=lambda: store.path(artifact.digest),
        verify_artifact=lambda: store.verify(artifact.digest),
    )


def test_a_sound_adapter_passes_with_its_size(base: BaseInfo, tmp_path: Path) -> None:
    context = context_of(make_adapter(tmp_path / "a", base), base, ArtifactStore(tmp_path / "store"))
    result = ArtifactGate().run(context)
    assert result.verdict is Verdict.PASS, result.reason
    assert result.figures["rank"] == 4
    assert result.figures["size_bytes"] > 0


def test_changed_bytes_fail(base: BaseInfo, tmp_path: Path) -> None:
    context = context_of(make_adapter(tmp_path / "a", base), base, ArtifactStore(tmp_path / "store"))
    weights = context.artifact() / "adapter_model.safetensors"
    weights.chmod(0o644)
    changed = bytearray(weights.read_bytes())
    changed[-2] ^= 1
    weights.write_bytes(bytes(changed))
    result = ArtifactGate().run(context)
    assert result.verdict is Verdict.FAIL
    assert result.reason.startswith("digest_mismatch")


def test_nan_fails_although_it_is_stored(base: BaseInfo, tmp_path: Path) -> None:
    def poison(tensors: Tensors) -> None:
        next(iter(tensors.values()))[0, 0] = np.nan

    context = context_of(make_adapter(tmp_path / "a", base, edit=poison), base, ArtifactStore(tmp_path / "store"))
    assert ArtifactGate().run(context).reason.startswith("non_finite")


def test_the_configured_limits_count_now(base: BaseInfo, tmp_path: Path) -> None:
    # Published when the server took rank 32; it takes 16 today.
    context = context_of(make_adapter(tmp_path / "a", base, rank=32), base, ArtifactStore(tmp_path / "store"))
    assert ArtifactGate().run(context).reason.startswith("rank_too_high")


def test_another_base_fails(base: BaseInfo, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base)
    context = context_of(adapter, base, ArtifactStore(tmp_path / "store"), made_for="sha256:another")
    result = ArtifactGate().run(context)
    assert result.verdict is Verdict.FAIL
    assert result.reason.startswith("wrong_base")


def test_missing_files_fail(base: BaseInfo, tmp_path: Path) -> None:
    context = context_of(make_adapter(tmp_path / "a", base), base, ArtifactStore(tmp_path / "store"))
    manifest = next((tmp_path / "store").rglob("manifest.json"))
    assert json.loads(manifest.read_text())
    manifest.unlink()
    result = ArtifactGate().run(context)
    assert result.verdict is Verdict.FAIL
    assert result.reason.startswith("missing")
