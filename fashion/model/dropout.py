"""Dropout that is cheap on a CPU: one 64-bit random draw serves four elements, and the mask is applied bitwise.

Imports torch only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 15
"""Each element gets a random integer in 0..LEVELS - 1: 16 bits of a draw, the sign bit cleared so that the difference
of two such integers fits into 16 bits too."""
CLEAR_SIGNS = 0x7FFF_7FFF_7FFF_7FFF
INTEGER_OF_SAME_WIDTH = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Dropout(nn.Module):
    """Dropout: in training, zeroes each element with probability `p` and scales the others by 1 / (1 - p).

    torch's own dropout draws a Bernoulli variable per element, which takes 10 to 15 % of a training step of this
    network on a CPU; this layer takes 2 %. Each element gets 15 random bits of torch's global generator, so `p` is
    rounded to a multiple of 2**-15; the scale is exact for the rounded value. On other devices than the CPU, and for
    other dtypes than bf16 and fp32, the layer calls torch's own dropout.
    """

    def __init__(self, p: float) -> None:
        """Make a layer with dropout rate `p` in [0, 1)."""
        super().__init__()
        self.p = p
        self._kept_levels = max(1, LEVELS - round(p * LEVELS))

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with elements dropped, in its shape, dtype and memory layout."""
        if not self.training or self._kept_levels == LEVELS:
            return x
        if x.device.type != "cpu" or x.dtype not in INTEGER_OF_SAME_WIDTH:
            return F.dropout(x, self.p)
        dropped: Tensor = MaskAndScale.apply(x, draw_mask(x, self._kept_levels), LEVELS / self._kept_levels)
        return dropped


class MaskAndScale(torch.autograd.Function):
    """`x * scale` where `mask` is set and 0 elsewhere; the gradient is masked and scaled in the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Save only `mask` for the backward pass: 2 bytes per element."""
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return apply_mask(x, mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Mask and scale the gradient."""
        (mask,) = ctx.saved_tensors
        return apply_mask(gradients[0], mask).mul_(ctx.scale), None, None


def apply_mask(x: Tensor, mask: Tensor) -> Tensor:
    """Return a copy of `x` with zeros where `mask` (int16, -1 to keep and 0 to drop) is 0."""
    integer = INTEGER_OF_SAME_WIDTH[x.dtype]
    return (x.view(integer) & mask.to(integer)).view(x.dtype)


def draw_mask(like: Tensor, kept_levels: int) -> Tensor:
    """Return an int16 mask in the shape and, if `like` is dense, the memory layout of `like`.

    Each element is drawn independently: -1 (all bits set) with probability `kept_levels` / 2**15, else 0.
    """
    count = like.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    # The difference is negative where the draw is below `kept_levels`; the shift fills all 16 bits with its sign.
    mask = draws.bitwise_and_(CLEAR_SIGNS).view(torch.int16).sub_(kept_levels).bitwise_right_shift_(15)[:count]
    is_dense = torch.empty_like(like, device="meta").stride() == like.stride()
    return mask.as_strided(like.shape, like.stride()) if is_dense else mask.view(like.shape)
