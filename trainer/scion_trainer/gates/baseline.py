"""The prompt baseline: did training beat showing the base the answers that users liked best?

The same held-out answers are scored under the candidate and under the base with liked training answers before the
question as examples (Brown et al., "Language Models are Few-Shot Learners", 2020). For every answer, d = mean over its
tokens of log p(candidate) - log p(prompted base); what separates liked from disliked is the held-out gate's statistic.
A version that is no better than a prompt is not wrong, so this is told, and rejects only if a margin is set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scion_adapters.errors import InvalidInputError
from scion_feedback.selection import SnapshotRow
from scion_trainer.gates.heldout import MAX_ROWS, RatedText, Shift, rated_texts, user_interval
from scion_trainer.gates.sample_size import more_units
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.server_client import Message, Scored


@dataclass(frozen=True, slots=True)
class Compared:
    """One rated answer: mean log-prob (nats) per token under the base, the prompted base and the candidate."""

    base: float
    prompted: float
    candidate: float
    liked: bool
    user: str


class BaselineGate:
    name = "baseline"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        shots = choose_shots(context.rows, context.bounds.prompt_baseline_shots)
        if not shots:
            reason = "no liked training answer to show to the base" + (
                " (gates.prompt_baseline_shots = 0)" if not context.bounds.prompt_baseline_shots else ""
            )
            return GateResult(self.name, Verdict.UNMEASURABLE, reason)
        compared = measure(context, rated_texts(context.heldout)[:MAX_ROWS], shots)
        result = decide(compared, margin=context.bounds.prompt_baseline_margin, seed=context.seed)
        examples = [{"prompt": str(shot[-2]["content"]), "answer": str(shot[-1]["content"])} for shot in shots]
        details = {**result.details, "examples": examples}
        return GateResult(result.name, result.verdict, result.reason, result.figures, result.bounds, details)


def choose_shots(rows: Sequence[SnapshotRow], num: int) -> list[tuple[Message, ...]]:
    """The `num` best liked training answers with their questions: by how many users liked them, then the newest.

    A correction is what its user would have liked. Only the last question of a conversation is shown, once.
    """
    likes: dict[tuple[str, str], set[str]] = {}
    newest: dict[tuple[str, str], float] = {}
    for row in rows:
        liked = row.correction if row.kind == "correction" else row.answer if row.liked else None
        if row.split != "train" or not liked or row.messages[-1]["role"] != "user":
            continue
        key = (row.messages[-1]["content"], liked)
        likes.setdefault(key, set()).add(row.user_hash or row.feedback_id)
        newest[key] = max(newest.get(key, row.created_at), row.created_at)
    chosen: dict[str, tuple[Message, ...]] = {}
    for question, answer in sorted(likes, key=lambda key: (-len(likes[key]), -newest[key], key)):
        if len(chosen) == num:
            break
        pair = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        chosen.setdefault(question, pair)
    return list(chosen.values())


def measure(context: GateContext, texts: Sequence[RatedText], shots: Sequence[Sequence[Message]]) -> list[Compared]:
    """Texts that do not fit with at least one example are left out, of both sides."""
    plain: list[Scored] = []
    prompted: list[Scored] = []
    kept: list[RatedText] = []
    for text in texts:
        try:
            prompt, answer = context.tokens.prompt(text.messages), context.tokens.answer(text.text)
            shown = _with_shots(context, text.messages, shots, room=context.max_length - 1 - len(answer))
        except InvalidInputError:  # the template takes no such order of roles
            continue
        if shown is not None:
            plain.append((prompt, answer))
            prompted.append((shown, answer))
            kept.append(text)
    models, means = context.models, []
    for step, (model, items) in enumerate(((models.base, plain), (models.base, prompted), (models.candidate, plain))):
        context.progress("prompt baseline", step, 3)
        means.append([float(np.mean(logprobs)) for logprobs in context.server.score(model, items)])
    return [
        Compared(base, shown, candidate, text.liked, text.user)
        for base, shown, candidate, text in zip(*means, kept, strict=True)
    ]


def _with_shots(
    context: GateContext, messages: Sequence[Message], shots: Sequence[Sequence[Message]], *, room: int
) -> list[int] | None:
    """The prompt with as many examples as fit, after any system message; None when not one does."""
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    others = [shot for shot in shots if shot[0]["content"] != messages[-1]["content"]]  # the answer is not given away
    for num in range(len(others), 0, -1):
        shown = [message for shot in others[:num] for message in shot]
        ids = context.tokens.prompt([*messages[:first], *shown, *messages[first:]])
        if len(ids) <= room:
            return ids
    return None


def decide(compared: Sequence[Compared], *, margin: float | None, seed: int = 0) -> GateResult:
    """Pure. Pass: training separates liked from disliked better than the prompt does, with its whole interval.

    Otherwise inconclusive; with a `margin`, fail when the advantage is at or below it with the whole interval.
    Unmeasurable without liked or without disliked answers.
    """
    num_liked = sum(row.liked for row in compared)
    figures = {"liked": float(num_liked), "disliked": float(len(compared) - num_liked)}
    if not 0 < num_liked < len(compared):
        reason = f"{num_liked} liked and {len(compared) - num_liked} disliked held-out answers fit: both are needed"
        return GateResult("baseline", Verdict.UNMEASURABLE, reason, figures)
    shifts = [Shift(row.candidate - row.prompted, row.liked, row.user) for row in compared]
    advantage = _separation(compared, [shift.d for shift in shifts])
    low, high = user_interval(shifts, seed=seed)
    trained = _separation(compared, [row.candidate - row.base for row in compared])
    prompted = _separation(compared, [row.prompted - row.base for row in compared])
    figures |= {
        "advantage": advantage,
        "advantage_low": low,
        "advantage_high": high,
        "trained_separation": trained,
        "prompted_separation": prompted,
    }
    needed = margin or 0.0
    beat = "beat" if low > needed else "did not beat" if high <= needed else "may or may not have beaten"
    reason = (
        f"training {beat} prompting: {advantage:+.3g} nats per token (95%: {low:.3g} to {high:.3g}); "
        f"against the plain base, training separates by {trained:+.3g} and the examples by {prompted:+.3g}"
    )
    num_users = len({row.user for row in compared})
    if low > needed:
        verdict = Verdict.PASS
    elif margin is not None and high <= margin:
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.INCONCLUSIVE
        if more := more_units(advantage, needed, low, high, num_users) if high > needed else None:
            reason += f"; about {more} more users needed"
    bounds = () if margin is None else (Bound("advantage", low=margin),)
    details = {"separations": {"examples": prompted, "training": trained}}
    return GateResult("baseline", verdict, reason, figures, bounds, details)


def _separation(compared: Sequence[Compared], values: Sequence[float]) -> float:
    liked = [value for row, value in zip(compared, values, strict=True) if row.liked]
    disliked = [value for row, value in zip(compared, values, strict=True) if not row.liked]
    return float(np.mean(liked) - np.mean(disliked))
