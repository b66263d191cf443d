"""How far apart two versions are, module by module, from their files alone and without ever forming a full matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scion_adapters.preflight import read_lora
from scion_adapters.safetensors_file import read_array

_Factors = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""(scale * B, A): their product is what the adapter adds to the module's weight."""


@dataclass(frozen=True, slots=True)
class ModuleDifference:
    """Frobenius norms of the two updates and of their difference.

    `relative` is the difference over the first update's norm; None where the first version does not change the module.
    """

    module: str
    norm_first: float
    norm_second: float
    norm_difference: float

    @property
    def relative(self) -> float | None:
        return self.norm_difference / self.norm_first if self.norm_first else None


def compare_adapters(first: Path | None, second: Path | None) -> list[ModuleDifference]:
    """Every module that either changes, by name. None stands for the base, which changes nothing."""
    ours, theirs = _load(first), _load(second)
    return [_compare(module, ours.get(module), theirs.get(module)) for module in sorted({*ours, *theirs})]


def total(differences: list[ModuleDifference]) -> ModuleDifference:
    """All modules as if they were one long vector."""

    def norm(values: list[float]) -> float:
        return math.sqrt(sum(value**2 for value in values))

    return ModuleDifference(
        "total",
        norm([item.norm_first for item in differences]),
        norm([item.norm_second for item in differences]),
        norm([item.norm_difference for item in differences]),
    )


def _load(directory: Path | None) -> dict[str, _Factors]:
    if directory is None:
        return {}
    config, pairs = read_lora(directory)
    weights = directory / "adapter_model.safetensors"
    return {
        module: (
            read_array(weights, pair["B"]).astype(np.float64) * config.scale_of(module),
            read_array(weights, pair["A"]).astype(np.float64),
        )
        for module, pair in pairs.items()
    }


def _compare(module: str, first: _Factors | None, second: _Factors | None) -> ModuleDifference:
    if first is None or second is None:
        norm_first, norm_second = _norm(first), _norm(second)
        return ModuleDifference(module, norm_first, norm_second, max(norm_first, norm_second))
    # B1 A1 - B2 A2 = [B1, -B2] [A1; A2]: one product of low rank again.
    joined = (np.concatenate([first[0], -second[0]], axis=1), np.concatenate([first[1], second[1]], axis=0))
    return ModuleDifference(module, _norm(first), _norm(second), _norm(joined))


def _norm(factors: _Factors | None) -> float:
    """||B A||_F from the factors' R of their QR decompositions: exact also where nearly everything cancels."""
    if factors is None:
        return 0.0
    b, a = factors
    return float(np.linalg.norm(_triangle(b) @ _triangle(a.T).T))


def _triangle(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.linalg.qr(matrix, mode="r"))
