"""Minimal filtering: its outputs and gradients against those of torch's convolution, and when it is used."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fashion.config import TrainConfig
from fashion.model import winograd
from fashion.training.run import build_model

# Largest root mean square of the error, relative to that of the convolution; 9e-6 to 2e-5 were measured.
TOLERANCE = 4e-5


def plainly(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: str) -> torch.Tensor:
    """Return the convolution as torch computes it."""
    padded = F.pad(x, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding)
    return F.conv2d(padded, weight, bias)


def difference(found: torch.Tensor, plain: torch.Tensor) -> float:
    """Return the root mean square of `found - plain`, relative to that of `plain`."""
    return ((found.double() - plain).norm() / plain.norm()).item()


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("num_in", "num_out", "size"), [(1, 32, 28), (32, 64, 28), (64, 128, 14), (5, 3, 7), (3, 2, 21)]
)
def test_outputs_and_gradients_are_those_of_torch(num_in: int, num_out: int, size: int, padding: str) -> None:
    torch.manual_seed(0)
    x = F.relu(torch.randn(5, num_in, size, size)).requires_grad_(num_in > 1)
    weight, bias = torch.randn(num_out, num_in, 3, 3, requires_grad=True), torch.randn(num_out, requires_grad=True)
    back = torch.randn(5, num_out, size, size)
    assert winograd.is_quicker(x)
    y = winograd.convolve(x, weight, bias, padding)
    y.backward(back)
    doubles = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    plain = plainly(*doubles, padding)
    plain.backward(back.double())
    assert y.shape == plain.shape
    assert difference(y, plain) < TOLERANCE
    for found, expected in zip((x, weight, bias), doubles, strict=True):
        if found.requires_grad:
            assert found.grad is not None
            assert found.grad.shape == found.shape
            assert difference(found.grad, expected.grad) < TOLERANCE


def test_one_axis_is_exact_in_double_precision() -> None:
    """The algebra alone, without rounding: seven outputs of three taps from nine products."""
    pixels, taps, outputs = (torch.from_numpy(matrix) for matrix in winograd.toom_cook())
    signal, kernel = torch.randn(9, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = outputs @ ((pixels @ signal) * (taps @ kernel))
    assert torch.allclose(found, signal.unfold(0, 3, 1) @ kernel, atol=1e-11)


@pytest.mark.parametrize("num_in", [1, 8])
def test_gradients_of_weights_lie_in_the_order_that_weights_do(num_in: int) -> None:
    """DDP would warn about any other order, and copy element by element."""
    weight = torch.randn(6, num_in, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = winograd.convolve(torch.randn(2, num_in, 14, 14), weight, None, "zeros")
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert gradient.stride() == (9 * num_in, 1, 3 * num_in, num_in)


def test_without_bias() -> None:
    x, weight = torch.randn(2, 3, 14, 14), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = winograd.convolve(x, weight, None, "zeros")
    assert difference(y, F.conv2d(x.double(), weight.double(), padding=1)) < TOLERANCE


def test_any_order_in_memory_gives_the_same_and_the_next_layer_needs_no_copy() -> None:
    x, weight = torch.randn(4, 8, 14, 14), torch.randn(6, 8, 3, 3, requires_grad=True)
    pixels_first = x.permute(winograd.PIXELS_FIRST).contiguous().permute(winograd.PIXELS_FIRST)
    orders = [x, x.contiguous(memory_format=torch.channels_last), pixels_first]
    first, *others = [winograd.convolve(each, weight, None, "zeros") for each in orders]
    assert all(torch.equal(first, other) for other in others)
    assert first.permute(winograd.PIXELS_FIRST).is_contiguous()
    assert F.relu(first).permute(winograd.PIXELS_FIRST).is_contiguous()


def test_pooling_is_that_of_torch_in_the_order_that_it_was_given() -> None:
    torch.manual_seed(0)
    plain = torch.randn(3, 5, 14, 14).requires_grad_()
    back = torch.randn(3, 5, 7, 7)
    expected = F.max_pool2d(plain, 2)
    expected.backward(back)
    for order in (winograd.PIXELS_FIRST, (0, 1, 2, 3)):
        inverse = [order.index(axis) for axis in range(4)]
        x = plain.detach().permute(order).contiguous().permute(inverse).requires_grad_()
        pooled = winograd.max_pool(x)
        pooled.backward(back)
        assert torch.equal(pooled, expected)
        assert pooled.permute(order).is_contiguous()
        assert torch.equal(x.grad, plain.grad)


def test_only_training_in_fp32_uses_it() -> None:
    x = torch.randn(2, 3, 14, 14)
    assert winograd.is_quicker(x)
    assert not winograd.is_quicker(x.double())
    assert not winograd.is_quicker(torch.randn(2, 3, 15, 15))
    assert not winograd.is_quicker(torch.empty(2, 3, 14, 14, device="meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not winograd.is_quicker(x)
    with torch.no_grad():
        assert not winograd.is_quicker(x)


@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect", "partial", "learned"])
def test_a_network_that_trains_predicts_what_it_does_in_evaluation(padding: str) -> None:
    torch.manual_seed(0)
    model = build_model(TrainConfig(padding=padding, init="he"), pixel_mean=0.3, pixel_std=0.35).eval()
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    trained = model(images)
    with torch.no_grad():
        evaluated = model(images)
    assert not torch.equal(trained, evaluated), "both computed the same way: nothing is compared"
    assert (trained - evaluated).abs().max() < 1e-4 * evaluated.abs().max()


def test_a_training_step_takes_less_than_half_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, transforms included: how much time that saves depends on the processor; `jobs.bench` measures it."""
    model = build_model(TrainConfig(), pixel_mean=0.3, pixel_std=0.35)
    images, labels = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8), torch.arange(8)

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(images), labels).backward()
        return int(counter.get_total_flops())

    quick = operations()
    monkeypatch.setattr(winograd, "is_quicker", lambda x: False)
    assert quick < 0.5 * operations()
