"""Dropout whose mask costs a CPU little: four elements for each 64-bit draw, applied as bits. Knows torch alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 << 15
"""A draw takes 16 bits of which the sign is cleared, so that a difference of two fits again."""
WITHOUT_SIGNS = 0x7FFF_7FFF_7FFF_7FFF
AS_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Dropout(nn.Module):
    """Zeroes each element with probability `p` in training and scales the others so that the mean stays.

    On a CPU, torch draws a Bernoulli variable per element, 10 to 15 % of a step of this network; here it is 2 %. Each
    element gets 15 bits of a draw of torch's global generator, so `p` is rounded to a multiple of 2**-15; the scale is
    exact for the rounded value. On other devices, and in other precisions than bf16 and fp32, it is torch's own.
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
        if x.device.type != "cpu" or x.dtype not in AS_BITS:
            return F.dropout(x, self.p)
        kept: Tensor = Drop.apply(x, keep_bits(x, self._kept_levels), LEVELS / self._kept_levels)
        return kept


class Drop(torch.autograd.Function):
    """`x` where `bits` are set and 0 elsewhere, times `scale`; the gradient goes the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: float) -> Tensor:
        """Keep `bits` alone for the way back: 2 bytes an element."""
        ctx.save_for_backward(bits)
        ctx.scale = scale
        return masked(x, bits).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Drop and scale the gradient of the same elements."""
        (bits,) = ctx.saved_tensors
        return masked(gradients[0], bits).mul_(ctx.scale), None, None


def masked(x: Tensor, bits: Tensor) -> Tensor:
    """Return a copy of `x` with zeros where `bits` (int16, all ones or none) are not set."""
    kind = AS_BITS[x.dtype]
    return (x.view(kind) & bits.to(kind)).view(x.dtype)


def keep_bits(like: Tensor, kept_levels: int) -> Tensor:
    """Return int16 in the shape and, if it is dense, the layout of `like`: -1, all bits set, with probability
    `kept_levels` / 2**15, else 0; each element by a draw of its own.
    """
    count = like.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    # Negative where the draw is below `kept_levels`; the shift fills the number with its sign.
    bits = draws.bitwise_and_(WITHOUT_SIGNS).view(torch.int16).sub_(kept_levels).bitwise_right_shift_(15)[:count]
    dense = torch.empty_like(like, device="meta").stride() == like.stride()
    return bits.as_strided(like.shape, like.stride()) if dense else bits.view(like.shape)
