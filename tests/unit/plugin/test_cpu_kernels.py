"""LoRA kernels for CPUs against a plain loop over tokens: any mix of adapters and base, in vLLM's types and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_scion import cpu_kernels

TOKENS, SLOTS, WIDTH, RANK, OUT = 7, 3, 12, 4, 10
MIXES = {
    "one adapter": [1] * TOKENS,
    "the base alone": [-1] * TOKENS,
    "all mixed": [0, -1, 2, 1, 0, 2, -1],
    "an adapter and the base": [2, 2, -1, -1, 2, -1, 2],
}


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("stacked", [True, False])
def test_shrink_is_a_product_per_token_and_nothing_for_the_base(slots: list[int], stacked: bool) -> None:
    inputs, weights = normal(TOKENS, WIDTH), normal(SLOTS, RANK, WIDTH)
    output = torch.full((TOKENS, RANK + 1), 5.0)  # the buffer may be wider
    cpu_kernels.bgmv_shrink(inputs, weights[:, None] if stacked else weights, output, torch.tensor(slots), 0.5)
    for row, slot in enumerate(slots):
        expected = 0.5 * weights[slot].float() @ inputs[row].float() if slot >= 0 else torch.zeros(RANK)
        torch.testing.assert_close(output[row, :RANK], expected)


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("add_inputs", [True, False])
def test_expand_adds_to_its_columns_only(slots: list[int], add_inputs: bool) -> None:
    inputs, weights = normal(TOKENS, RANK, dtype=torch.float32), normal(SLOTS, 1, OUT, RANK)
    before = normal(TOKENS, OUT + 6)
    output = before.clone()
    cpu_kernels.bgmv_expand_slice(inputs, weights, output, torch.tensor(slots), 3, OUT, add_inputs)
    for row, slot in enumerate(slots):
        expected = before[row].float()
        if not add_inputs:
            expected[3 : 3 + OUT] = 0
        if slot >= 0:
            expected[3 : 3 + OUT] += weights[slot, 0].float() @ inputs[row].bfloat16().float()
        torch.testing.assert_close(output[row].float(), expected, atol=0.05, rtol=0.02)
        assert torch.equal(output[row, :3], before[row, :3])
        assert torch.equal(output[row, 3 + OUT :], before[row, 3 + OUT :])


@pytest.mark.parametrize("width", [OUT - 2, OUT, OUT + 2])
def test_expand_takes_the_columns_that_both_have(width: int) -> None:
    inputs, weights = normal(TOKENS, RANK, dtype=torch.float32), normal(SLOTS, OUT, RANK, dtype=torch.float32)
    output = torch.zeros(TOKENS, width)
    cpu_kernels.bgmv_expand(inputs, weights, output, torch.tensor(MIXES["all mixed"]))
    common = min(width, OUT)
    torch.testing.assert_close(output[0, :common], weights[0, :common] @ inputs[0])
    assert not output[:, common:].any()
    assert not output[1].any()  # the base's


def test_prompts_give_each_token_its_sequence_s_adapter() -> None:
    lengths, slots = torch.tensor([3, 1, 2, 1]), torch.tensor([2, -1, 0, 2])
    described = (None, lengths, slots, 4, 3, TOKENS)
    by_token = slots.repeat_interleave(lengths)
    inputs, a, b = normal(TOKENS, WIDTH), normal(SLOTS, RANK, WIDTH), normal(SLOTS, OUT, RANK)
    low, expected_low = torch.zeros(TOKENS, RANK), torch.zeros(TOKENS, RANK)
    cpu_kernels.sgmv_shrink(inputs, a, low, *described, 2.0)
    cpu_kernels.bgmv_shrink(inputs, a, expected_low, by_token, 2.0)
    assert torch.equal(low, expected_low)
    whole, part, expected = (torch.zeros(TOKENS, OUT) for _ in range(3))
    cpu_kernels.sgmv_expand(low, b, whole, *described, True)
    cpu_kernels.sgmv_expand_slice(low, b, part, *described, 0, OUT, True)
    cpu_kernels.bgmv_expand(low, b, expected, by_token)
    assert torch.equal(whole, expected)
    assert torch.equal(part, expected)
