"""The reward model as a judge of pairs: the answer that it scores higher is the better one.

Owns the loading of base and members, once something is to be compared. Its verdict does not depend on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scion_adapters.database import Database
from scion_adapters.settings import Settings
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.judges import TIE, Judge, Pair, endpoint_judge
from scion_trainer.reward.store import newest_reward_model


class RewardJudge:
    """`directory` holds a reward model that was trained on the base with that fingerprint."""

    def __init__(self, settings: Settings, directory: Path, *, base_fingerprint: str, tokens: ChatTokens) -> None:
        self.name = f"the reward model of {directory.parent.name}"
        self._settings, self._directory, self._tokens = settings, directory, tokens
        self._fingerprint = base_fingerprint
        self._model: Any = None

    def prefer(self, pairs: Sequence[Pair]) -> list[float | None]:
        model = self._load()
        sequences = [
            [*self._tokens.prompt(pair.messages), *self._tokens.answer(text)]
            for pair in pairs
            for text in (pair.first, pair.second)
        ]
        rewards = model.penalised(model.score_sequences(sequences)).tolist()
        return [
            TIE if first == second else float(first > second)
            for first, second in zip(rewards[::2], rewards[1::2], strict=True)
        ]

    def close(self) -> None:
        self._model = None

    def _load(self) -> Any:
        if self._model is None:
            from scion_trainer.base import load_base
            from scion_trainer.config import run_config
            from scion_trainer.lora import start_adapter
            from scion_trainer.reward.files import load_reward_model
            from scion_trainer.roles import Roles

            model, _ = start_adapter(load_base(self._settings), run_config(self._settings, "kto"), None)
            self._model = load_reward_model(Roles(model), self._directory, base_fingerprint=self._fingerprint)
        return self._model


def open_judge(
    settings: Settings, database: Database, adapter: str, *, base_fingerprint: str, tokens: ChatTokens
) -> Judge | None:
    """The configured endpoint, else the adapter's newest reward model that passed its gate, else None."""
    if (endpoint := endpoint_judge(settings)) is not None:
        return endpoint
    directory = newest_reward_model(database, adapter, base_fingerprint)
    if directory is None:
        return None
    return RewardJudge(settings, directory, base_fingerprint=base_fingerprint, tokens=tokens)
