"""LoRA on a CPU: one product for each adapter in a batch, and none for the base.

vLLM's own kernels for CPUs copy an adapter's matrices once for every token, which makes a long prompt several times
slower than the base alone, and take slot -1, its mark of tokens without LoRA, for an index: in a batch with an
adapter's requests the base's then go through whatever lies in the last slot. These have the same signatures and know
nothing else of vLLM; private_vllm.py puts them in place.

Shapes: N tokens, S slots, D inputs, R rank, O outputs. Stacked matrices are (S, R, D) or (S, 1, R, D) for A, and
(S, O, R) or (S, 1, O, R) for B.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype


def bgmv_shrink(inputs_ND: Tensor, weights: Tensor, output_NR: Tensor, slots_N: Tensor, scaling: float = 1.0) -> None:
    """Sets output to scaling * inputs Aᵀ, in the output's type (vLLM's is fp32); zeros for tokens without LoRA."""
    output_NR.zero_()
    for slot, rows in _groups(slots_N):
        weight_RD = _matrix(weights, slot, output_NR.dtype)
        low = (inputs_ND if rows is None else inputs_ND[rows]).to(output_NR.dtype) @ weight_RD.T
        target = output_NR[:, : low.shape[1]]
        if rows is None:
            target.copy_(low.mul_(scaling))
        else:
            target[rows] = low.mul_(scaling)


def bgmv_expand_slice(
    inputs_NR: Tensor,
    weights: Tensor,
    output: Tensor,
    slots_N: Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """Adds inputs Bᵀ to the `slice_size` columns of output from `slice_offset` on, or writes it there."""
    target = output[:, slice_offset : slice_offset + slice_size]
    if not add_inputs:
        target.zero_()
    for slot, rows in _groups(slots_N):
        weight_OR = _matrix(weights, slot, output.dtype)[: target.shape[1]]  # either may be padded
        low = (inputs_NR if rows is None else inputs_NR[rows]).to(output.dtype)
        if rows is None:
            target[:, : len(weight_OR)].addmm_(low, weight_OR.T)
        else:
            target[:, : len(weight_OR)].index_add_(0, rows, low @ weight_OR.T)


def bgmv_expand(inputs_NR: Tensor, weights: Tensor, output: Tensor, slots_N: Tensor, add_inputs: bool = True) -> None:
    """As `bgmv_expand_slice`, over as many columns as output and matrix have in common."""
    bgmv_expand_slice(inputs_NR, weights, output, slots_N, 0, min(weights.shape[-2], output.shape[1]), add_inputs)


def sgmv_shrink(inputs: Tensor, weights: Tensor, output: Tensor, *metadata: Any) -> None:
    """`bgmv_shrink` for prompts: the metadata are (starts, lengths, slots, batches, longest, tokens) and `scaling`."""
    *described, scaling = metadata
    bgmv_shrink(inputs, weights, output, _slots(described), scaling)


def sgmv_expand(inputs: Tensor, weights: Tensor, output: Tensor, *metadata: Any) -> None:
    """`bgmv_expand` for prompts; `add_inputs` comes last."""
    *described, add_inputs = metadata
    bgmv_expand(inputs, weights, output, _slots(described), add_inputs)


def sgmv_expand_slice(inputs: Tensor, weights: Tensor, output: Tensor, *metadata: Any) -> None:
    """`bgmv_expand_slice` for prompts; offset, size and `add_inputs` come last."""
    *described, slice_offset, slice_size, add_inputs = metadata
    bgmv_expand_slice(inputs, weights, output, _slots(described), slice_offset, slice_size, add_inputs)


def _slots(described: Any) -> Tensor:
    """The slot of every token, from (starts, lengths, slots, …) of the sequences."""
    _, lengths, slots, *_ = described
    tokens: Tensor = slots.repeat_interleave(lengths)
    return tokens


def _matrix(weights: Tensor, slot: int, wanted: dtype) -> Tensor:
    weight = weights[slot]
    return (weight[0] if weight.dim() == 3 else weight).to(wanted)


def _groups(slots_N: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    """Each slot in use with its tokens' rows, None for all of them. Tokens without LoRA are in no group."""
    slots = set(slots_N.tolist())
    if len(slots) == 1:
        slot = slots.pop()
        if slot >= 0:
            yield slot, None
        return
    for slot in sorted(slots):
        if slot >= 0:
            yield slot, (slots_N == slot).nonzero().squeeze(1)
