"""The forgetting gate: general text, and what users liked of earlier versions, stay as likely as under the champion.

The retention gate asks for known answers; this one looks at whole texts. A run that learns today's ratings can lose
what an earlier one learned while every gate that looks at today's ratings is pleased. Drops are log p(champion) -
log p(candidate), mean per token, in nats; perplexity is exp of minus the mean log-prob.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_feedback.selection import SnapshotRow
from scion_trainer.gates.heldout import MIN_USERS, rated_texts
from scion_trainer.gates.paired import worst_verdict
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.server_client import Scored

KNOWN_LOGPROB = -4.0
"""Nats per token (perplexity 55): a text that is less likely than this under the base is in no language of its."""
MIN_TEXTS = 4
MIN_ANSWERS = 20
"""Below it, the mean of an earlier version's answers is too noisy to reject by."""
MAX_ANSWERS = 1000
CONTEXT_TOKENS = 8
"""The beginning of a general text, which is given and not scored."""
Z = 1.96


@dataclass(frozen=True, slots=True)
class Likelihood:
    """One text under both models: mean log-prob (nats) per token. `user` is who liked it, "" for nobody."""

    champion: float
    candidate: float
    user: str = ""

    @property
    def drop(self) -> float:
        return self.champion - self.candidate


class ForgettingGate:
    name = "forgetting"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        texts = general_items(context)
        known = [
            item
            for item, logprob in zip(texts, _means(context, context.models.base, texts), strict=True)
            if logprob >= KNOWN_LOGPROB
        ]
        share = max(MIN_ANSWERS, MAX_ANSWERS // max(1, len(context.earlier)))
        earlier = {}
        for holdout in context.earlier:
            liked = liked_items(context, holdout.rows)[:share]
            found = _measure(context, [item for item, _ in liked])
            earlier[holdout.number] = [replace(text, user=user) for text, (_, user) in zip(found, liked, strict=True)]
        return decide(
            _measure(context, known), earlier, num_general=len(texts), max_drop=context.bounds.forgetting_max_drop
        )


def load_texts(settings: Settings) -> tuple[str, ...]:
    """The paragraphs of the configured file, else of the general text that ships with this package."""
    named = settings.gates.general_file
    if named is None:
        text = (resources.files("scion_trainer") / "data" / "general.txt").read_text("utf-8")
    else:
        try:
            text = settings.path(named).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"gates.general_file {named}: {error}", field="gates.general_file") from error
    paragraphs = tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())
    if not paragraphs:
        raise InvalidInputError(f"gates.general_file {named} has no text", field="gates.general_file")
    return paragraphs


def general_items(context: GateContext) -> list[Scored]:
    """Each paragraph as (its beginning, the rest), cut at the server's length."""
    items: list[Scored] = []
    for text in load_texts(context.settings):
        ids = context.tokens.plain(text)[: context.max_length - 1]
        if len(ids) > 2 * CONTEXT_TOKENS:
            items.append((ids[:CONTEXT_TOKENS], ids[CONTEXT_TOKENS:]))
    return items


def liked_items(context: GateContext, rows: Sequence[SnapshotRow]) -> list[tuple[Scored, str]]:
    """The answers among `rows` that were liked, as tokens, and by whom; those that do not fit are left out."""
    items: list[tuple[Scored, str]] = []
    for text in (text for text in rated_texts(rows) if text.liked):
        try:
            item = context.tokens.prompt(text.messages), context.tokens.answer(text.text)
        except InvalidInputError:
            continue
        if len(item[0]) + len(item[1]) < context.max_length:
            items.append((item, text.user))
    return items


def _measure(context: GateContext, items: Sequence[Scored]) -> list[Likelihood]:
    context.progress("texts that must not be forgotten", 0, 2)
    champion = _means(context, context.models.parent, items)
    context.progress("texts that must not be forgotten", 1, 2)
    candidate = _means(context, context.models.candidate, items)
    return [Likelihood(*pair) for pair in zip(champion, candidate, strict=True)]


def _means(context: GateContext, model: str, items: Sequence[Scored]) -> list[float]:
    return [float(np.mean(logprobs)) for logprobs in context.server.score(model, items)]


def decide(
    known: Sequence[Likelihood],
    earlier: Mapping[int, Sequence[Likelihood]],
    *,
    num_general: int,
    max_drop: float,
) -> GateResult:
    """Pure. `known` are those of the `num_general` general texts that the base knows.

    Fail: the mean drop of these, or of one earlier version's answers, is above `max_drop`; of answers, which people
    happened to rate, also above what chance gives (95%, users as units). Inconclusive: above `max_drop`, and chance or
    a handful of answers may be why. Unmeasurable when there is too little of both.
    """
    figures: dict[str, float] = {"general_known": float(len(known)), "general_texts": float(num_general)}
    groups: dict[str, Sequence[Likelihood]] = {}
    if len(known) >= MIN_TEXTS:
        groups["general"] = known
        figures["general_perplexity"] = _perplexity([text.candidate for text in known])
        figures["general_champion_perplexity"] = _perplexity([text.champion for text in known])
    groups |= {f"version_{number}": texts for number, texts in sorted(earlier.items()) if texts}
    bounds, verdicts, reasons = [], [], []
    for name, texts in groups.items():
        drops = _drops_by_user(texts)
        drop, noise = float(np.mean(drops)), _noise(drops)
        figures[f"{name}_drop"] = drop
        is_general = name == "general"
        if not is_general:
            figures |= {f"{name}_answers": float(len(texts)), f"{name}_users": float(len(drops))}
        is_enough = is_general or (len(texts) >= MIN_ANSWERS and len(drops) >= MIN_USERS)
        bound = Bound(f"{name}_drop", high=max_drop)
        if is_enough:
            bounds.append(bound)
        if not bound.holds(drop):
            is_clear = is_enough and (is_general or not drop <= noise)
            verdicts.append(Verdict.FAIL if is_clear else Verdict.INCONCLUSIVE)
            told = "" if is_general else f" over {len(texts)} answers of {len(drops)} users; chance gives {noise:.3g}"
            reasons.append(f"{name}_drop {drop:.3g} (allowed: {bound.describe()}){told}")
    if not bounds:
        reason = (
            f"the base knows {len(known)} of {num_general} general texts and no earlier version has {MIN_ANSWERS} "
            f"liked held-out answers of {MIN_USERS} users: set gates.general_file to text that this base can read"
        )
        return GateResult("forgetting", Verdict.UNMEASURABLE, reason, figures)
    details = {"drops": {name: [text.drop for text in texts] for name, texts in groups.items()}}
    told = "; ".join(reasons) or "all figures within bounds"
    return GateResult("forgetting", worst_verdict(verdicts), told, figures, tuple(bounds), details)


def _drops_by_user(texts: Sequence[Likelihood]) -> list[float]:
    """The mean drop of each user's texts; a text of nobody's stands for itself."""
    by_user: dict[str, list[float]] = {}
    for index, text in enumerate(texts):
        by_user.setdefault(text.user or f"text {index}", []).append(text.drop)
    return [float(np.mean(drops)) for drops in by_user.values()]


def _noise(drops: Sequence[float]) -> float:
    """By how much the mean of so many scatters, 95%; infinite for one."""
    return Z * float(np.std(drops, ddof=1)) / math.sqrt(len(drops)) if len(drops) > 1 else math.inf


def _perplexity(logprobs: Sequence[float]) -> float:
    return math.exp(-float(np.mean(logprobs)))
