"""How a step's examples are cut into what is in memory at once."""

from __future__ import annotations


def micro_batches(batch_size: int, micro_batch_size: int | None) -> tuple[int, int]:
    """(examples in memory at once, how many of these make a step); None = the whole batch.

    The first is the largest divisor of `batch_size` that is at most `micro_batch_size`, but at least 2 where the batch
    has two, because KTO estimates the KL between examples.
    """
    limit = batch_size if micro_batch_size is None else max(2, micro_batch_size)
    size = max((s for s in range(2, min(limit, batch_size) + 1) if batch_size % s == 0), default=batch_size)
    return size, batch_size // size
