"""Will a run fit? The prediction for a recipe under the settings, and what would fit where it does not.

Owns `scion train NAME --estimate` and the check before a run loads anything. The arithmetic is in memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scion_adapters.database import Database
from scion_adapters.errors import NotFoundError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.records import BASE_NUMBER, Version
from scion_adapters.registry import open_registry
from scion_adapters.settings import Settings
from scion_trainer.config import RunConfig, run_config
from scion_trainer.memory import GENERAL_REMEDY, Estimate, available_bytes, check_fits, estimate, gib, largest_fitting
from scion_trainer.recipes.batches import lower, micro_batches, step_size

SMALLEST_RANK = 4


@dataclass(frozen=True, slots=True)
class Request:
    """A run, as far as its memory goes. `rank` is the parent's where there is one: it cannot change then.

    On a device of `device_type`, "cuda" or "cpu".
    """

    base: BaseInfo
    config: RunConfig
    quantized: bool
    rank: int
    longest_tokens: int
    has_parent: bool
    device_type: str = "cpu"

    @property
    def micro_batch_size(self) -> int:
        return micro_batches(step_size(self.config), self.config.micro_batch_size, self.config.recipe)[0]

    def predict(self, micro_batch_size: int, longest_tokens: int, rank: int) -> Estimate:
        return estimate(
            self.base,
            self.config,
            quantized=self.quantized,
            rank=rank,
            micro_batch_size=micro_batch_size,
            longest_tokens=longest_tokens,
            has_parent=self.has_parent,
            device_type=self.device_type,
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """A prediction beside what there is. `remedy` is None when it fits, else what would."""

    request: Request
    predicted: Estimate
    available: int
    remedy: str | None

    def to_json(self) -> dict[str, Any]:
        """All figures in bytes."""
        return {
            "recipe": self.request.config.recipe,
            "micro_batch_size": self.request.micro_batch_size,
            "batch_size": self.request.config.batch_size,
            "rank": self.request.rank,
            "longest_tokens": self.request.longest_tokens,
            "base_bytes": self.predicted.base_bytes,
            "adapter_bytes": self.predicted.adapter_bytes,
            "activation_bytes": self.predicted.activation_bytes,
            "runtime_bytes": self.predicted.runtime_bytes,
            "total_bytes": self.predicted.total_bytes,
            "available_bytes": self.available,
            "fits": self.remedy is None,
            "remedy": self.remedy,
        }


def outlooks(settings: Settings, database: Database, adapter: str, recipes: Sequence[str]) -> list[Outlook]:
    """What runs of `adapter` by `recipes` would take now, for examples of up to trainer.max_length tokens.

    Reads the headers of the base's files, and the rank of the version that would be trained further.
    """
    base = base_info(settings)
    champion = _champion(settings, database, adapter)
    device = device_type()
    available = available_bytes(device)
    found = []
    for recipe in recipes:
        config = run_config(settings, recipe)
        request = Request(
            base,
            config,
            quantized=settings.base.quantization == "nf4",
            rank=config.rank if champion is None else champion.rank,
            longest_tokens=config.max_length,
            has_parent=champion is not None,
            device_type=device,
        )
        found.append(look(request, available))
    return found


def _champion(settings: Settings, database: Database, adapter: str) -> Version | None:
    """The version that a run would start from; None: the base."""
    if adapter not in settings.adapters:
        raise NotFoundError(
            f"adapter {adapter!r} is not configured: the configuration has {', '.join(sorted(settings.adapters))}; "
            f"add [adapters.{adapter}]"
        )
    registry = open_registry(settings, database)
    try:
        ref = registry.resolve(adapter)
    except NotFoundError:  # before its first run
        return None
    return None if ref.number == BASE_NUMBER else registry.version(ref)


def device_type() -> str:
    """Where a run would train: "cuda" with a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def look(request: Request, available: int) -> Outlook:
    """Pure: does it fit into `available` bytes, and if not, what does."""
    predicted = request.predict(request.micro_batch_size, request.longest_tokens, request.rank)
    remedy = None if predicted.total_bytes <= available else propose(request, available)
    return Outlook(request, predicted, available, remedy)


def propose(request: Request, available: int) -> str:
    """Settings that fit, in words."""
    config = request.config
    sizes = [request.micro_batch_size]
    while (size := lower(step_size(config), sizes[-1], config.recipe)) is not None:
        sizes.append(size)
    ranks = [request.rank]
    while not request.has_parent and ranks[-1] // 2 >= SMALLEST_RANK:
        ranks.append(ranks[-1] // 2)
    found = largest_fitting(request.predict, available, micro_batches=sizes, tokens=request.longest_tokens, ranks=ranks)
    if found is None:
        smallest = request.predict(sizes[-1], request.longest_tokens, ranks[-1])
        return (
            f"no micro-batch, length or rank fits (the smallest micro-batch, {sizes[-1]}, needs "
            f"{gib(smallest.total_bytes)}): stop other processes, use a smaller base or a larger machine"
        )
    wanted = (request.micro_batch_size, request.longest_tokens, request.rank)
    names = ("trainer.micro_batch_size", "trainer.max_length", "trainer.lora.rank")
    changes = [f"{name} = {now}" for name, now, before in zip(names, found, wanted, strict=True) if now != before]
    return f"it fits with {', '.join(changes)} ({gib(request.predict(*found).total_bytes)})"


def ensure_fits(request: Request, device_type: str) -> Estimate:
    """The prediction on that device. Raises OutOfMemoryError, with what would fit, when it is more than there is."""
    outlook = look(replace(request, device_type=device_type), available_bytes(device_type))
    check_fits(
        outlook.predicted,
        outlook.available,
        micro_batch_size=request.micro_batch_size,
        longest_tokens=request.longest_tokens,
        remedy=f"{outlook.remedy}; or {GENERAL_REMEDY}",
    )
    return outlook.predicted
