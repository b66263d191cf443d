"""The forward of a LoRA layer on an NF4 base, without what PEFT does beside the arithmetic.

PEFT clones the base's output, and where autocast is on for another device than CUDA it takes the input to fp32 (for
autocast to take it back), multiplies and adds in passes of their own: a fifth of a training step on a CPU. Here the
adapter's part is added by one product, in the output's type. Whatever is not plain goes PEFT's own way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch.nn import functional

Forward = Callable[..., torch.Tensor]


def use_lean_forward() -> None:
    """Put it in the place of PEFT's, in this process. Again and again does no harm."""
    if not getattr(Linear4bit.forward, "is_lean", False):
        Linear4bit.forward = lean(Linear4bit.forward)


def lean(original: Forward) -> Forward:
    """`original`, a LoRA layer's forward, or the same in fewer passes where one plain adapter is active."""

    @functools.wraps(original)
    def forward(layer: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        name = None if arguments or named else plain_adapter(layer)
        if name is None:
            return original(layer, x, *arguments, **named)
        result: torch.Tensor = layer.base_layer(x)
        weight_RD, weight_OR = (part[name].weight.to(result.dtype) for part in (layer.lora_A, layer.lora_B))
        low = functional.linear(x.to(result.dtype), weight_RD)
        rows = torch.addmm(
            result.reshape(-1, result.shape[-1]),
            low.reshape(-1, low.shape[-1]),
            weight_OR.t(),
            alpha=layer.scaling[name],
        )
        return rows.view(result.shape)

    forward.is_lean = True  # type: ignore[attr-defined]
    return forward


def plain_adapter(layer: Any) -> str | None:
    """The one adapter that is active in `layer`; None where there are more or none, or it is more than two matrices."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout = layer.lora_dropout[name]
    return None if dropout.training and getattr(dropout, "p", 0.0) > 0 else name
