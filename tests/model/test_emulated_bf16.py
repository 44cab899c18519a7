"""bf16 on CPUs without it: products of rounded numbers, their sums rounded once."""

import copy

import pytest
import torch
from torch import nn

from fashion.model import emulated_bf16
from fashion.model.network import Conv2d, FashionCNN, place

ULP = 2.0**-8
"""What rounding to bf16, of 8 significant bits, changes at most, relative to the number."""


def results(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Return the layer's output, and the gradients of `x` and of its parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gradient.to(y.dtype))
    found = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    return [each.double() for each in found if each is not None]


@pytest.mark.parametrize("padding", ["zeros", "reflect", "linear"])
def test_outputs_and_gradients_are_the_exact_ones_rounded_once(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact ones are those of double precision, from the same rounded numbers."""
    monkeypatch.setattr(emulated_bf16, "HAS_BF16", False)
    torch.manual_seed(0)
    layer: nn.Module
    if padding == "linear":
        layer, x, gradient = emulated_bf16.Linear(96, 24), torch.randn(5, 96), torch.randn(5, 24)
    else:
        layer = Conv2d(8, 12, padding=padding)  # type: ignore[arg-type]
        x, gradient = torch.randn(3, 8, 7, 7), torch.randn(3, 12, 7, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        rounded = results(layer, x, gradient)
    exact_layer = copy.deepcopy(layer).to(torch.bfloat16).double()
    exact = results(exact_layer, x.bfloat16().double(), gradient.bfloat16().double())
    assert len(exact) == 4
    for one, other in zip(rounded, exact, strict=True):
        # Terms that cancel leave the rounding of fp32 behind.
        assert ((one - other).abs() <= ULP * other.abs() + 1e-5 * other.abs().max()).all()


def test_the_network_computes_in_bf16_throughout_and_in_fp32_not_at_all_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[str] = []
    in_fp32 = emulated_bf16.in_fp32
    monkeypatch.setattr(
        emulated_bf16, "in_fp32", lambda operation, *operands: called.append("layer") or in_fp32(operation, *operands)
    )
    model = place(FashionCNN(pixel_mean=0.3, pixel_std=0.3), torch.device("cpu"))
    images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    monkeypatch.setattr(emulated_bf16, "HAS_BF16", False)
    model(images)
    assert called == [], "fp32 is fp32"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
    assert len(called) == 9, "six convolutions and three linear layers"
    monkeypatch.setattr(emulated_bf16, "HAS_BF16", True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    assert len(called) == 9, "a CPU with bf16 computes them itself"
