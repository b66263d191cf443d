"""What one run does, frozen when it is created, so that a resumed run goes on as it began.

Owns the record that stands in the database's `runs.config`. It knows nothing of torch or of where things are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from scion_adapters.settings import Settings


@dataclass(frozen=True, slots=True)
class RunConfig:
    """All that decides the result of a run, apart from base, parent and ratings."""

    recipe: str
    learning_rate: float | None  # None: see defaults.py
    epochs: float | None  # None: see defaults.py
    batch_size: int  # examples per optimizer step
    micro_batch_size: int | None  # examples in memory at once; None = batch_size
    beta: float | None  # KTO only; None: see defaults.py
    rank: int
    alpha: int
    dropout: float
    target_modules: tuple[str, ...]
    max_length: int
    checkpoint_every_steps: int
    min_ratings: int
    heldout_share: float
    max_age_days: float | None
    since: float | None  # Unix seconds; None = all ratings
    seed: int
    report_to: str
    likelihood_weight: float = 0.0  # KTO only; the default is that of runs begun before it was there

    def to_json(self) -> dict[str, Any]:
        """As it stands in the database."""
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_json`; keys that this release does not know are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in data.items() if key in known}
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})


def run_config(settings: Settings, recipe: str, *, since: float | None = None) -> RunConfig:
    """The configuration of a new run of `recipe` under `settings`."""
    trainer = settings.trainer
    section = trainer.sft if recipe == "sft" else trainer.kto
    return RunConfig(
        recipe=recipe,
        learning_rate=section.learning_rate,
        epochs=section.epochs,
        batch_size=section.batch_size,
        micro_batch_size=trainer.micro_batch_size,
        beta=trainer.kto.beta,
        rank=trainer.lora.rank,
        alpha=trainer.lora.alpha,
        dropout=trainer.lora.dropout,
        target_modules=settings.server.target_modules,
        max_length=trainer.max_length,
        checkpoint_every_steps=trainer.checkpoint_every_steps,
        min_ratings=trainer.min_ratings,
        heldout_share=trainer.heldout_share,
        max_age_days=trainer.max_age_days,
        since=since,
        seed=trainer.seed,
        report_to=trainer.report_to,
        likelihood_weight=trainer.kto.likelihood_weight,
    )
