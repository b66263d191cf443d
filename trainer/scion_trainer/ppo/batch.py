"""Answers as tensors, and what each role says of their tokens: log-probs, entropy, values.

Only response positions are taken to the vocabulary, a chunk at a time, and what the backward will need of a chunk is
taken at once, so that no logits are ever kept nor computed again.
Shapes: B answers, T tokens (prompt and answer, padded on the right), R positions of answers, N tokens of answers,
D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from scion_adapters.errors import ScionError
from scion_trainer.ppo.options import LOGITS_CHUNK_BYTES
from scion_trainer.roles import Roles
from scion_trainer.rollouts.types import Rollout

CHECKED_TOKENS = 64
"""Of a prompt: more say nothing more, and all logits of a long one at once would be more than training ever holds."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Answers side by side. A row's answer begins at column 0 of the (B, R) tensors."""

    tokens_BT: Tensor
    prompt_lengths_B: Tensor
    answers_BR: Tensor
    mask_BR: Tensor  # True on the answer's tokens, EOS included

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def rows(self, index: Tensor) -> Batch:
        """Some of the answers, without the columns that only the others need."""
        mask_BR = self.mask_BR[index]
        width = int(mask_BR.sum(dim=1).max())
        lengths_B = self.prompt_lengths_B[index]
        longest = int((lengths_B + mask_BR.sum(dim=1)).max())
        return replace(
            self,
            tokens_BT=self.tokens_BT[index, :longest],
            prompt_lengths_B=lengths_B,
            answers_BR=self.answers_BR[index, :width],
            mask_BR=mask_BR[:, :width],
        )


def collate(rollouts: Sequence[Rollout], device: torch.device) -> Batch:
    """The rollouts as one batch on `device`. Raises ValueError for a rollout without a prompt or an answer."""
    if any(not rollout.prompt_ids or not rollout.response_ids for rollout in rollouts):
        raise ValueError("a rollout needs at least one token of prompt and one of answer")
    return Batch(
        tokens_BT=_padded([rollout.prompt_ids + rollout.response_ids for rollout in rollouts], torch.long).to(device),
        prompt_lengths_B=torch.tensor([len(rollout.prompt_ids) for rollout in rollouts], device=device),
        answers_BR=_padded([rollout.response_ids for rollout in rollouts], torch.long).to(device),
        mask_BR=_padded([[True] * len(rollout.response_ids) for rollout in rollouts], torch.bool).to(device),
    )


def behaviour_log_probs(rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """(B, R) what the sampler said, 0 where there is no token."""
    return _padded([rollout.log_probs for rollout in rollouts], torch.float32).to(device)


def response_hidden(roles: Roles, batch: Batch) -> Tensor:
    """(N, D) contiguous: of the active role, at the positions that predict the answers' tokens, row by row.

    A slice `hidden[:, a:b]` would not be contiguous, and a bf16 product with it is 6 times slower on a CPU.
    """
    rows_N, columns_N = batch.mask_BR.nonzero(as_tuple=True)
    hidden_BTD = roles.hidden(batch.tokens_BT)
    return hidden_BTD[rows_N, batch.prompt_lengths_B[rows_N] - 1 + columns_N]


def spread(values_N: Tensor, mask_BR: Tensor) -> Tensor:
    """(B, R) with the values at the masked positions, 0 elsewhere. Gradients pass."""
    return torch.zeros(mask_BR.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(mask_BR, values_N)


class OutputLayer:
    """From hidden states to logits as the model itself computes them, divided by the temperature of the rollouts."""

    def __init__(self, roles: Roles, *, temperature: float) -> None:
        model = roles.model.get_base_model()
        config = model.config.get_text_config()
        self._roles = roles
        self._layer = model.get_output_embeddings()
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        self._scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self._temperature = temperature
        self._chunk = max(16, LOGITS_CHUNK_BYTES // (4 * int(config.vocab_size)))

    def log_probs(self, batch: Batch) -> Tensor:
        """(B, R) of the answers' tokens under the active role, with gradients where they are enabled."""
        hidden_ND = response_hidden(self._roles, batch)
        parts = [self._chosen(hidden, tokens) for hidden, tokens in self._chunks(hidden_ND, batch)]
        return spread(torch.cat(parts), batch.mask_BR)

    @torch.no_grad()
    def log_probs_and_entropy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `log_probs`, and the entropy of each token's distribution in nats, both (B, R)."""
        hidden_ND = response_hidden(self._roles, batch)
        parts = [_chosen_and_entropy(self._logits(hidden), tokens) for hidden, tokens in self._chunks(hidden_ND, batch)]
        chosen, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return spread(chosen, batch.mask_BR), spread(entropy, batch.mask_BR)

    @torch.no_grad()
    def check(self, tokens_T: Sequence[int]) -> None:
        """Raises ScionError when the model's own logits are others: it then treats them in a way unknown here.

        The prompt's last CHECKED_TOKENS are a prompt of their own in this.
        """
        if any(parameter.requires_grad for parameter in self._layer.parameters()):
            raise ScionError("the output layer's weights are trainable; PPO trains LoRA on the layers below it only")
        tokens_BT = torch.tensor([list(tokens_T)[-CHECKED_TOKENS:]], device=self._roles.device)
        with torch.autocast(tokens_BT.device.type, dtype=torch.bfloat16):
            own = self._roles.model(input_ids=tokens_BT, use_cache=False).logits[0].float() / self._temperature
        ours = self._logits(self._roles.hidden(tokens_BT)[0])
        if (difference := float((own - ours).abs().max())) > 0.05 * max(1.0, float(own.abs().max())):
            raise ScionError(
                f"{type(self._roles.model.get_base_model()).__name__}: its logits differ by {difference:.3g} from "
                "those of its output layer, so log-probs would be wrong; PPO does not support this architecture, "
                "use `--recipe kto`"
            )

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V) in fp32."""
        with torch.autocast(hidden_ND.device.type, dtype=torch.bfloat16):
            logits_NV: Tensor = self._layer(hidden_ND)
        logits_NV = logits_NV.float()
        if self._scale != 1.0:  # each of these is a pass over all logits
            logits_NV = logits_NV * self._scale
        if self._cap is not None:
            logits_NV = torch.tanh(logits_NV / self._cap) * self._cap
        return logits_NV if self._temperature == 1.0 else logits_NV / self._temperature

    def _chunks(self, hidden_ND: Tensor, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        tokens_N = batch.answers_BR[batch.mask_BR]
        return list(zip(hidden_ND.split(self._chunk), tokens_N.split(self._chunk), strict=True))

    def _chosen(self, hidden_ND: Tensor, tokens_N: Tensor) -> Tensor:
        """(N,) log softmax at the tokens, and the way back to the hidden states where gradients are enabled."""
        if not (torch.is_grad_enabled() and hidden_ND.requires_grad):
            return _chosen(self._logits(hidden_ND), tokens_N)
        apart_ND = hidden_ND.detach().requires_grad_()
        chosen_N = _chosen(self._logits(apart_ND), tokens_N)
        (slopes_ND,) = torch.autograd.grad(chosen_N.sum(), apart_ND)
        joined: Any = _Joined.apply(hidden_ND, chosen_N.detach(), slopes_ND)
        assert isinstance(joined, Tensor)
        return joined


class _Joined(torch.autograd.Function):
    """Log-probs (N,) as a function of hidden states (N, D) with known slopes.

    A token's log-prob depends on its own hidden state alone, so the slopes (N, D) are the whole Jacobian.
    """

    @staticmethod
    def forward(ctx: Any, _hidden_ND: Tensor, chosen_N: Tensor, slopes_ND: Tensor) -> Tensor:
        ctx.save_for_backward(slopes_ND)
        return chosen_N.clone()

    @staticmethod
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        (slopes_ND,) = ctx.saved_tensors
        return (gradient_N[:, None] * slopes_ND).to(slopes_ND.dtype), None, None


def _chosen(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """(N,) log softmax at the tokens."""
    return -functional.cross_entropy(logits_NV, tokens_N, reduction="none")


def _chosen_and_entropy(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    log_probs_NV = logits_NV.log_softmax(dim=1)
    entropy_N = -(log_probs_NV.exp() * log_probs_NV).sum(dim=1)
    return log_probs_NV.gather(1, tokens_N[:, None]).squeeze(1), entropy_N


def _padded(rows: Sequence[Sequence[Any]], dtype: torch.dtype) -> Tensor:
    return pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
