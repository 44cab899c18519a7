"""bf16 on CPUs without it: rounded numbers are multiplied in fp32, and the sums rounded, as hardware with bf16 does.

There torch 2.15 computes products of bf16 numbers one by one: on a Zen 3 core, training took seven times as long as it
does here (batch of 32, n = 1). A product of two bf16 numbers is exact in fp32, and hardware with bf16 adds such
products in fp32, so an fp32 kernel, given rounded numbers, computes the same up to the order of its sums. Imports torch
only.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion.model.device import cpu_has_bf16

HAS_BF16 = cpu_has_bf16()


def is_needed(x: Tensor) -> bool:
    """Tell whether a layer must compute `x` by `in_fp32`: under autocast to bf16, on a CPU that has none."""
    return (
        not HAS_BF16
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def in_fp32(operation: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """Return `operation` of rounded operands, computed in fp32 and rounded; its gradients are rounded as well."""
    with torch.autocast("cpu", enabled=False):
        rounded = (None if each is None else each.to(torch.bfloat16).float() for each in operands)
        return operation(*rounded).to(torch.bfloat16)


class Linear(nn.Linear):
    """A linear layer, also in bf16 on a CPU that has none."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in) to (B, out)."""
        if is_needed(input):
            return in_fp32(F.linear, input, self.weight, self.bias)
        return super().forward(input)
