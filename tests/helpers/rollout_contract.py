"""What every `RolloutSource` promises, as one list of checks: over fakes and the trainer in unit tests, vLLM in e2e."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scion_trainer.rollouts.types import Rollout, RolloutSource


@dataclass(frozen=True)
class SourceSubject:
    """A source that was given a policy, and what it was told about sampling."""

    source: RolloutSource
    prompts: Sequence[Sequence[int]]  # at least eight, different ones
    max_tokens: int
    stop_ids: frozenset[int]

    def sample(self, seed: int = 0) -> list[Rollout]:
        return self.source.sample(self.prompts, seed=seed)


def rollouts_come_in_the_order_of_their_prompts(subject: SourceSubject) -> None:
    assert [rollout.prompt_ids for rollout in subject.sample()] == [tuple(prompt) for prompt in subject.prompts]


def every_token_has_one_log_prob(subject: SourceSubject) -> None:
    for rollout in subject.sample():
        assert 1 <= len(rollout.response_ids) == len(rollout.log_probs) <= subject.max_tokens
        assert all(math.isfinite(value) and value <= 0 for value in rollout.log_probs)


def an_answer_ends_with_its_stop_token_or_at_the_limit(subject: SourceSubject) -> None:
    for rollout in [*subject.sample(1), *subject.sample(2)]:
        assert rollout.finished == (rollout.response_ids[-1] in subject.stop_ids)
        assert rollout.finished or len(rollout.response_ids) == subject.max_tokens
        assert not subject.stop_ids & set(rollout.response_ids[:-1])


def a_seed_repeats_its_answers_and_another_does_not(subject: SourceSubject) -> None:
    first, again, other = subject.sample(3), subject.sample(3), subject.sample(4)
    same = sum(a.response_ids == b.response_ids for a, b in zip(first, again, strict=True))
    assert same >= len(first) / 2, "bf16 sums may differ with the batch, so that a few answers part"
    assert [rollout.response_ids for rollout in first] != [rollout.response_ids for rollout in other]


def each_prompt_has_a_seed_of_its_own(subject: SourceSubject) -> None:
    prompts = [subject.prompts[0]] * 8
    answers = {rollout.response_ids for rollout in subject.source.sample(prompts, seed=5)}
    assert len(answers) > 1


def nothing_to_sample_is_nothing_sampled(subject: SourceSubject) -> None:
    assert subject.source.sample([], seed=0) == []


SOURCE_CONTRACT: tuple[Callable[[SourceSubject], None], ...] = (
    rollouts_come_in_the_order_of_their_prompts,
    every_token_has_one_log_prob,
    an_answer_ends_with_its_stop_token_or_at_the_limit,
    a_seed_repeats_its_answers_and_another_does_not,
    each_prompt_has_a_seed_of_its_own,
    nothing_to_sample_is_nothing_sampled,
)
