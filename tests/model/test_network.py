"""The network: exactly the published layers, normalisation inside, and each padding by its definition."""

import pytest
import torch
import torch.nn.functional as F

from fashion.config import Depth, TrainConfig, preset
from fashion.model.network import (
    NUM_PARAMETERS,
    FashionCNN,
    Flatten,
    LearnedConv2d,
    PartialConv2d,
    count_parameters,
    num_parameters,
    place,
)
from fashion.training.run import build_model

PUBLISHED_LAYERS = {
    "conv1": 320,
    "conv2": 9_248,
    "conv3": 18_496,
    "conv4": 73_856,
    "conv5": 147_584,
    "conv6": 295_168,
    "fc1": 6_423_040,
    "fc2": 32_832,
    "fc3": 650,
}


def make(**settings: object) -> FashionCNN:
    torch.manual_seed(0)
    return build_model(TrainConfig(**settings), pixel_mean=0.286, pixel_std=0.353).eval()


@pytest.mark.parametrize("padding", ["zeros", "replicate", "reflect", "partial"])
def test_parameters_layer_by_layer(padding: str) -> None:
    model = make(padding=padding)
    assert {name: count_parameters(getattr(model, name)) for name in PUBLISHED_LAYERS} == PUBLISHED_LAYERS
    assert count_parameters(model) == NUM_PARAMETERS["vgg"] == 7_001_194


@pytest.mark.parametrize("depth", ["deep", "deep-bn"])
def test_deeper_variants_keep_the_published_layers_and_a_bound(depth: str) -> None:
    model = make(depth=depth)
    assert {name: count_parameters(getattr(model, name)) for name in PUBLISHED_LAYERS} == PUBLISHED_LAYERS
    assert count_parameters(model) == NUM_PARAMETERS[depth] <= 8_000_000
    assert count_parameters(model.conv3b) + count_parameters(model.conv6b) == 36_928 + 590_080
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert model(images).shape == (3, 10)
    assert not torch.equal(model(images), make()(images))
    assert any("norms" in name for name in model.state_dict()) == (depth == "deep-bn")


def test_raw_images_to_logits() -> None:
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    logits = make()(images)
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32


def test_shapes_inside() -> None:
    shapes = {}
    model = make()
    for name in PUBLISHED_LAYERS:
        getattr(model, name).register_forward_hook(
            lambda _m, _i, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:]))
        )
    model(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))
    assert shapes["conv3"] == (64, 28, 28)
    assert shapes["conv4"] == (128, 14, 14)
    assert shapes["conv6"] == (256, 14, 14)
    assert [shapes[name] for name in ("fc1", "fc2", "fc3")] == [(512,), (64,), (10,)]


def test_normalisation_is_inside_and_saved() -> None:
    model = make()
    assert {"pixel_mean", "pixel_std"} <= set(model.state_dict())
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    seen = []
    model.conv1.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    model(images)
    assert torch.allclose(seen[0], (images / 255 - 0.286) / 0.353)


@pytest.mark.parametrize("init", ["torch", "glorot", "he"])
def test_loss_at_the_start_is_that_of_a_guess(init: str) -> None:
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    labels = torch.arange(64) % 10
    loss = F.cross_entropy(make(init=init)(images), labels).item()
    assert loss == pytest.approx(2.303, abs=0.6)


def test_dropout_acts_in_training_only() -> None:
    model = make(dropout_conv=0.3, dropout_fc=0.3)
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_partial_padding_rescales_by_the_share_of_valid_taps() -> None:
    layer = PartialConv2d(1, 1, 5)
    assert layer.bias is not None
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(0.5)
    # For a constant image, the mean over the valid taps is the same everywhere, so the border has no effect.
    output = layer(torch.full((1, 1, 5, 5), 2.0))
    assert torch.allclose(output, torch.full((1, 1, 5, 5), 18.5))
    assert layer.ratio[0, 0, 0, 0].item() == pytest.approx(9 / 4)
    assert layer.ratio[0, 0, 0, 2].item() == pytest.approx(9 / 6)
    assert "ratio" not in layer.state_dict()


def test_partial_padding_equals_its_definition() -> None:
    torch.manual_seed(1)
    layer = PartialConv2d(3, 4, 6)
    x = torch.randn(2, 3, 6, 6)
    mask = F.conv2d(torch.ones(1, 1, 6, 6), torch.ones(1, 1, 3, 3), padding=1)
    assert layer.bias is not None
    expected = F.conv2d(x, layer.weight, padding=1) * 9 / mask + layer.bias.view(1, -1, 1, 1)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_the_preset_best_trains_the_published_network() -> None:
    model = build_model(preset("best"), pixel_mean=0.3, pixel_std=0.35)
    assert count_parameters(model) == 7_001_194
    assert set(dict(model.named_parameters())) == set(dict(make().named_parameters()))


@pytest.mark.parametrize(("depth", "expected"), [("vgg", 7_001_194 + 12), ("deep-bn", 7_630_122 + 16)])
def test_learned_padding_adds_two_parameters_per_convolution(depth: Depth, expected: int) -> None:
    model = make(padding="learned", depth=depth)
    assert count_parameters(model) == num_parameters(depth, "learned") == expected
    assert num_parameters(depth, "partial") == NUM_PARAMETERS[depth]


@pytest.mark.parametrize("size", [3, 14])
@pytest.mark.parametrize(("border", "as_padding"), [((1.0, 1.0), "zeros"), ((1.5, 2.25), "partial")])
def test_learned_padding_holds_the_other_two(size: int, border: tuple[float, float], as_padding: str) -> None:
    """Equal to the bit in fp32. torch's own layer may fuse the bias, so it is compared with a tolerance."""
    torch.manual_seed(1)
    learned, partial = LearnedConv2d(3, 4, size), PartialConv2d(3, 4, size)
    if as_padding == "partial":
        with torch.no_grad():
            learned.border.copy_(torch.tensor(border))
    else:
        partial.ratio.fill_(1.0)
    assert learned.border.tolist() == list(border)
    partial.load_state_dict({name: learned.state_dict()[name] for name in ("weight", "bias")})
    x = torch.randn(2, 3, size, size)
    assert torch.equal(learned(x), partial(x))
    if as_padding == "zeros":
        with torch.no_grad():
            assert torch.allclose(learned(x), F.conv2d(x, learned.weight, learned.bias, padding=1), atol=1e-5)


def test_learned_factors_get_the_gradients_of_their_places() -> None:
    """By the definition: the output without bias times its gradient, summed over edges and over corners."""
    torch.manual_seed(1)
    layer = LearnedConv2d(3, 4, 5)
    x, back = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    layer(x).backward(back)
    products = (F.conv2d(x, layer.weight, padding=1) * back).sum((0, 1)).detach()
    corners = products[::4, ::4].sum()
    edges = products.sum() - products[1:-1, 1:-1].sum() - corners
    assert torch.allclose(layer.border.grad, torch.stack([edges, corners]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", ["vgg", "deep-bn"])
def test_a_network_with_learned_padding_starts_as_that_with_zeros(depth: Depth) -> None:
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    zeros, learned = (place(make(padding=each, depth=depth), torch.device("cpu")) for each in ("zeros", "learned"))
    assert torch.allclose(zeros(images), learned(images), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = learned.train()(images)
    F.cross_entropy(logits.float(), torch.arange(4)).backward()
    gradients = {name: each.grad for name, each in learned.named_parameters() if name.endswith("border")}
    assert len(gradients) == (6 if depth == "vgg" else 8)
    assert all(gradient is not None and gradient.abs().min() > 0 for gradient in gradients.values()), gradients
    assert learned.conv2(torch.zeros(1, 32, 28, 28).contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_paddings_differ_only_near_the_border() -> None:
    zeros, reflect = make(padding="zeros"), make(padding="reflect")
    x = torch.randn(1, 1, 28, 28)
    difference = (zeros.conv1(x) - reflect.conv1(x)).abs().amax((0, 1))
    assert difference[1:-1, 1:-1].max() < 1e-5
    assert difference[0].max() > 1e-3


def plainly(model: FashionCNN, images: torch.Tensor) -> torch.Tensor:
    """Return the logits, computed plainly: ReLU after each convolution, then pooling, then flattening."""
    x = (images.float() / 255.0 - model.pixel_mean) / model.pixel_std
    for block in ((model.conv1, model.conv2, model.conv3), (model.conv4, model.conv5, model.conv6)):
        for layer in block:
            x = F.relu(layer(x))
        x = F.max_pool2d(x, 2)
    x = F.relu(model.fc2(F.relu(model.fc1(x.flatten(1)))))
    logits: torch.Tensor = model.fc3(x)
    return logits


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_quick_forward_and_its_gradients_are_those_of_the_plain_one(precision: str) -> None:
    torch.manual_seed(0)
    model = place(FashionCNN(pixel_mean=0.3, pixel_std=0.35), torch.device("cpu"))
    images = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    found = []
    for forward in (model, lambda images: plainly(model, images)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = forward(images)
        F.cross_entropy(logits.float(), torch.arange(6)).backward()
        found.append((logits, *(parameter.grad for parameter in model.parameters())))
    # Not bit for bit: convolutions may add in another order if their input has another memory layout.
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for quick, plain in zip(*found, strict=True):
        assert quick is not None
        assert plain is not None
        assert (quick - plain).abs().max() <= tolerance * plain.abs().max()


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (2, 3, 0, 1)])
def test_the_flattening_hands_back_a_gradient_in_the_order_of_its_input(order: tuple[int, ...]) -> None:
    """The values are those of the plain flattening; the memory order spares max-pooling its copies."""
    inverse = [order.index(axis) for axis in range(4)]
    x = torch.randn(3, 8, 7, 7).permute(order).contiguous().permute(inverse)
    weights = torch.randn(3, 8 * 7 * 7)
    gradients = []
    for flatten in (Flatten.apply, lambda tensor: tensor.flatten(1)):
        seen: list[torch.Tensor] = []
        image = x.clone().requires_grad_()
        between = image * 1.0
        between.register_hook(seen.append)
        flat = flatten(between)
        assert torch.equal(flat, x.flatten(1))
        (flat * weights).sum().backward()
        gradients += seen
    quick, plain = gradients
    assert torch.equal(quick, plain)
    assert quick.permute(order).is_contiguous()
    assert not plain.permute(order).is_contiguous()
