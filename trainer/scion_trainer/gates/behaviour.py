"""The behaviour gate: what the candidate says, through the serving engine, on the quantized base.

It answers the held-out prompts greedily and sampled, next to the base and the parent. The adapter must have an effect
at all (vLLM serves an adapter that matches no module without a word), must not be silent, loop or never end more often
than the base, must keep its length near its parent's, and what it says must still be language to the base, whatever
manner it chose. What the answers are worth is not judged here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from scion_adapters.errors import InvalidInputError
from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict, judge_bounds
from scion_trainer.server_client import Answer, Message, Scored

SAMPLED_TEMPERATURE = 1.0
STRANGE_LOGPROB = -6.0
"""Nats: a token that the base gives less than 0.25% is strange to it. Choosing one of twelve manners costs 2.5 once."""
MIN_EFFECT = 0.005
"""Nats per token. Rounding alone (an adapter of zeros, other kernels) stays below 0.003; a trained adapter gives 0.1
and more.
"""
NUM_SAMPLES = 8
NUM_GREEDY_PROMPTS = 16
_LOOP_RULES = ((str.split, 4, 16, 0.5), (list, 8, 48, 0.6))
"""(how to split, n, least number of units, share of n-grams that occurred before): words, and characters for text
without spaces.
"""

Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Conduct:
    """How one model answered."""

    empty_share: float
    looping_share: float
    unfinished_share: float
    mean_tokens: float


@dataclass(frozen=True, slots=True)
class BehaviourMeasurement:
    """`effect` is the mean |log p(candidate) - log p(base)| per token of the base's greedy answers.

    `strange_share` is the share of tokens in the candidate's sampled answers that the base finds strange, and
    `base_strange_share` that in the base's own. `kl_from_base`, shown and not judged because it is large for short
    answers, is the mean over the candidate's sampled answers of log p(candidate) - log p(base) per token: an unbiased
    estimate (k1 of Schulman, "Approximating KL Divergence", 2020) of KL(candidate || base), each answer by its own
    length.
    """

    base: Conduct
    parent: Conduct
    candidate: Conduct
    changed_share: float
    effect: float
    kl_from_base: float
    strange_share: float
    base_strange_share: float
    num_prompts: int


class BehaviourGate:
    name = "behaviour"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        prompts = choose_prompts(context)
        if not prompts:
            return GateResult(self.name, Verdict.UNMEASURABLE, "no prompt fits the server's max_model_len")
        answers = {model: [*greedy, *sampled] for model, (greedy, sampled) in ask(context, prompts).items()}
        models = context.models
        base, parent, candidate = answers[models.base], answers[models.parent], answers[models.candidate]
        n = len(prompts[:NUM_GREEDY_PROMPTS])
        measurement = BehaviourMeasurement(
            base=conduct(base),
            parent=conduct(parent),
            candidate=conduct(candidate),
            changed_share=sum(a.text != b.text for a, b in zip(candidate[:n], base[:n], strict=True)) / n,
            effect=_effect(context, prompts[:n], base[:n]),
            **_strangeness(context, prompts, base[n:], candidate[n:]),
            num_prompts=len(prompts),
        )
        result = decide(measurement, context.bounds)
        samples = [
            {
                "prompt": str(prompt[-1].get("content", "")),
                "base": base[i].text,
                "parent": parent[i].text,
                "candidate": candidate[i].text,
            }
            for i, prompt in enumerate(prompts[: min(n, NUM_SAMPLES)])
        ]
        lengths = {name: [a.num_tokens for a in said] for name, said in (("parent", parent), ("candidate", candidate))}
        return GateResult(
            result.name,
            result.verdict,
            result.reason,
            result.figures,
            result.bounds,
            {"samples": samples, "lengths": lengths},
        )


def choose_prompts(context: GateContext) -> list[Prompt]:
    """Distinct prompts: the held-out ones first, then other rated ones, then the retention set's."""
    limit = context.max_length - context.bounds.max_tokens
    rated = [*context.heldout, *(row for row in context.rows if row.split != "heldout")]
    chosen: dict[str, Prompt] = {}
    for messages in chain((tuple(row.messages) for row in rated), (item.messages for item in context.retention)):
        key = repr([(m.get("role"), m.get("content")) for m in messages])
        if key in chosen:
            continue
        try:
            if len(context.tokens.prompt(messages)) > limit:
                continue
        except InvalidInputError:  # the template refuses it: then the server does too
            continue
        chosen[key] = messages
        if len(chosen) == context.bounds.max_prompts:
            break
    return list(chosen.values())


def ask(context: GateContext, prompts: Sequence[Prompt]) -> Mapping[str, tuple[list[Answer], list[Answer]]]:
    """For each model the greedy answers to the first prompts, and a sampled one to every prompt."""
    models = dict.fromkeys((context.models.base, context.models.parent, context.models.candidate))
    answers: dict[str, tuple[list[Answer], list[Answer]]] = {}
    for step, model in enumerate(models):
        context.progress("answers", step, len(models))
        greedy, sampled = (
            context.server.generate(
                model, asked, max_tokens=context.bounds.max_tokens, temperature=temperature, seed=context.seed
            )
            for asked, temperature in ((prompts[:NUM_GREEDY_PROMPTS], 0.0), (prompts, SAMPLED_TEMPERATURE))
        )
        answers[model] = (greedy, sampled)
    context.progress("answers", len(models), len(models))
    return answers


def _effect(context: GateContext, prompts: Sequence[Prompt], base_answers: Sequence[Answer]) -> float:
    items = _scored(context, prompts, base_answers)
    with_adapter = np.concatenate(context.server.score(context.models.candidate, items))
    without = np.concatenate(context.server.score(context.models.base, items))
    return float(np.mean(np.abs(with_adapter - without)))


def _strangeness(
    context: GateContext, prompts: Sequence[Prompt], base_answers: Sequence[Answer], answers: Sequence[Answer]
) -> dict[str, float]:
    """How the base finds what was sampled from itself and from the candidate."""
    items = _scored(context, prompts, answers)
    under_base = context.server.score(context.models.base, items)
    under_candidate = context.server.score(context.models.candidate, items)
    own = context.server.score(context.models.base, _scored(context, prompts, base_answers))
    gains = [np.mean(np.subtract(a, b)) for a, b in zip(under_candidate, under_base, strict=True)]
    return {
        "kl_from_base": float(np.mean(gains)),
        "strange_share": float(np.mean(np.concatenate(under_base) < STRANGE_LOGPROB)),
        "base_strange_share": float(np.mean(np.concatenate(own) < STRANGE_LOGPROB)),
    }


def _scored(context: GateContext, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> list[Scored]:
    """Prompts and answers as tokens. An answer that was cut off has no end to score."""
    items: list[Scored] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before, tokens = context.tokens.prompt(prompt), context.tokens.answer(answer.text)
        cut_off = answer.finish_reason == "length" and len(tokens) > 1
        items.append((before, (tokens[:-1] if cut_off else tokens)[: context.max_length - 1 - len(before)]))
    return items


def conduct(answers: Sequence[Answer]) -> Conduct:
    """The shares of at least one answer."""
    n = len(answers)
    return Conduct(
        empty_share=sum(not answer.text.strip() for answer in answers) / n,
        looping_share=sum(is_looping(answer.text) for answer in answers) / n,
        unfinished_share=sum(answer.finish_reason == "length" for answer in answers) / n,
        mean_tokens=sum(answer.num_tokens for answer in answers) / n,
    )


def is_looping(text: str) -> bool:
    """Whether most of a text has been said before in it: 1 - distinct n-grams / n-grams.

    The measure is seq-rep-n of Welleck et al., "Neural Text Generation with Unlikelihood Training" (2020). Short texts
    never loop: a repeated word may be meant.
    """
    for split, n, least, share in _LOOP_RULES:
        units = split(text)
        if len(units) < least:
            continue
        grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
        if 1 - len(set(grams)) / len(grams) > share:
            return True
    return False


def decide(measured: BehaviourMeasurement, bounds: GatesSection) -> GateResult:
    """Pure. Shares are allowed what the base does itself plus the bound, so that small errors cannot add up over
    versions.
    """
    base, parent, candidate = measured.base, measured.parent, measured.candidate
    ratio = candidate.mean_tokens / parent.mean_tokens if parent.mean_tokens else float("nan")
    figures = {
        "effect": measured.effect,
        "kl_from_base": measured.kl_from_base,
        "strange_share": measured.strange_share,
        "changed_share": measured.changed_share,
        "empty_share": candidate.empty_share,
        "looping_share": candidate.looping_share,
        "unfinished_share": candidate.unfinished_share,
        "length_ratio": ratio,
        "mean_tokens": candidate.mean_tokens,
        "parent_mean_tokens": parent.mean_tokens,
        "prompts": float(measured.num_prompts),
    }
    low, high = bounds.length_ratio
    limits = (
        Bound("effect", low=MIN_EFFECT),
        Bound("empty_share", high=base.empty_share + bounds.max_empty_share),
        Bound("looping_share", high=base.looping_share + bounds.max_looping_share),
        Bound("unfinished_share", high=base.unfinished_share + bounds.max_unfinished_share),
        Bound("length_ratio", low=low, high=high),
        Bound("strange_share", high=measured.base_strange_share + bounds.max_strange_share),
    )
    return judge_bounds("behaviour", figures, limits)
