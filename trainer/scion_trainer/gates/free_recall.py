"""Free recall: the retention questions asked as users ask them; is the answer in what the model says?

The part of the retention gate that forces nothing. An answer can stay likely behind a given beginning while a version,
left to itself, begins otherwise and ends somewhere else: on the demo a DPO run lost 9 points of right answers and 0.003
nats per token. Answers are sampled, as users get them, each question several times; the words alone are looked for.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scion_adapters.errors import InvalidInputError
from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.behaviour import SAMPLED_TEMPERATURE
from scion_trainer.gates.paired import Paired, compare, judge_paired, worst_verdict
from scion_trainer.gates.types import Bound, GateContext, GateResult, RetentionItem, Verdict

NUM_SAMPLES = 2
MAX_ASKED = 200
"""Questions; of a longer set they are taken evenly."""
MIN_SAID = 8
"""Right answers of the base: with fewer, its free answers do not show what it knows."""
NUM_WORST = 5
_STOPS = " .,;:!?\"'\u3002\uff0c\u3001"
_EMPHASIS = str.maketrans("", "", "*_`")
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""How Unicode's names of their characters begin."""


@dataclass(frozen=True, slots=True)
class FreeRecall:
    """In how many of its NUM_SAMPLES answers to one item each model did not say what it should.

    `said` is the first such answer of the candidate, "" when there is none.
    """

    item: RetentionItem
    base: int
    parent: int
    candidate: int
    said: str = ""


def measure(context: GateContext, items: Sequence[RetentionItem]) -> list[FreeRecall]:
    """Items whose question and answer do not fit the server's length are left out."""
    fitting = _evenly([item for item in items if _fits(context, item)], MAX_ASKED)
    models = context.models
    names = list(dict.fromkeys((models.base, models.parent, models.candidate)))
    missed: dict[str, list[list[str]]] = {}
    for step, model in enumerate(names):
        context.progress("retention questions", step, len(names))
        answers = context.server.generate(
            model,
            [item.messages for item in fitting for _ in range(NUM_SAMPLES)],
            max_tokens=context.bounds.max_tokens,
            temperature=SAMPLED_TEMPERATURE,
            seed=context.seed,
        )
        missed[model] = [
            [answer.text for answer in answers[i * NUM_SAMPLES :][:NUM_SAMPLES] if not is_said(answer.text, item)]
            for i, item in enumerate(fitting)
        ]
    context.progress("retention questions", len(names), len(names))
    base, parent, candidate = missed[models.base], missed[models.parent], missed[models.candidate]
    return [
        FreeRecall(item, len(base[i]), len(parent[i]), len(candidate[i]), next(iter(candidate[i]), ""))
        for i, item in enumerate(fitting)
    ]


def is_said(text: str, item: RetentionItem) -> bool:
    """Whether one of the item's accepted answers occurs in `text`."""
    return any(says(text, words) for words in item.said or (item.answer,))


def says(text: str, answer: str) -> bool:
    """Whether the words of `answer` occur in `text`, one after the other and whole: 7 is not said by 17.

    Letters are compared without case, width, emphasis or the shape of apostrophes, and without the answer's last stop.
    Words that are written without spaces between them may stand anywhere.
    """
    words, said = _plain(answer).strip(_STOPS), _plain(text)
    return any(
        not _is_one_word(said[found.start() - 1 : found.start()], words[0])
        and not _is_one_word(words[-1], said[found.end() : found.end() + 1])
        for found in re.finditer(re.escape(words), said)
        if words
    )


def _is_one_word(left: str, right: str) -> bool:
    """Whether the two characters ("" beyond an end) belong to one word."""
    return all(character.isalnum() and _is_spaced(character) for character in (left, right))


def _plain(text: str) -> str:
    straight = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'")
    return " ".join(straight.translate(_EMPHASIS).split())


def _is_spaced(character: str) -> bool:
    return not unicodedata.name(character, "").startswith(_UNSPACED)


def decide(recalls: Sequence[FreeRecall], bounds: GatesSection, *, has_parent: bool = True) -> GateResult:
    """Pure. Fail: the candidate misses more answers than its parent, or than the base, by more than
    `retention_max_missed`, and chance explains it less often than `probe_alpha` (shared by the two comparisons).

    Inconclusive: chance may explain it. Unmeasurable: the base itself says fewer than MIN_SAID of the answers.
    """
    asked = NUM_SAMPLES * len(recalls)
    base = [recall.base for recall in recalls]
    said = asked - sum(base)
    if said < MIN_SAID:
        reason = f"asked freely, the base says {said} of {asked} answers, at least {MIN_SAID} are needed"
        return GateResult("retention", Verdict.UNMEASURABLE, reason, {"free_asked": float(asked)})
    candidate = [recall.candidate for recall in recalls]
    others: Mapping[str, Sequence[int]] = {"base": base}
    if has_parent:
        others = {"parent": [recall.parent for recall in recalls], **others}
    paired = {name: compare(candidate, theirs, times=NUM_SAMPLES) for name, theirs in others.items()}
    figures = {"free_asked": float(asked), "free_missed": sum(candidate) / asked}
    for name, found in paired.items():
        figures |= {
            f"free_missed_by_{name}": found.other_failed / asked,
            f"free_missed_beyond_{name}": found.increase,
            f"free_p_against_{name}": found.p_value,
        }
    verdicts = {
        name: judge_paired(found, max_increase=bounds.retention_max_missed, alpha=bounds.probe_alpha / len(others))
        for name, found in paired.items()
    }
    told = [_told(paired[name], name) for name, verdict in verdicts.items() if verdict is not Verdict.PASS]
    reason = "; ".join(told) or f"says {asked - sum(candidate)} of {asked} answers when asked freely"
    limits = tuple(Bound(f"free_missed_beyond_{name}", high=bounds.retention_max_missed) for name in others)
    worst = sorted(recalls, key=lambda recall: recall.base - recall.candidate)[:NUM_WORST]
    details = {
        "free_samples": NUM_SAMPLES,
        "free_worst": [
            {
                "question": str(recall.item.messages[-1].get("content", "")),
                "answer": recall.item.answer,
                "base": recall.base,
                "candidate": recall.candidate,
                "said": recall.said,
            }
            for recall in worst
            if recall.candidate > recall.base
        ],
    }
    return GateResult("retention", worst_verdict(list(verdicts.values())), reason, figures, limits, details)


def _told(found: Paired, name: str) -> str:
    return (
        f"asked freely, misses {found.candidate_failed} of {found.asked} answers, the {name} {found.other_failed} "
        f"(chance explains it with p = {found.p_value:.2g})"
    )


def _fits(context: GateContext, item: RetentionItem) -> bool:
    try:
        return len(context.tokens.prompt(item.messages)) + context.bounds.max_tokens <= context.max_length
    except InvalidInputError:  # the template refuses it
        return False


def _evenly(items: Sequence[RetentionItem], most: int) -> list[RetentionItem]:
    """All of them, or `most` at equal distances."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]
