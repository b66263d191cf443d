"""What the trainer itself thinks of held-out answers when a run ends: the half of the parity check that needs torch.

Owns `parity.json` in the run's directory: log-probs by feedback id, and none of the text. The other half, and the
verdict, are the parity gate's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scion_adapters.errors import InvalidInputError
from scion_feedback.selection import SnapshotRow
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.server_client import Scored

PARITY_FILE = "parity.json"
MAX_ANSWERS = 32


@dataclass(frozen=True, slots=True)
class Recorded:
    """The trainer's log-probs (nats) of one answer's tokens, end of turn included. `key` names the rated answer."""

    key: str
    logprobs: tuple[float, ...]


def comparable(
    rows: Sequence[SnapshotRow], tokens: ChatTokens, *, max_length: int, limit: int | None = None
) -> dict[str, Scored]:
    """Tokens of prompt and answer by feedback id, liked answers first: they are what the model says.

    A correction stands for the answer that it replaces. Rows that the template refuses or that are too long are left
    out.
    """
    chosen: dict[str, Scored] = {}
    for row in sorted(rows, key=lambda row: row.liked is False and row.correction is None):
        if len(chosen) == limit:
            break
        try:
            item = tokens.prompt(row.messages), tokens.answer(row.correction or row.answer)
        except InvalidInputError:
            continue
        if len(item[0]) + len(item[1]) < max_length:
            chosen[row.feedback_id] = item
    return chosen


def record_parity(
    model: Any, tokens: ChatTokens, rows: Sequence[SnapshotRow], directory: Path, *, max_length: int
) -> None:
    """Write what `model` (a PeftModel with the trained role active) thinks of up to MAX_ANSWERS held-out answers."""
    items = comparable(rows, tokens, max_length=max_length, limit=MAX_ANSWERS)
    scores = score(model, list(items.values()))
    document = {key: [round(value, 6) for value in logprobs] for key, logprobs in zip(items, scores, strict=True)}
    (directory / PARITY_FILE).write_text(json.dumps(document) + "\n", encoding="utf-8")


def read_parity(directory: Path) -> list[Recorded] | None:
    """What a run wrote; None when it wrote nothing that can be read here."""
    try:
        document: Mapping[str, Sequence[float]] = json.loads((directory / PARITY_FILE).read_text("utf-8"))
        return [Recorded(key, tuple(float(value) for value in values)) for key, values in document.items()]
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def score(model: Any, items: Sequence[Scored]) -> list[list[float]]:
    """Log-probs (nats) of every answer token, one item at a time, as training computes them: in bf16, in eval mode."""
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    scores = []
    try:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16):
            for prompt, answer in items:
                ids_BT = torch.tensor([[*prompt, *answer]], device=device)
                logits_TV = model(input_ids=ids_BT).logits[0, len(prompt) - 1 : -1].float()
                answer_T1 = ids_BT[0, len(prompt) :].unsqueeze(1)
                scores.append(logits_TV.log_softmax(-1).gather(1, answer_T1).squeeze(1).tolist())
    finally:
        model.train(was_training)
    return scores
