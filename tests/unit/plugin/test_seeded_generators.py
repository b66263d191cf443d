"""Requests with a seed whose prompt takes several steps: their generators are kept from what would kill the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_scion.private_vllm import hiding_discarded_generators


def bookkeeping(runner: Any, *arguments: Any) -> Any:
    """What vLLM's does with the generators of discarded tokens."""
    for index in np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]:
        if (generator := runner.input_batch.generators.get(int(index))) is not None:
            generator.set_offset(generator.get_offset() - 4)
    return arguments


def runner_of(*, discarded: list[bool], sampled: list[list[int]], seeded: list[int]) -> Any:
    names = [f"request-{index}" for index in range(len(discarded))]
    generators = {index: torch.Generator().manual_seed(index) for index in seeded}
    for generator in generators.values():
        torch.rand(3, generator=generator)  # the draw of this step
    return SimpleNamespace(
        discard_request_mask=SimpleNamespace(np=np.array([*discarded, True])),  # longer than the batch, as vLLM's
        input_batch=SimpleNamespace(num_reqs=len(discarded), generators=generators, req_ids=names),
        requests={name: SimpleNamespace(output_token_ids=ids) for name, ids in zip(names, sampled, strict=True)},
    )


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(3, generator=generator).tolist()


def seeded_draw(seed: int, *, skipped: int) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return [draw(generator) for _ in range(skipped + 1)][-1]


def test_vllm_s_own_way_fails_on_a_cpu() -> None:
    """When this fails, PyTorch's CPU generators have offsets, and the mend can go."""
    with pytest.raises(RuntimeError, match="offset"):
        bookkeeping(runner_of(discarded=[True], sampled=[[]], seeded=[0]))


def test_a_seed_gives_the_same_answer_however_its_prompt_was_cut() -> None:
    runner = runner_of(discarded=[True, False, True], sampled=[[], [7], [7, 8]], seeded=[0, 1, 2])
    assert hiding_discarded_generators(bookkeeping)(runner, "kept") == ("kept",)
    generators = runner.input_batch.generators
    assert sorted(generators) == [0, 1, 2]
    assert draw(generators[0]) == seeded_draw(0, skipped=0), "nothing was drawn for it yet"
    assert draw(generators[1]) == seeded_draw(1, skipped=1), "its token counts"
    assert draw(generators[2]) == seeded_draw(2, skipped=1), "it has tokens already: those draws must not come again"


def test_generators_come_back_when_the_step_fails() -> None:
    def broken(runner: Any) -> None:
        raise ZeroDivisionError

    runner = runner_of(discarded=[True], sampled=[[]], seeded=[0])
    with pytest.raises(ZeroDivisionError):
        hiding_discarded_generators(broken)(runner)
    assert list(runner.input_batch.generators) == [0]
