"""What one run does, frozen when it is created, so that a resumed run goes on as it began.

Owns the record that stands in the database's `runs.config`. It knows nothing of torch or of where things are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
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
    newest_share: float = 0.0  # the default is that of runs begun before it was there
    kl_budget: float | None = None  # nats per token from the base; None, as in runs begun before it was there: any
    replay_share: float = 0.0  # the default is that of runs begun before it was there
    red_team_share: float = 0.0  # the default is that of runs begun before it was there
    options: Mapping[str, Any] = field(default_factory=dict)  # the recipe's own settings; None in it: see defaults.py

    def to_json(self) -> dict[str, Any]:
        """As it stands in the database."""
        return {**asdict(self), "target_modules": list(self.target_modules), "options": dict(self.options)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_json`; keys that this release does not know are ignored."""
        values = {entry.name: data[entry.name] for entry in fields(cls) if entry.name in data}
        # Runs begun before there were options have those of KTO beside the others.
        values.setdefault("options", {key: data[key] for key in ("beta", "likelihood_weight") if key in data})
        return cls(**{**values, "target_modules": tuple(values["target_modules"])})


def run_config(settings: Settings, recipe: str, *, since: float | None = None) -> RunConfig:
    """The configuration of a new run of `recipe` under `settings`. That of `auto` is replaced once it has chosen."""
    trainer = settings.trainer
    section: dict[str, Any] = getattr(trainer, recipe).model_dump(mode="json")
    return RunConfig(
        recipe=recipe,
        learning_rate=section.pop("learning_rate", None),
        epochs=section.pop("epochs", None),
        batch_size=section.pop("batch_size", 1),
        micro_batch_size=trainer.micro_batch_size,
        rank=trainer.lora.rank,
        alpha=trainer.lora.alpha,
        dropout=trainer.lora.dropout,
        target_modules=settings.server.target_modules,
        max_length=trainer.max_length,
        checkpoint_every_steps=trainer.checkpoint_every_steps,
        min_ratings=trainer.min_ratings,
        heldout_share=trainer.heldout_share,
        red_team_share=trainer.red_team_share,
        replay_share=trainer.replay_share,
        kl_budget=trainer.kl_budget,
        newest_share=trainer.newest_share,
        max_age_days=trainer.max_age_days,
        since=since,
        seed=trainer.seed,
        report_to=trainer.report_to,
        options=section,
    )
