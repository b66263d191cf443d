"""Distillation: a teacher answers prompts whose answers users disliked, and the adapter learns what passes a filter.

On sequences as in Kim and Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv 1606.07947. The filter is the
reward model, where one has passed its gate: the teacher's answer must score above the one that was disliked. Otherwise
only simple checks are made. What came from a teacher is named in the version's lineage, apart from what users said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_feedback.lineage import REWARD_RUN_METRIC
from scion_trainer.config import RunConfig
from scion_trainer.recipes.recipe import Example, RunContext
from scion_trainer.recipes.sft import SftRecipe

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow
    from scion_trainer.teacher import TaughtAnswer

ANSWERS_FILE = "teacher.jsonl"
FILTERED_FILE = "distilled.json"


class DistillRecipe:
    name = "distill"
    makes_version = True
    needs_reward_model = False

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """Every prompt with a disliked answer, once, the newest first; the example's text is what was disliked."""
        found: dict[str, Example] = {}
        for row in sorted(rows, key=lambda row: row.created_at, reverse=True):
            if row.liked is False and row.answer:
                found.setdefault(
                    json.dumps(row.messages, sort_keys=True), Example(tuple(row.messages), row.answer, False)
                )
        return list(found.values())

    def check(self, examples: list[Example], config: RunConfig) -> None:
        if not config.options["teacher_url"] or not config.options["teacher_model"]:
            raise InvalidInputError(
                "distill needs a teacher: set trainer.distill.teacher_url and trainer.distill.teacher_model; users' "
                "prompts are sent there",
                field="trainer.distill.teacher_url",
            )
        if len(examples) < config.options["min_answers"]:
            raise InvalidInputError(
                f"{len(examples)} prompts with a disliked answer; trainer.distill.min_answers asks for "
                f"{config.options['min_answers']}: wait for more, or lower that setting",
                field="trainer.distill.min_answers",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from scion_trainer.examples import prepare
        from scion_trainer.teacher import ask_all, open_teacher

        options = context.config.options
        disliked = context.examples[: options["max_prompts"]]
        context.progress.say(f"asking {options['teacher_model']} about {len(disliked)} prompts")
        with open_teacher(options) as teacher:
            answers = ask_all(
                teacher,
                [example.prompt for example in disliked],
                context.directory / ANSWERS_FILE,
                concurrency=options["concurrency"],
                seed=context.config.seed,
                stop_requested=context.stop_requested,
            )
        filtered = context.directory / FILTERED_FILE
        if not filtered.is_file():  # a run that goes on keeps to its choice, whatever reward model has passed since
            filtered.write_text(json.dumps(choose(context, disliked, answers)), encoding="utf-8")
        chosen = json.loads(filtered.read_text(encoding="utf-8"))
        taught = [Example(disliked[index].prompt, answers[index].text.strip()) for index in chosen["kept"]]
        prepared = prepare(taught, context.tokenizer, max_length=context.config.max_length)
        dropped = Counter(chosen["left_out"]) + Counter(prepared.dropped)
        if len(prepared.examples) < options["min_answers"]:
            raise InvalidInputError(
                f"{len(prepared.examples)} of the teacher's {len(answers)} answers passed the filter (left out: "
                f"{', '.join(f'{n} {reason}' for reason, n in sorted(dropped.items()))}); "
                f"trainer.distill.min_answers asks for {options['min_answers']}: use another teacher, or lower it",
                field="trainer.distill.min_answers",
            )
        measured = SftRecipe().train(replace(context, examples=prepared.examples))
        lineage = {
            "teacher": options["teacher_model"],
            "teacher_url": options["teacher_url"],
            "teacher_models": sorted({answer.model for answer in answers}),
            "asked": len(answers),
            "taught": len(prepared.examples),
            "left_out": dict(sorted(dropped.items())),
            "filter": chosen["filter"],
        }
        by = {REWARD_RUN_METRIC: run} if (run := chosen.get(REWARD_RUN_METRIC)) else {}
        return {**measured, **by, "distilled": lineage, "lineage": {"distilled": lineage}}


def choose(context: RunContext, disliked: Sequence[Example], answers: Sequence[TaughtAnswer]) -> dict[str, Any]:
    """Which answers to learn from (`kept`: indices), what was left out by reason, and by which filter."""
    kept, dropped = usable(disliked, answers)
    if context.reward_model is not None:
        better = better_than_disliked(context, disliked, answers, kept)
        dropped["not_better"] = len(kept) - len(better)
        kept = better
    return {
        "kept": kept,
        "left_out": {reason: number for reason, number in dropped.items() if number},
        "filter": "checks" if context.reward_model is None else f"reward model {context.reward_model.parent.name}",
        REWARD_RUN_METRIC: None if context.reward_model is None else context.reward_model.parent.name,
    }


def usable(disliked: Sequence[Example], answers: Sequence[TaughtAnswer]) -> tuple[list[int], Counter[str]]:
    """The indices of answers worth learning, and what was left out, by reason."""
    from scion_trainer.gates.behaviour import is_looping

    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, (example, answer) in enumerate(zip(disliked, answers, strict=True)):
        text = answer.text.strip()
        if not text:
            dropped["empty"] += 1
        elif not answer.finished:
            dropped["cut_off"] += 1
        elif text == example.completion.strip():
            dropped["same_as_disliked"] += 1
        elif is_looping(text):
            dropped["looping"] += 1
        else:
            kept.append(index)
    return kept, dropped


def better_than_disliked(
    context: RunContext, disliked: Sequence[Example], answers: Sequence[TaughtAnswer], indices: Sequence[int]
) -> list[int]:
    """Those of `indices` whose answer the reward model scores above what was disliked."""
    from scion_trainer.chat_tokens import ChatTokens
    from scion_trainer.reward.files import load_reward_model
    from scion_trainer.roles import Roles, reward_role

    assert context.reward_model is not None, "asked for only where there is one"
    assert context.base is not None, "a reward model is bound to its base"
    if not indices:
        return []
    tokens, roles = ChatTokens(context.tokenizer), Roles(context.model)
    model = load_reward_model(roles, context.reward_model, base_fingerprint=context.base.fingerprint)
    sequences = [
        [*tokens.prompt(disliked[index].prompt), *tokens.answer(text)]
        for index in indices
        for text in (answers[index].text.strip(), disliked[index].completion)
    ]
    scores = model.penalised(model.score_sequences(sequences)).tolist()
    for member in range(model.num_members):
        roles.remove(reward_role(member))  # sft goes on with the adapter alone
    return [index for index, ours, theirs in zip(indices, scores[::2], scores[1::2], strict=True) if ours > theirs]
