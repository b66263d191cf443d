"""What happens when memory runs out: which size comes next, where training goes on, and when it is given up."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import UnavailableError
from scion_adapters.settings import Settings
from scion_trainer.config import run_config
from scion_trainer.lowering import is_out_of_memory, train_within_memory
from scion_trainer.progress import Progress
from scion_trainer.recipes import RunContext
from scion_trainer.recipes.batches import lower, micro_batches


@pytest.mark.parametrize(
    ("batch", "micro", "recipe", "expected"),
    [
        (16, None, "kto", [8, 4, 2]),  # KTO compares two
        (16, None, "sft", [8, 4, 2, 1]),
        (16, 4, "dpo", [2, 1]),
        (12, None, "sft", [6, 3, 1]),  # divisors of the batch, so that every step stays the same
        (15, None, "kto", [5]),  # 3 is not half of 5
        (7, None, "kto", []),  # a prime
        (7, None, "sft", [1]),
    ],
)
def test_sizes_fall_by_half_or_more(batch: int, micro: int | None, recipe: str, expected: list[int]) -> None:
    found: list[int] = []
    while (size := lower(batch, micro, recipe)) is not None:
        found.append(size)
        micro = size
    assert found == expected
    assert all(micro_batches(batch, size, recipe) == (size, batch // size) for size in found)


class Hungry:
    """Trains with at most `enough` examples at once."""

    name = "sft"
    makes_version = True

    def __init__(self, enough: int, error: Exception) -> None:
        self._enough = enough
        self._error = error
        self.tried: list[tuple[int, Any]] = []

    def train(self, context: RunContext) -> dict[str, Any]:
        size, _ = micro_batches(context.config.batch_size, context.config.micro_batch_size, context.config.recipe)
        self.tried.append((size, context.model))
        if size > self._enough:
            raise self._error
        return {"steps": 3}


def context(tmp_path: Path, progress: Progress) -> RunContext:
    return RunContext(
        config=replace(run_config(Settings(), "sft"), batch_size=8),
        model="model",
        tokenizer=None,
        examples=(),
        directory=tmp_path,
        resume_from=None,
        gradient_checkpointing=False,
        progress=progress,
        stop_requested=lambda: False,
    )


@pytest.fixture
def said() -> StringIO:
    return StringIO()


@pytest.fixture
def begun(tmp_path: Path, said: StringIO) -> RunContext:
    return context(tmp_path, Progress(tmp_path, stream=said))


def run(recipe: Any, begun: RunContext) -> tuple[RunContext, dict[str, Any], list[int]]:
    sizes: list[int] = []
    ended, metrics = train_within_memory(
        recipe, begun, fresh_model=lambda tried: f"fresh {tried}", lowered=sizes.append
    )
    return ended, metrics, sizes


def test_a_run_goes_on_with_half_until_it_fits(begun: RunContext, said: StringIO) -> None:
    recipe = Hungry(2, MemoryError("no more\nof it"))
    ended, metrics, sizes = run(recipe, begun)
    assert recipe.tried == [(8, "model"), (4, "fresh model"), (2, "fresh fresh model")]
    assert (sizes, ended.config.micro_batch_size, ended.model) == ([4, 2], 2, "fresh fresh model")
    assert metrics == {"steps": 3, "micro_batch_size": 2, "out_of_memory": 2}
    assert "memory ran out (no more): on from step 0 with 4 examples at once, 8 a step as before" in (said.getvalue())


def test_what_does_not_fit_at_all_is_given_up(begun: RunContext) -> None:
    recipe = Hungry(0, MemoryError())
    with pytest.raises(MemoryError):
        run(recipe, begun)
    assert [size for size, _ in recipe.tried] == [8, 4, 2, 1]


def test_other_errors_are_not_tried_again(begun: RunContext) -> None:
    recipe = Hungry(0, ValueError("allocate memory"))
    with pytest.raises(ValueError, match="allocate"):
        run(recipe, begun)
    assert len(recipe.tried) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),  # Python's own
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),  # torch
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), True),  # torch.cuda's
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),  # the driver's
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator is fine"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("Triton Error [CUDA]: device-side assert triggered"), False),
        (RuntimeError("out of resource: shared memory"), False),  # of one kernel, whatever the batch
        (ValueError("CUDA error: out of memory"), False),
        (UnavailableError("the engine ended; its log ends: CUDA error: out of memory"), False),  # another process's
    ],
)
def test_errors_are_told_apart(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
