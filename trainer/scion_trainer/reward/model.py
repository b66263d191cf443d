"""The reward model in memory: an ensemble of LoRA roles on the shared base, each with a scalar head, and its scores.

Owns scoring. It knows nothing of ratings, losses or files. Shapes: B sequences, T tokens, D hidden size, K members.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from scion_trainer.roles import Roles, reward_role

TOKENS_AT_ONCE = 8192
"""Padding included: what a step of training holds on a base of that size, without its gradients."""


class Head(torch.nn.Module):
    """hidden state -> score, in fp32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # N(0, 1 / (D + 1)): Stiennon et al., 2020, arXiv 2009.01325, appendix B.1. Each member begins elsewhere.
        self.weight = torch.nn.Parameter(torch.randn(hidden_size) / (hidden_size + 1) ** 0.5)
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        """Scores (B,)."""
        return hidden_BD.float() @ self.weight + self.bias


class RewardModel:
    """Members are the roles `reward_role(0..K-1)` of `roles`; `heads[k]` is the head of member k.

    A score is a log-odds of being liked. The members' agreement is part of the result: see `penalised`.
    """

    def __init__(self, roles: Roles, heads: Sequence[Head], *, disagreement_penalty: float = 1.0) -> None:
        self.roles = roles
        self.heads = tuple(heads)
        self.disagreement_penalty = disagreement_penalty

    @property
    def num_members(self) -> int:
        return len(self.heads)

    @torch.no_grad()
    def score(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Scores (B, K) in fp32 of sequences with at least one token each; the mask is 1 at tokens, wherever they are.

        The last token's hidden state of each member goes through its head. The active role is the same afterwards.
        """
        scores = []
        for member, head in enumerate(self.heads):
            with self.roles.use(reward_role(member)):
                scores.append(member_scores(self.roles, head, tokens_BT, mask_BT))
        return torch.stack(scores, dim=1)

    def score_sequences(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Scores (len(sequences), K), taken of a limited number at once, those of like length together."""
        chunks = chunks_by_length([len(sequence) for sequence in sequences], TOKENS_AT_ONCE)
        scores_NK = torch.empty(len(sequences), self.num_members)
        for member, head in enumerate(self.heads):
            with self.roles.use(reward_role(member)), torch.no_grad():
                for chunk in chunks:
                    tokens_BT, mask_BT = padded([sequences[index] for index in chunk], self.roles.device)
                    scores_NK[chunk, member] = member_scores(self.roles, head, tokens_BT, mask_BT).cpu()
        return scores_NK

    def penalised(self, scores_BK: torch.Tensor) -> torch.Tensor:
        """One reward (B,) for each row of members' scores, with this model's penalty."""
        return penalised_score(scores_BK, self.disagreement_penalty)


def penalised_score(scores_BK: torch.Tensor, coefficient: float) -> torch.Tensor:
    """Mean less `coefficient` standard deviations over the members, (B,).

    Where members that saw different raters disagree, the answer is unlike those that were rated, and a policy would
    exploit the most optimistic of them: Coste et al., 2023, arXiv 2310.02743 (which subtracts the variance); with
    LoRA members and the standard deviation: Zhai et al., 2024, arXiv 2401.00243. One member never disagrees.
    """
    return scores_BK.mean(dim=1) - coefficient * scores_BK.std(dim=1, correction=0)


def member_scores(roles: Roles, head: Head, tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Scores (B,) by the active role and `head`."""
    tokens_BT, lengths_B = right_padded(tokens_BT, mask_BT)
    hidden_BTD = roles.hidden(tokens_BT)
    rows = torch.arange(len(tokens_BT), device=tokens_BT.device)
    scores_B: torch.Tensor = head(hidden_BTD[rows, lengths_B - 1])
    return scores_B


def right_padded(tokens_BT: torch.Tensor, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows with their tokens moved to the left, and how many each has (B,).

    With causal attention nothing that counts then looks at padding, so no mask is needed, and a sequence has one score
    however it was padded.
    """
    lengths_B = mask_BT.long().sum(dim=1)
    if not bool((lengths_B > 0).all()):
        raise ValueError("a sequence without tokens has no score: drop empty rows before scoring")
    order_BT = torch.argsort(mask_BT.long(), dim=1, descending=True, stable=True)
    return tokens_BT.gather(1, order_BT)[:, : int(lengths_B.max())], lengths_B


def chunks_by_length(lengths: Sequence[int], tokens_at_once: int) -> list[list[int]]:
    """Indices of sequences of like length, as many together as fit padded into `tokens_at_once`; at least one."""
    chunks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda each: lengths[each]):
        if chunks and (len(chunks[-1]) + 1) * lengths[index] <= tokens_at_once:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BT, mask_BT) of sequences of different lengths."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    tokens_BT = pad_sequence(rows, batch_first=True)
    mask_BT = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return tokens_BT.to(device), mask_BT.to(device)
