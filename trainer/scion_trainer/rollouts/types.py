"""What PPO asks of a source of rollouts, and what it gets.

Knows nothing of where answers are sampled: that is one file per source beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer, as the token ids that were sampled; it is never tokenized again."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # the EOS token included, if there is one
    log_probs: tuple[float, ...]  # nats, one per response token: of the sampling policy, at its temperature
    finished: bool  # ended with EOS; False: cut off at the length limit


class RolloutSource(Protocol):
    """Samples answers from the policy of the newest `update`; there is one before the first `sample`."""

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        """One answer for each prompt (token ids, at least one), in their order.

        Raises UnavailableError when the source cannot sample now.
        """
        ...

    def update(self, adapter_directory: Path, step: int) -> None:
        """Sample from the policy whose LoRA is in `adapter_directory` (PEFT format) from now on.

        The directory may be deleted when this returns. `step` rises with every call.
        """
        ...

    def close(self) -> None:
        """Free what the source holds. Calling it twice is no error."""
        ...
