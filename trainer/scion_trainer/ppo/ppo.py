"""PPO as one story: rollouts, scores, log-probs and values, advantages, passes of minibatches, and again.

Owns the algorithm. The formulas are in maths.py, what is known of a batch of answers in experience.py; where prompts,
rewards and rollouts come from is given. Reference: Ouyang et al., "Training language models to follow instructions with
human feedback", 2022, arXiv 2203.02155. Shapes: B answers, R positions of answers.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scion_adapters.errors import ScionError
from scion_trainer.lora import export_adapter
from scion_trainer.ppo import maths
from scion_trainer.ppo.batch import Batch, OutputLayer
from scion_trainer.ppo.experience import Assessor, Experience, RewardFunction
from scion_trainer.ppo.options import PpoOptions
from scion_trainer.ppo.state import State, load, save, seed_for
from scion_trainer.progress import Progress
from scion_trainer.reward.model import Head
from scion_trainer.roles import POLICY, REFERENCE, VALUE, Roles, reward_role
from scion_trainer.rollouts.types import RolloutSource
from scion_trainer.stopping import RunInterruptedError

RATIO_TOLERANCE = 0.02
"""Mean |log ratio| before a batch's first update: only rounding of bf16 in batches of another shape may be there."""
ADAM_EPS = 1e-5  # Huang et al., "The 37 Implementation Details of Proximal Policy Optimization", 2022, detail 3


@dataclass(frozen=True, slots=True)
class Job:
    """All that PPO needs. `roles` has the policy at its start; with `value_from` its value begins as that head's."""

    roles: Roles
    prompts: Sequence[Sequence[int]]
    source: RolloutSource
    reward: RewardFunction
    options: PpoOptions
    directory: Path
    progress: Progress
    resume_from: Path | None = None
    value_from: Head | None = None  # the head of reward_role(0)
    stop_requested: Callable[[], bool] = lambda: False


def train(job: Job) -> dict[str, Any]:
    """Train the policy of `job.roles` in place; returns what happened.

    Raises RunInterruptedError when asked to stop (a checkpoint is there), ScionError when training diverged or when
    the sampler's policy is not the trainer's.
    """
    return _Run(job).all_steps()


class _Run:
    def __init__(self, job: Job) -> None:
        self.job, self.options, self.roles = job, job.options, job.roles
        self.roles.without_dropout()
        self.output = OutputLayer(self.roles, temperature=self.options.temperature)
        with self.roles.use(POLICY):
            self.output.check(job.prompts[0])
        self.roles.add_frozen_start(REFERENCE)
        self.head = self._add_value()
        self.assessor = Assessor(self.roles, self.output, self.head, job.reward, self.options)
        rate = self.options.learning_rate
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            POLICY: torch.optim.Adam(self.roles.parameters(POLICY), lr=rate, eps=ADAM_EPS),
            VALUE: torch.optim.Adam(self._value_parameters(), lr=rate * self.options.value_rate, eps=ADAM_EPS),
        }
        self.state = State(self.options.kl_coefficient)
        self.num_published = 0

    def all_steps(self) -> dict[str, Any]:
        job, options = self.job, self.options
        if job.resume_from is not None:
            self.state = load(job.resume_from, self.roles, self.head, self.optimizers)
        self._publish_policy()
        if job.resume_from is None:
            self._meet_the_reward()
        job.progress.begin(total_steps=options.steps, done_steps=self.state.step)
        note = None
        while self.state.step < options.steps:
            if job.stop_requested():
                save(job.directory, self.state, self.roles, self.head, self.optimizers)
                raise RunInterruptedError(
                    f"stopped at step {self.state.step} of {options.steps}; the work up to there is in a checkpoint"
                )
            experience = self._answers(self.state.step)
            if note := self._out_of_budget(experience):
                break
            figures = self._learn(experience)
            self.state.moments = self.state.moments.with_scores(experience.scores_B)
            self.state.step += 1
            self._publish_policy()
            if self.state.step % options.checkpoint_every_steps == 0 or self.state.step == options.steps:
                save(job.directory, self.state, self.roles, self.head, self.optimizers)
            job.progress.step(self.state.step, {**experience.figures, **figures})
        last = self._answers(options.steps)  # nobody has measured the last update yet
        if note is None:
            note = self._out_of_budget(last)
        if note is not None:
            last = self._answers(options.steps)
            job.progress.say(note)
        return {
            "steps": self.state.step,
            "final": {name: round(value, 6) for name, value in last.figures.items()},
            **({"stopped_by": "kl_budget", "note": note} if note else {}),
        }

    # --- rollouts and what is known of them

    def _answers(self, step: int) -> Experience:
        prompts = prompts_of_step(self.job.prompts, step, self.options.batch_size, self.options.seed)
        rollouts = self.job.source.sample(prompts, seed=seed_for(self.options.seed, step, "sample"))
        return self.assessor.experience(rollouts, self.state)

    def _meet_the_reward(self) -> None:
        """The reward's mean and deviation under the reference, which the policy still is.

        A reward model's head as the value's is then put in these units; a value that begins at 0 stays there.
        """
        count = min(self.options.reference_answers, len(self.job.prompts))
        prompts = prompts_of_step(self.job.prompts, 0, count, self.options.seed)
        rollouts = self.job.source.sample(prompts, seed=seed_for(self.options.seed, 0, "reference"))
        self.state.moments = self.state.moments.with_scores(self.assessor.scores(rollouts))
        if self.job.value_from is None:
            return
        with torch.no_grad():
            self.head.weight /= self.state.moments.deviation
            self.head.bias.sub_(self.state.moments.mean).div_(self.state.moments.deviation)

    # --- learning

    def _learn(self, experience: Experience) -> dict[str, float]:
        """The passes over a batch of answers; the KL controller after them. Returns figures of the updates."""
        options, state = self.options, self.state
        for name, optimizer in self.optimizers.items():
            peak = options.learning_rate * (options.value_rate if name == VALUE else 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * (1 - state.step / options.steps)
        totals: Counter[str] = Counter()
        updates = 0
        for number in range(options.passes):
            generator = torch.Generator().manual_seed(seed_for(options.seed, state.step, f"pass {number}"))
            order = torch.randperm(len(experience.batch), generator=generator).to(self.roles.device)
            for minibatch in order.chunk(min(options.minibatches, len(order))):
                num_tokens = int(experience.mask_BR[minibatch].sum())
                if num_tokens == 0:
                    continue  # all its answers were rejected
                totals.update(self._update(experience, minibatch, num_tokens, first=updates == 0))
                updates += 1
        state.kl_coefficient = maths.next_kl_coefficient(
            state.kl_coefficient,
            experience.kl_per_answer,
            target=options.kl_target,
            num_answers=len(experience.batch),
            horizon=options.kl_horizon,
        )
        return {name: total / max(1, updates) for name, total in totals.items()}

    def _update(self, experience: Experience, minibatch: Tensor, num_tokens: int, *, first: bool) -> dict[str, float]:
        """One step of each optimizer. A role's forward and backward stay together: see roles.py."""
        options = self.options
        policy_loss = value_loss = clipped = log_ratio = 0.0
        with self.roles.use(POLICY, train=True):
            for index in self.assessor.parts(minibatch, experience.batch):
                part, cut = experience.batch.rows(index), _cut(index, experience.batch)
                found = maths.policy_loss(
                    self.output.log_probs(part),
                    cut(experience.old_BR),
                    cut(experience.advantages_BR),
                    cut(experience.mask_BR),
                    num_tokens=num_tokens,
                    clip=options.clip,
                    dual_clip=options.dual_clip,
                    weights_BR=cut(experience.weights_BR),
                )
                found.loss.backward()
                policy_loss += float(found.loss.detach())
                clipped += float(found.num_clipped) / num_tokens
                log_ratio += float(found.sum_abs_log_ratio) / num_tokens
        if first and log_ratio > RATIO_TOLERANCE:
            raise ScionError(
                f"before the first update the policy's ratio to itself must be 1; mean |log ratio| is {log_ratio:.3g}, "
                f"at most {RATIO_TOLERANCE} is rounding: the forward is not deterministic, or a role is mixed up"
            )
        with self.roles.use(VALUE, train=True):
            for index in self.assessor.parts(minibatch, experience.batch):
                part, cut = experience.batch.rows(index), _cut(index, experience.batch)
                loss = maths.value_loss(
                    self.assessor.values(part),
                    cut(experience.values_BR),
                    cut(experience.returns_BR),
                    cut(experience.mask_BR),
                    num_tokens=num_tokens,
                    clip=options.value_clip,
                )
                loss.backward()
                value_loss += float(loss.detach())
        policy_norm = self._step(POLICY, self.roles.parameters(POLICY))
        value_norm = self._step(VALUE, self._value_parameters())
        if not all(map(math.isfinite, (policy_loss, value_loss, policy_norm, value_norm))):
            raise ScionError(
                f"training diverged: the losses are {policy_loss} and {value_loss} at step {self.state.step}; nothing "
                "was published; lower trainer.ppo.learning_rate and run again"
            )
        return {
            "loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": clipped,
            "log_ratio": log_ratio,
            "grad_norm": policy_norm,
            "value_grad_norm": value_norm,
        }

    def _step(self, name: str, parameters: list[torch.nn.Parameter]) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm))
        if math.isfinite(norm):
            self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return norm

    # --- the value role, the budget, and who else must know of a new policy

    def _add_value(self) -> Head:
        """The value begins as the reward model's view of unfinished answers; without one it begins at 0."""
        torch.manual_seed(self.options.seed)  # for the fresh LoRA
        head = Head(self.roles.model.config.get_text_config().hidden_size).to(self.roles.device)
        if self.job.value_from is None:
            self.roles.add(VALUE)
            torch.nn.init.zeros_(head.weight)
        else:
            self.roles.add_copy(VALUE, reward_role(0))
            head.load_state_dict(self.job.value_from.state_dict())
        return head

    def _value_parameters(self) -> list[torch.nn.Parameter]:
        return [*self.roles.parameters(VALUE), *self.head.parameters()]

    def _out_of_budget(self, experience: Experience) -> str | None:
        """Go back to the newest policy within the budget if this one left it, and say so."""
        budget = self.options.kl_budget
        if budget is None or experience.kl_to_base <= budget:
            self.state.within = self.roles.state(POLICY)
            return None
        if self.state.within is None:
            raise ScionError(
                f"the policy starts {experience.kl_to_base:.3g} nats per token from the pinned base, and "
                f"trainer.kl_budget allows {budget:g}: start afresh from the base with all ratings "
                "(`scion rollback NAME --to 0`), or raise trainer.kl_budget"
            )
        self.roles.load_state(POLICY, self.state.within)
        self._publish_policy()
        return (
            f"stopped at step {self.state.step}: the policy was {experience.kl_to_base:.3g} nats per token from the "
            f"pinned base, and trainer.kl_budget allows {budget:g}; kept the last one within"
        )

    def _publish_policy(self) -> None:
        """Let the source of rollouts sample from the policy as it is now."""
        directory = self.job.directory / "policy"
        export_adapter(self.roles.model, directory, base_model="", lineage={})
        self.num_published += 1
        self.job.source.update(directory, self.num_published)
        shutil.rmtree(directory)


def prompts_of_step(prompts: Sequence[Sequence[int]], step: int, count: int, seed: int) -> list[Sequence[int]]:
    """The prompts of a step: each pass over all of them is in an order of its own, and no prompt comes twice in it."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * count, (step + 1) * count):
        number, place = divmod(position, len(prompts))
        if number not in orders:
            generator = torch.Generator().manual_seed(seed_for(seed, number, "prompts"))
            orders[number] = torch.randperm(len(prompts), generator=generator).tolist()
        chosen.append(prompts[orders[number][place]])
    return chosen


def _cut(index: Tensor, batch: Batch) -> Callable[[Tensor], Tensor]:
    """Takes from a (B, R) tensor what `batch.rows(index)` takes."""
    width = int(batch.mask_BR[index].sum(dim=1).max())
    return lambda whole_BR: whole_BR[index, :width]
