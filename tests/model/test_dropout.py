"""Dropout: its rate, independence of elements, scale and gradient, and its distribution against that of torch's own."""

import math

import pytest
import torch
from torch import Tensor

from fashion.model.dropout import LEVELS, Dropout, draw_mask

COUNT = 1 << 20


def drawn(p: float) -> Tensor:
    """Return a mask of `COUNT` elements as 0 and 1."""
    torch.manual_seed(1)
    return draw_mask(torch.empty(COUNT), LEVELS - round(p * LEVELS)).double().neg()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_what_was_asked_for(p: float) -> None:
    """Within four standard deviations of a binomial count; the rounding of `p` is 2**-16 at most."""
    dropped = COUNT - drawn(p).sum().item()
    assert abs(dropped - p * COUNT) < 4 * math.sqrt(COUNT * p * (1 - p)) + COUNT * 2**-16


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 7, 1000])
def test_elements_are_independent(distance: int) -> None:
    """Also elements that share a 64-bit draw. The correlation of n pairs has a standard deviation of 1 / sqrt(n)."""
    mask = drawn(0.3)
    pairs = torch.stack([mask[:-distance], mask[distance:]])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 4 / math.sqrt(COUNT - distance)


def test_counts_per_image_are_spread_as_torchs_are() -> None:
    """Over 4,096 images of 256 elements, the variance is that of a binomial count, as with torch's own dropout."""
    p = 0.4
    expected = 256 * p * (1 - p)
    torch.manual_seed(2)
    ours = draw_mask(torch.empty(4096, 256), LEVELS - round(p * LEVELS)).neg().sum(1).double().var().item()
    torchs = (torch.nn.functional.dropout(torch.ones(4096, 256), p) > 0).sum(1).double().var().item()
    for variance in (ours, torchs):
        assert abs(variance / expected - 1) < 5 * math.sqrt(2 / 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kept_elements_and_gradients_are_scaled_alike(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.rand(3, 5, 7, 7).add(0.5).to(dtype).contiguous(memory_format=layout).requires_grad_()
    out = Dropout(0.25)(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=layout)
    kept = out != 0
    assert 0.6 < kept.double().mean().item() < 0.9
    torch.testing.assert_close(out[kept], (x[kept].double() / 0.75).to(dtype))
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kept.double().div(0.75).to(dtype))


def test_the_same_seed_drops_the_same_elements() -> None:
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(Dropout(0.5)(torch.ones(2, 3, 4, 5)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_nothing_is_dropped_without_a_rate_or_outside_training() -> None:
    x = torch.ones(8)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x


def test_any_layout_is_taken() -> None:
    x = torch.ones(6, 4).t()[:, ::2]
    out = Dropout(0.5)(x)
    assert out.shape == x.shape
    assert set(out.unique().tolist()) <= {0.0, 2.0}
