"""The network: 3 x 3 convolutions in two blocks, then three linear layers; 7,001,194 parameters. And deeper variants.

The network takes raw uint8 images and returns logits. It normalises the pixels itself, and the constants for that are
saved with the weights, so a checkpoint needs nothing else.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fashion.config import IMAGE_SIZE, NUM_CLASSES, Depth, Padding
from fashion.model import emulated_bf16, winograd
from fashion.model.dropout import Dropout
from fashion.model.emulated_bf16 import Linear

NUM_PARAMETERS: dict[Depth, int] = {"vgg": 7_001_194, "deep": 7_628_202, "deep-bn": 7_630_122}
NUM_CONVOLUTIONS: dict[Depth, int] = {"vgg": 6, "deep": 8, "deep-bn": 8}

PaddingMode = Literal["zeros", "reflect", "replicate"]


class Conv2d(nn.Conv2d):
    """A 3 x 3 convolution, stride 1, with one pixel of padding.

    In training in fp32 on a CPU, minimal filtering (`winograd`) computes it, which is faster there.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: PaddingMode = "zeros") -> None:
        """Make a layer; `padding` is torch's `padding_mode`."""
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, padding_mode=padding)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, size, size) to (B, out, size, size)."""
        return self.convolve(input, self.bias)

    def convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of `x`, plus `bias` (out,) if there is one."""
        if winograd.is_quicker(x):
            return winograd.convolve(x, self.weight, bias, self.padding_mode)
        if emulated_bf16.is_needed(x):
            return emulated_bf16.in_fp32(self._conv_forward, x, self.weight, bias)
        y: Tensor = self._conv_forward(x, self.weight, bias)
        return y


class PartialConv2d(Conv2d):
    """A 3 x 3 convolution that treats pixels beyond the border as missing rather than as zero.

    The output without bias is multiplied by (taps of the kernel) / (taps inside the image): 1 inside, 9/6 along an
    edge, 9/4 in a corner. Partial-convolution padding, Liu et al. 2018, arXiv 1811.11718.
    """

    ratio: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        """Make a layer for square inputs of `size` pixels."""
        super().__init__(in_channels, out_channels)
        valid_taps = F.conv2d(torch.ones(1, 1, size, size), torch.ones(1, 1, 3, 3), padding=1)
        # Not persistent: the shape determines it, and so a checkpoint loads under every padding mode.
        self.register_buffer("ratio", 9.0 / valid_taps, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in, size, size) to (B, out, size, size)."""
        assert self.bias is not None
        output = self.convolve(input, None)
        return output * self.factors().to(output.dtype) + self.bias.to(output.dtype).view(1, -1, 1, 1)

    def factors(self) -> Tensor:
        """Return what the output without bias is multiplied by, (1, 1, size, size)."""
        return self.ratio


class LearnedConv2d(PartialConv2d):
    """A 3 x 3 convolution that learns by what its outputs at the border are multiplied.

    The factors are 1 inside, `border[0]` along an edge and `border[1]` in a corner. Both start at 1, which is zero
    padding; 9/6 and 9/4 would be partial convolution. `training.optimizer.build_optimizer` excludes them from weight
    decay, which would pull them towards 0.
    """

    position_masks: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        """Make a layer for square inputs of `size` pixels, at least 2."""
        super().__init__(in_channels, out_channels, size)
        self.border = nn.Parameter(torch.ones(2))
        masks = torch.cat([self.ratio == 9.0 / taps for taps in (9.0, 6.0, 4.0)])  # (3, 1, size, size)
        self.register_buffer("position_masks", masks.float(), persistent=False)

    def factors(self) -> Tensor:
        """Return what the output without bias is multiplied by, (1, size, size)."""
        # Exactly one mask is 1 at each pixel, so the sum is exact. Indexing `border` instead would make its gradient
        # a scatter, for which a GPU has to sort the indices.
        inside, edge, corner = self.position_masks
        factors: Tensor = inside + edge * self.border[0] + corner * self.border[1]
        return factors


def conv(in_channels: int, out_channels: int, size: int, padding: Padding) -> nn.Conv2d:
    """Return a 3 x 3 convolution, stride 1, one pixel of `padding`, for square inputs of `size` pixels."""
    if padding == "partial":
        return PartialConv2d(in_channels, out_channels, size)
    if padding == "learned":
        return LearnedConv2d(in_channels, out_channels, size)
    return Conv2d(in_channels, out_channels, padding)


class FashionCNN(nn.Module):
    """The classifier: (B, 1, 28, 28) uint8 images to (B, 10) logits.

    `pixel_mean` and `pixel_std` are those of the training pixels, in 0..1. `deep` ends each block with one more
    convolution of the same width; `deep-bn` also normalises each convolution's output over the batch.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        pixel_mean: float,
        pixel_std: float,
        dropout_conv: float = 0.0,
        dropout_fc: float = 0.0,
        padding: Padding = "zeros",
        depth: Depth = "vgg",
    ) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean))
        self.register_buffer("pixel_std", torch.tensor(pixel_std))
        full, half = IMAGE_SIZE, IMAGE_SIZE // 2
        self.conv1 = conv(1, 32, full, padding)
        self.conv2 = conv(32, 32, full, padding)
        self.conv3 = conv(32, 64, full, padding)
        self.conv4 = conv(64, 128, half, padding)
        self.conv5 = conv(128, 128, half, padding)
        self.conv6 = conv(128, 256, half, padding)
        deeper = depth != "vgg"
        self.conv3b = conv(64, 64, full, padding) if deeper else None
        self.conv6b = conv(256, 256, half, padding) if deeper else None
        widths = {"conv1": 32, "conv2": 32, "conv3": 64, "conv4": 128, "conv5": 128, "conv6": 256}
        widths |= {"conv3b": 64, "conv6b": 256}
        self.norms = nn.ModuleDict({k: nn.BatchNorm2d(w) for k, w in widths.items()} if depth == "deep-bn" else {})
        self.fc1 = Linear(256 * 7 * 7, 512)
        self.fc2 = Linear(512, 64)
        self.fc3 = Linear(64, NUM_CLASSES)
        self.dropout_conv = Dropout(dropout_conv)
        self.dropout_fc = Dropout(dropout_fc)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 10) of `images` (B, 1, 28, 28) uint8."""
        x = (images.float() / 255.0 - self.pixel_mean) / self.pixel_std
        x = x.contiguous(memory_format=torch.channels_last)
        x = self._convolve("conv1", x)  # (B, 32, 28, 28)
        x = self.dropout_conv(self._convolve("conv2", x))
        x = self.dropout_conv(self._convolve_and_pool("conv3", "conv3b", x))  # (B, 64, 14, 14)
        x = self._convolve("conv4", x)  # (B, 128, 14, 14)
        x = self._convolve("conv5", x)
        x = self.dropout_conv(self._convolve_and_pool("conv6", "conv6b", x))  # (B, 256, 7, 7)
        x = Flatten.apply(x) if x.requires_grad else x.flatten(1)  # (B, 12544)
        x = self.dropout_fc(F.relu(self.fc1(x)))
        x = self.dropout_fc(F.relu(self.fc2(x)))
        logits: Tensor = self.fc3(x)
        return logits

    def _convolve(self, name: str, x: Tensor) -> Tensor:
        """Apply the convolution `name`, its batch normalisation if any, and ReLU."""
        return F.relu(self._pre_activation(name, x))

    def _pre_activation(self, name: str, x: Tensor) -> Tensor:
        """Apply the convolution `name` and its batch normalisation if any."""
        x = getattr(self, name)(x)
        normalised: Tensor = self.norms[name](x) if name in self.norms else x
        return normalised

    def _convolve_and_pool(self, name: str, extra: str, x: Tensor) -> Tensor:
        """End a block: the convolution `name`, in deeper variants the convolution `extra` too, and 2 x 2 max-pooling.

        The last ReLU is applied after the pooling, to a quarter of the elements: ReLU is monotonic, so the result and
        the gradients are the same.
        """
        if getattr(self, extra) is not None:
            x, name = self._convolve(name, x), extra
        return F.relu(winograd.max_pool(self._pre_activation(name, x)))


class Flatten(torch.autograd.Function):
    """`x.flatten(1)` whose gradient has the memory layout of `x`.

    Given a gradient of another layout, the backward pass of max-pooling would copy its indices and its result twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C * H * W)."""
        ctx.like = torch.empty_like(x, device="meta")
        return x.flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient (B, C, H, W) of `x`."""
        (gradient,) = gradients
        ordered = gradient.new_empty_strided(ctx.like.shape, ctx.like.stride())
        return ordered.copy_(gradient.view(ctx.like.shape))


def initialise(model: FashionCNN, init: str) -> None:
    """Initialise the weights by the scheme `init` (`TrainConfig.init`), with torch's global generator.

    `torch`: the layers keep the weights that they were made with. `glorot`: Glorot and Bengio 2010, uniform, zero
    biases, as Keras does by default. `he`: He et al. 2015, normal, zero biases, and the last layer scaled by 0.3 so
    that the first logits are small.
    """
    if init == "torch":
        return
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if init == "glorot":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    if init == "he":
        with torch.no_grad():
            model.fc3.weight.mul_(0.3)


def place(model: FashionCNN, device: torch.device) -> FashionCNN:
    """Move `model` to `device` with channels-last weights, for which convolutions are fastest on CPU and GPU alike."""
    return model.to(memory_format=torch.channels_last).to(device)


def num_parameters(depth: Depth, padding: Padding) -> int:
    """Return the number of trainable parameters of a variant; learned padding adds two per convolution."""
    return NUM_PARAMETERS[depth] + (2 * NUM_CONVOLUTIONS[depth] if padding == "learned" else 0)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
