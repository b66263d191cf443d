"""How far a trained adapter has moved from the pinned base, in nats per token, and the budget that it may not exceed.

A pull towards the parent alone lets drift compound over versions: the base is the fixed point. Owns the measurement and
the refusal. It knows nothing of recipes. Shapes: T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError, RejectedError
from scion_trainer.chat_tokens import ChatTokens

if TYPE_CHECKING:
    from torch import Tensor

    from scion_feedback.selection import SnapshotRow

MAX_PROMPTS = 32
MAX_TOKENS = 64
"""Of each sampled answer: what feedback changes shows in its beginning, and sampling is what takes the time."""
AT_ONCE = 8
"""Answers sampled together where nothing is known of the memory: each has a key-value cache of its prompt's length."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(candidate || base) per token, and what it was measured on."""

    per_token: float  # nats
    num_prompts: int
    num_tokens: int

    def to_metrics(self) -> dict[str, float | int]:
        """The figures as a run's metrics keep them; the KL gate reads the first."""
        return {
            "kl_to_base": round(self.per_token, 6),
            "kl_to_base_prompts": self.num_prompts,
            "kl_to_base_tokens": self.num_tokens,
        }


def heldout_prompts(rows: Sequence[SnapshotRow], tokens: ChatTokens, *, max_length: int) -> list[list[int]]:
    """Up to MAX_PROMPTS different prompts of `rows` as token ids, in their order; those too long are left out."""
    found: dict[tuple[int, ...], None] = {}
    for row in rows:
        if len(found) == MAX_PROMPTS:
            break
        try:
            prompt = tokens.prompt(row.messages)
        except InvalidInputError:
            continue
        if len(prompt) + MAX_TOKENS <= max_length or len(prompt) <= max_length // 2:
            found[tuple(prompt)] = None
    return [list(prompt) for prompt in found]


def measure(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Collection[int],
    seed: int = 0,
    at_once: int = AT_ONCE,
) -> Divergence | None:
    """KL(candidate || base) per token; None without prompts. `model`: a PeftModel with the trained adapter.

    `at_once` prompts of like length are sampled together: it bounds the memory, and it is part of what decides the
    sample, like `seed`. What has been trained with so many examples at once has room for it.

    Answers of up to MAX_TOKENS tokens are sampled from the candidate at temperature 1. At every token of them the KL
    is summed exactly over the vocabulary, and the mean is over tokens: the Rao-Blackwellised estimator of Amini,
    Vieira and Cotterell, 2025, arXiv 2504.10637, which is never negative and scatters less than log-ratios of the
    sampled tokens do. The base is the same quantized model with its adapters off.
    """
    import torch

    from scion_trainer.roles import BASE, POLICY, Roles
    from scion_trainer.rollouts.local import LocalRollouts

    if not prompts:
        return None
    roles = Roles(model)
    source = LocalRollouts(roles, stop_ids=stop_ids, temperature=1.0, max_tokens=MAX_TOKENS, at_once=at_once)
    total, num_tokens = 0.0, 0
    for rollout in source.sample(prompts, seed=seed):
        tokens_1T = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]], device=roles.device)
        both_TV = []
        for role in (POLICY, BASE):
            with torch.no_grad(), roles.use(role) as answering, torch.autocast(roles.device.type, torch.bfloat16):
                keep = len(rollout.response_ids) + 1
                logits_TV = answering.get_base_model()(input_ids=tokens_1T, logits_to_keep=keep).logits[0, :-1]
            both_TV.append(logits_TV.float())
        total += float(token_kl(*both_TV).sum())
        num_tokens += len(rollout.response_ids)
    return Divergence(total / num_tokens, len(prompts), num_tokens)


def token_kl(logits_TV: Tensor, base_logits_TV: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(base_logits)) at each position: (T,) nats."""
    log_p_TV, log_q_TV = logits_TV.log_softmax(-1), base_logits_TV.log_softmax(-1)
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


def check_budget(found: Divergence | None, budget: float | None) -> None:
    """Raises RejectedError when the candidate is further from the base than `budget` nats per token (None: any)."""
    if found is None or budget is None or found.per_token <= budget:
        return
    raise RejectedError(
        f"the candidate is {found.per_token:.3f} nats per token from the base (on {found.num_tokens} tokens of its "
        f"own), and trainer.kl_budget allows {budget:g}: nothing was published. Lower the recipe's learning_rate or "
        "epochs, or raise its beta; if the parent is far already, start afresh from the base with all ratings "
        "(`scion rollback NAME --to 0`); or raise trainer.kl_budget",
        reason="kl_budget",
    )
