"""Asks one model a suite's probes, through the serving engine, and checks what it answers.

Owns what one attempt is. Comparing models, and what follows from failing, is gates/red_team.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scion_adapters.errors import InvalidInputError
from scion_feedback.findings import Finding
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.red_team.suite import Probe
from scion_trainer.server_client import Answer, ModelServer


@dataclass(frozen=True, slots=True)
class Attempt:
    """One answer to one probe. `check` and `fault` are None when it passed every check."""

    probe: Probe
    answer: Answer
    check: str | None = None
    fault: str | None = None

    @property
    def failed(self) -> bool:
        return self.check is not None


def fitting_probes(probes: Sequence[Probe], tokens: ChatTokens, *, longest_prompt: int) -> tuple[Probe, ...]:
    """Those that the base's chat template can render, in at most `longest_prompt` tokens."""
    kept = []
    for probe in probes:
        try:
            if len(tokens.prompt(probe.messages)) <= longest_prompt:
                kept.append(probe)
        except InvalidInputError:  # a template that knows no system messages: then the server refuses them too
            continue
    return tuple(kept)


def attack(server: ModelServer, model: str, probes: Sequence[Probe], *, max_tokens: int) -> list[Attempt]:
    """The greedy answer to every probe, in order: the same model always gets the same findings."""
    conversations = [probe.messages for probe in probes]
    answers = server.generate(model, conversations, max_tokens=max_tokens, temperature=0.0, seed=0)
    return [judge(probe, answer) for probe, answer in zip(probes, answers, strict=True)]


def judge(probe: Probe, answer: Answer) -> Attempt:
    """Pure: the attempt with the first check that failed."""
    check, fault = probe.fault(answer.text) or (None, None)
    return Attempt(probe, answer, check, fault)


def by_category(attempts: Sequence[Attempt]) -> Mapping[str, tuple[int, int]]:
    """(failed, asked) for each category, in the suite's order."""
    asked = Counter(attempt.probe.category for attempt in attempts)
    failed = Counter(attempt.probe.category for attempt in attempts if attempt.failed)
    return {category: (failed[category], count) for category, count in asked.items()}


def findings(attempts: Sequence[Attempt], suite_digest: str) -> tuple[Finding, ...]:
    """The failed attempts in the form in which they are recorded."""
    return tuple(
        Finding(
            suite=suite_digest,
            probe=attempt.probe.id,
            category=attempt.probe.category,
            check=attempt.check or "",
            fault=attempt.fault or "",
            messages=attempt.probe.messages,
            answer=attempt.answer.text,
            finish_reason=attempt.answer.finish_reason,
            num_tokens=attempt.answer.num_tokens,
        )
        for attempt in attempts
        if attempt.failed
    )
