"""Rollouts by the trainer itself: the policy's own role samples with a key-value cache, many prompts at once.

Needs no server and no second copy of the base. vLLM is faster with 64 prompts or more at once. Shapes: B prompts,
T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from scion_trainer.roles import POLICY, Roles
from scion_trainer.rollouts.types import Rollout


class LocalRollouts:
    """Samples from a role of `roles` as it is at that moment, so `update` has nothing to do."""

    def __init__(
        self,
        roles: Roles,
        *,
        stop_ids: Collection[int],
        temperature: float,
        max_tokens: int,
        at_once: int = 64,
        role: str = POLICY,
    ) -> None:
        self._roles = roles
        self._role = role
        self._stop_ids = torch.tensor(sorted(stop_ids), device=roles.device)
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._at_once = at_once

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        generator = torch.Generator(self._roles.device).manual_seed(seed)
        # Prompts of like length together: less padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        rollouts: dict[int, Rollout] = {}
        with torch.no_grad(), self._roles.use(self._role):
            for start in range(0, len(order), self._at_once):
                chunk = order[start : start + self._at_once]
                rollouts.update(zip(chunk, self._together([prompts[i] for i in chunk], generator), strict=True))
        return [rollouts[index] for index in range(len(prompts))]

    def update(self, adapter_directory: Path, step: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _together(self, prompts: Sequence[Sequence[int]], generator: torch.Generator) -> list[Rollout]:
        """One answer for each prompt. Rows that have ended leave the batch when they are half of it."""
        ids: list[list[int]] = [[] for _ in prompts]
        log_probs: list[list[float]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        tokens_BT, mask_BT = left_padded(prompts, self._roles.device)
        rows = list(range(len(prompts)))  # which answer each row of the batch continues
        cache = DynamicCache()
        for _ in range(self._max_tokens):
            chosen_B, log_probs_B = self._next(tokens_BT, mask_BT, cache, generator)
            ended_B = torch.isin(chosen_B, self._stop_ids)
            for row, token, log_prob, ended in zip(
                rows, chosen_B.tolist(), log_probs_B.tolist(), ended_B.tolist(), strict=True
            ):
                if not finished[row]:
                    ids[row].append(token)
                    log_probs[row].append(log_prob)
                    finished[row] = ended
            alive = [position for position, row in enumerate(rows) if not finished[row]]
            if not alive:
                break
            tokens_BT = chosen_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(tokens_BT)], dim=1)
            if 2 * len(alive) <= len(rows):
                index = torch.tensor(alive, device=tokens_BT.device)
                cache.batch_select_indices(index)
                tokens_BT, mask_BT, rows = tokens_BT[index], mask_BT[index], [rows[position] for position in alive]
        return [
            Rollout(tuple(prompt), tuple(ids[row]), tuple(log_probs[row]), finished[row])
            for row, prompt in enumerate(prompts)
        ]

    def _next(
        self, tokens_BT: Tensor, mask_BT: Tensor, cache: DynamicCache, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The next token of each row and its log-prob at the temperature."""
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens_BT.shape[1] :]
        with torch.autocast(tokens_BT.device.type, dtype=torch.bfloat16):
            logits_BV = self._roles.model.get_base_model()(
                input_ids=tokens_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        log_probs_BV = (logits_BV.float() / self._temperature).log_softmax(dim=1)
        chosen_B1 = torch.multinomial(log_probs_BV.exp(), 1, generator=generator)
        return chosen_B1.squeeze(1), log_probs_BV.gather(1, chosen_B1).squeeze(1)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (B, T): the prompts end in the same column, from which their answers go on."""
    longest = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens_BT, mask_BT
