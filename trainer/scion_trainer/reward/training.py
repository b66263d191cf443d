"""Training the ensemble: one LoRA and head after the other on the shared base, with checkpoints and progress.

One linear story. Owns the optimizer and what a checkpoint holds; losses are in losses.py, batches in items.py.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scion_adapters.errors import ScionError
from scion_trainer.checkpoints import CHECKPOINTS, mark_complete
from scion_trainer.recipes.batches import micro_batches
from scion_trainer.recipes.recipe import RunContext
from scion_trainer.reward.items import Item, batches, draw_raters
from scion_trainer.reward.losses import batch_loss
from scion_trainer.reward.model import Head, RewardModel, member_scores, padded
from scion_trainer.roles import POLICY, Roles, reward_role
from scion_trainer.stopping import RunInterruptedError

WARMUP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
BIAS_RATE = 0.05
"""Adam's rate for the raters' biases: in the hundred steps of a small run they can move by a few log-odds."""
CENTRING_SEQUENCES = 256
_CHECKPOINTS_KEPT = 2
_STATE_FILE = "state.pt"


@dataclass(frozen=True, slots=True)
class Member:
    """One member under training: its head, and its estimate of the raters' biases."""

    role: str
    head: Head
    biases: torch.nn.Parameter  # one per rater (R,)

    def state(self, roles: Roles) -> dict[str, Any]:
        return {"lora": roles.state(self.role), "head": self.head.state_dict(), "biases": self.biases.detach()}

    def load(self, roles: Roles, state: Mapping[str, Any]) -> None:
        roles.load_state(self.role, state["lora"])
        self.head.load_state_dict(state["head"])
        with torch.no_grad():
            self.biases.copy_(state["biases"])


@dataclass(frozen=True, slots=True)
class Trained:
    """The reward model, and the mean over members of what is known of each rater of the training set.

    `unseen[k]` are the raters that member k's draw left out.
    """

    model: RewardModel
    biases: Mapping[str, float]
    unseen: tuple[frozenset[str], ...]
    num_steps: int


def train_ensemble(context: RunContext, roles: Roles, items: Sequence[Item]) -> Trained:
    """Train all members on `items`, or what a checkpoint leaves of it. Raises RunInterruptedError when stopped.

    Each member begins at the parent, with a head of its own and, where there are several, on its own draw of raters.
    """
    config, options = context.config, context.config.options
    assert config.learning_rate is not None, "defaults.resolve was not called"
    assert config.epochs is not None, "defaults.resolve was not called"
    num_members = int(options["members"])
    raters = {rater: index for index, rater in enumerate(sorted({r for item in items for r in item.raters}))}
    draws = [
        draw_raters(items, seed=f"{config.seed}/{k}/raters") if num_members > 1 else list(items)
        for k in range(num_members)
    ]
    plans = [
        batches(draw, batch_size=config.batch_size, epochs=config.epochs, seed=f"{config.seed}/{k}/order")
        for k, draw in enumerate(draws)
    ]
    ends = [sum(len(plan) for plan in plans[: k + 1]) for k in range(num_members)]
    saved = _load_checkpoint(context.resume_from)
    done_steps = int(saved["step"]) if saved else 0
    if context.gradient_checkpointing:
        roles.checkpoint_activations()
    context.progress.begin(total_steps=ends[-1], done_steps=done_steps)
    members: list[Member] = []
    for k, plan in enumerate(plans):
        member = _begin(roles, k, num_raters=len(raters), seed=config.seed)
        members.append(member)
        first_step = ends[k] - len(plan)
        if saved and k < len(saved["members"]):
            member.load(roles, saved["members"][k])
        if done_steps >= ends[k]:
            continue
        rates = (config.learning_rate, BIAS_RATE)
        optimizer = torch.optim.Adam(
            [{"params": [*roles.parameters(member.role), *member.head.parameters()]}, {"params": [member.biases]}]
        )
        if saved and done_steps > first_step:
            optimizer.load_state_dict(saved["optimizer"])
        with roles.use(member.role, train=True):
            for step in range(max(first_step, done_steps), ends[k]):
                torch.manual_seed(config.seed * 1_000_003 + step)  # dropout is the same in a resumed run
                factor = rate_factor(step - first_step, len(plan))
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = factor * rate
                loss, norm = _step(context, roles, member, optimizer, plan[step - first_step], raters, len(items))
                values = {"loss": loss, "grad_norm": norm, "learning_rate": factor * config.learning_rate, "member": k}
                context.progress.step(step + 1, values)
                is_last = step + 1 == ends[-1]
                stopped = context.stop_requested() and not is_last
                if stopped or step + 1 == ends[k] or (step + 1) % config.checkpoint_every_steps == 0:
                    _save_checkpoint(context, roles, members, optimizer, step + 1)
                if stopped:
                    raise RunInterruptedError(
                        f"stopped at step {step + 1} of {ends[-1]}; the work up to there is in a checkpoint"
                    )
    model = RewardModel(
        roles, [member.head for member in members], disagreement_penalty=float(options["disagreement_penalty"])
    )
    centre(model, [sequence for item in items for sequence in item.sequences][:CENTRING_SEQUENCES])
    mean_R = torch.stack([member.biases.detach() for member in members]).mean(dim=0)
    unseen = tuple(frozenset(raters) - {rater for item in draw for rater in item.raters} for draw in draws)
    return Trained(model, {rater: float(mean_R[index]) for rater, index in raters.items()}, unseen, ends[-1])


def rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to zero: the schedule of the other recipes."""
    warmup = max(1, math.ceil(WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def centre(model: RewardModel, sequences: Sequence[Sequence[int]]) -> None:
    """Shift each head so that its mean score of `sequences` is zero.

    Pairs say nothing of a member's level, and draws of raters differ in theirs; that would pass for disagreement.
    """
    means_K = model.score_sequences(sequences).mean(dim=0)
    with torch.no_grad():
        for head, mean in zip(model.heads, means_K, strict=True):
            head.bias -= mean.to(head.bias.device)


def _begin(roles: Roles, member: int, *, num_raters: int, seed: int) -> Member:
    torch.manual_seed(seed * 1_000_003 + 7919 * (member + 1))
    role = reward_role(member)
    if roles.changes_nothing(POLICY):
        roles.add(role)  # with its own random A
    else:
        roles.add_copy(role, POLICY)
    hidden_size = int(roles.model.get_base_model().get_input_embeddings().weight.shape[1])
    head = Head(hidden_size).to(roles.device)
    return Member(role, head, torch.nn.Parameter(torch.zeros(num_raters, device=roles.device)))


def _step(
    context: RunContext,
    roles: Roles,
    member: Member,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Item],
    raters: Mapping[str, int],
    num_examples: int,
) -> tuple[float, float]:
    """One optimizer step, in as many parts as memory asks for; returns (loss, gradient norm)."""
    micro, _ = micro_batches(context.config.batch_size, context.config.micro_batch_size, context.config.recipe)
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for start in range(0, len(batch), micro):
        part = batch[start : start + micro]
        loss = _loss(context, roles, member, part, raters, num_examples) * (len(part) / len(batch))
        loss.backward()
        total += float(loss.detach())
    if not math.isfinite(total):
        raise ScionError(
            f"training diverged: the loss is {total}; nothing was published; lower trainer.reward.learning_rate "
            "and run again"
        )
    norm = torch.nn.utils.clip_grad_norm_([*roles.parameters(member.role), *member.head.parameters()], MAX_GRAD_NORM)
    optimizer.step()
    return total, float(norm)


def _loss(
    context: RunContext,
    roles: Roles,
    member: Member,
    part: Sequence[Item],
    raters: Mapping[str, int],
    num_examples: int,
) -> torch.Tensor:
    thumbs = [item for item in part if not item.is_pair]
    pairs = [item for item in part if item.is_pair]
    sequences = [
        *(item.sequences[0] for item in thumbs),
        *(item.sequences[0] for item in pairs),
        *(item.sequences[1] for item in pairs),
    ]
    scores = member_scores(roles, member.head, *padded(sequences, roles.device))
    scores_N, chosen_P, rejected_P = scores.split([len(thumbs), len(pairs), len(pairs)])
    return batch_loss(
        chosen_P=chosen_P,
        rejected_P=rejected_P,
        scores_N=scores_N,
        liked_N=torch.tensor([bool(item.liked) for item in thumbs], device=roles.device),
        raters_N=torch.tensor([raters[item.rater] for item in thumbs], dtype=torch.long, device=roles.device),
        biases_R=member.biases,
        prior_std=float(context.config.options["rater_bias_std"]),
        num_examples=num_examples,
    )


def _save_checkpoint(
    context: RunContext, roles: Roles, members: Sequence[Member], optimizer: torch.optim.Optimizer, step: int
) -> None:
    checkpoints = context.directory / CHECKPOINTS
    directory = checkpoints / f"checkpoint-{step}"
    if directory.exists():  # cut off by a kill, or the same step again
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    torch.save(
        {
            "step": step,
            "members": [member.state(roles) for member in members],
            "optimizer": optimizer.state_dict(),
        },
        directory / _STATE_FILE,
    )
    mark_complete(directory)
    older = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in older[:-_CHECKPOINTS_KEPT]:
        shutil.rmtree(path)


def _load_checkpoint(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    found: dict[str, Any] = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
    return found
