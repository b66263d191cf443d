"""The retention gate: a fixed set of answers must stay likely, and be said. It catches forgetting and broken weights.

First the answer is forced to begin with a given prefix ("The capital of France is"), so that a change of manner does
not count as forgetting; then the same questions are asked freely (free_recall.py). A drop is log p(before) -
log p(candidate), mean per token of the answer, in nats. Only what the base knows can be forgotten: on the demo base,
random weights raised the log-prob of unknown answers from -16 to -13 and would have hidden any damage in the mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.gates import free_recall
from scion_trainer.gates.paired import worst_verdict
from scion_trainer.gates.types import Bound, GateContext, GateResult, RetentionItem, Verdict, judge_bounds
from scion_trainer.server_client import Scored

NUM_WORST = 5
KNOWN_LOGPROB = -2.0
"""Nats per token: an answer that is likelier than this under the base is known to it."""
MIN_KNOWN = 8


@dataclass(frozen=True, slots=True)
class Recall:
    """How likely one item's answer is under the three models: mean log-prob per token."""

    item: RetentionItem
    base: float
    parent: float
    candidate: float

    @property
    def is_known(self) -> bool:
        """Whether it can be forgotten at all."""
        return self.base >= KNOWN_LOGPROB


class RetentionGate:
    name = "retention"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        recalls = measure(context)
        forced = decide(recalls, max_drop=context.bounds.retention_max_drop)
        if forced.verdict is Verdict.UNMEASURABLE:
            return forced
        free = free_recall.measure(context, [recall.item for recall in recalls if recall.is_known])
        has_parent = context.models.parent != context.models.base
        return combine(forced, free_recall.decide(free, context.bounds, has_parent=has_parent))


def load_items(settings: Settings) -> tuple[RetentionItem, ...]:
    """The configured file, else the general set that ships with this package. InvalidInputError names the bad line."""
    named = settings.gates.retention_file
    if named is None:
        text = (resources.files("scion_trainer") / "data" / "retention.jsonl").read_text("utf-8")
        return parse_items(text, origin="the built-in retention set")
    path = settings.path(named)
    try:
        return parse_items(Path(path).read_text("utf-8"), origin=str(path))
    except OSError as error:
        raise InvalidInputError(
            f"gates.retention_file {path}: {error.strerror}", field="gates.retention_file"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"gates.retention_file {path} is not UTF-8: {error}; save it as UTF-8", field="gates.retention_file"
        ) from error


def parse_items(text: str, *, origin: str) -> tuple[RetentionItem, ...]:
    """One JSON object per line: {"messages": [...], "prefix": "...", "answer": "...", "said": ["...", "..."]}.

    `prefix` and `said` may be left out.
    """
    items = []
    for number, line in enumerate(text.split("\n"), start=1):  # JSON's strings may hold other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            said = row.get("said", ())
            item = RetentionItem(tuple(row["messages"]), str(row.get("prefix", "")), str(row["answer"]), tuple(said))
            usable = not isinstance(said, str) and all(isinstance(words, str) and words.strip() for words in said)
            usable = usable and bool(item.answer) and all(isinstance(message["role"], str) for message in item.messages)
        except (ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if not usable or not item.messages:
            expected = '{"messages": [{"role": "user", "content": "…"}], "prefix": "…", "answer": "…"}'
            raise InvalidInputError(f"{origin}, line {number}: expected {expected}", field="gates.retention_file")
        items.append(item)
    if not items:
        raise InvalidInputError(f"{origin} has no rows", field="gates.retention_file")
    return tuple(items)


def measure(context: GateContext) -> list[Recall]:
    """Items that do not fit the server's length, or that the chat template refuses, are left out."""
    fitting: list[tuple[RetentionItem, Scored]] = []
    for item in context.retention:
        try:
            prompt, answer = context.tokens.forced(item.messages, item.prefix, item.answer)
        except InvalidInputError:
            continue
        if len(prompt) + len(answer) < context.max_length:
            fitting.append((item, (prompt, answer)))
    pairs = [pair for _, pair in fitting]
    models = context.models
    means: dict[str, list[float]] = {}
    for step, model in enumerate(dict.fromkeys((models.base, models.parent, models.candidate))):
        context.progress("retention set", step, 3)
        means[model] = [float(np.mean(logprobs)) for logprobs in context.server.score(model, pairs)]
    context.progress("retention set", 3, 3)
    return [
        Recall(item, means[models.base][i], means[models.parent][i], means[models.candidate][i])
        for i, (item, _) in enumerate(fitting)
    ]


def decide(recalls: Sequence[Recall], *, max_drop: float) -> GateResult:
    """Pure. Fail when the mean drop against the base or against the parent is above `max_drop`.

    Both, because one step from a drifted parent can be small, and a parent better than the base can be wrecked back.
    Unmeasurable when the base knows too little of the set.
    """
    num_items = len(recalls)
    recalls = [recall for recall in recalls if recall.is_known]
    if len(recalls) < MIN_KNOWN:
        reason = (
            f"the base knows {len(recalls)} of {num_items} items, at least {MIN_KNOWN} are needed: "
            "set gates.retention_file to questions that this base can answer"
        )
        return GateResult(
            "retention", Verdict.UNMEASURABLE, reason, {"known": float(len(recalls)), "items": float(num_items)}
        )
    from_base = [recall.base - recall.candidate for recall in recalls]
    from_parent = [recall.parent - recall.candidate for recall in recalls]
    figures = {
        "drop_from_base": float(np.mean(from_base)),
        "drop_from_parent": float(np.mean(from_parent)),
        "base_logprob": float(np.mean([recall.base for recall in recalls])),
        "candidate_logprob": float(np.mean([recall.candidate for recall in recalls])),
        "known": float(len(recalls)),
        "items": float(num_items),
    }
    worst = sorted(zip(from_base, recalls, strict=True), key=lambda pair: -pair[0])[:NUM_WORST]
    bounds = (Bound("drop_from_base", high=max_drop), Bound("drop_from_parent", high=max_drop))
    return judge_bounds(
        "retention",
        figures,
        bounds,
        drops_from_base=from_base,
        worst=[
            {
                "question": str(recall.item.messages[-1].get("content", "")),
                "prefix": recall.item.prefix,
                "answer": recall.item.answer,
                "base": recall.base,
                "candidate": recall.candidate,
                "drop": drop,
            }
            for drop, recall in worst
        ],
    )


def combine(forced: GateResult, free: GateResult) -> GateResult:
    """Pure. The worse of the two; what cannot be measured freely says nothing against a version."""
    verdict = forced.verdict if free.verdict is Verdict.UNMEASURABLE else worst_verdict([forced.verdict, free.verdict])
    parts = [part.reason for part in (forced, free) if part.verdict is not Verdict.PASS]
    return GateResult(
        forced.name,
        verdict,
        "; ".join(parts) or f"{forced.reason}; {free.reason}",
        {**forced.figures, **free.figures},
        (*forced.bounds, *free.bounds),
        {**forced.details, **free.details},
    )
