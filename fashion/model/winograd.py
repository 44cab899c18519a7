"""3 x 3 convolutions of whole images by Winograd's minimal filtering, which training in fp32 on a CPU uses.

A tile of 7 x 7 outputs takes 9 x 9 multiplications instead of 7 x 7 x 9, 5.4 times fewer (Winograd 1980; Lavin and Gray
2016, arXiv 1509.09308); images of 28 and 14 pixels hold such tiles exactly. Along each axis, a tile's 9 input pixels
and a filter's 3 taps are transformed to values at 9 points, these are multiplied, and the products are transformed to 7
outputs. The multiplications at one pair of points, over all tiles and channels, are one matrix product, and each
transform is a product with a small matrix, so BLAS does all the work.

In memory, pixels come before images and channels (height, width, B, C): a transform along an axis of the image is then
one matrix product whose columns are everything else. Shapes stay torch's (B, C, height, width), and the layers that
follow keep the memory order. Imports torch and numpy only.
"""

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 7
TAPS = 3
# The polynomials are evaluated at these points and at infinity. The set is 0, three pairs of small fractions of both
# signs, and one more. Among such sets it has nearly the smallest rounding error; the one that is better lacks 1, where
# biases are added. A convolution over 128 channels is off by 1.7e-5, root mean square, against 4e-7 of a direct one in
# fp32, 3e-4 in TF32, which GPUs take by default, and 2.4e-3 in bf16.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.75, -0.75, 0.25)
NUM_POINTS = TILE + TAPS - 1  # infinity included
INDEX_OF_ONE = POINTS.index(1.0)
BOTH_AT_ONE = INDEX_OF_ONE * NUM_POINTS + INDEX_OF_ONE  # the pair of points (1, 1), among the 81 pairs
PIXELS_FIRST = (2, 3, 0, 1)  # (B, C, height, width) to (height, width, B, C), and back


def is_quicker(x: Tensor) -> bool:
    """Tell whether to convolve `x` (B, C, size, size) here: in training, in fp32, on a CPU, in a size that tiles fill.

    Evaluation always uses torch's own convolution, so predictions never carry the rounding errors of this one.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-1] % TILE == 0
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str) -> Tensor:
    """Return the convolution (B, out, size, size) of `x` (B, in, size, size) and `weight` (out, in, 3, 3), plus `bias`.

    `padding` is one pixel of `zeros`, `reflect` or `replicate`, as torch names them.
    """
    if x.shape[1] == 1:
        return convolve_one_channel(x, weight, bias, padding)
    y: Tensor = WinogradConvolution.apply(x, weight, bias, padding)
    return y


def convolve_one_channel(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str) -> Tensor:
    """Return the convolution of one input channel as a single matrix product over the nine taps (im2col).

    With one channel, transforming tiles costs more than it saves.
    """
    batch, _, size, _ = x.shape
    mode = "constant" if padding == "zeros" else padding
    padded = F.pad(x, (1, 1, 1, 1), mode=mode).permute(PIXELS_FIRST).contiguous()
    shifts = [padded[row : row + size, column : column + size] for row in range(TAPS) for column in range(TAPS)]
    taps, filters = torch.stack(shifts).view(TAPS * TAPS, -1).T, weight.permute(0, 2, 3, 1).reshape(len(weight), -1).T
    y = taps @ filters if bias is None else torch.addmm(bias, taps, filters)
    return y.view(size, size, batch, len(weight)).permute(PIXELS_FIRST)


def max_pool(x: Tensor) -> Tensor:
    """Return `F.max_pool2d(x, 2)` of `x` (B, C, size, size), in the memory order of `x`.

    torch pools fast where channels are adjacent in memory. Pooling treats images and channels alike, so with pixels
    first in memory, the images' channels are handed to torch as the channels of one image.
    """
    pixels = x.permute(PIXELS_FIRST)
    if not pixels.is_contiguous():
        return F.max_pool2d(x, 2)
    size, _, batch, channels = pixels.shape
    pooled = F.max_pool2d(pixels.view(1, size, size, batch * channels).permute(0, 3, 1, 2), 2)
    return pooled.permute(0, 2, 3, 1).view(size // 2, size // 2, batch, channels).permute(PIXELS_FIRST)


class WinogradConvolution(torch.autograd.Function):
    """The convolution. The backward pass reuses the transformed images and filters of the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: str) -> Tensor:
        """Transform, multiply, transform back; save the transformed images and filters."""
        pixels = x.permute(PIXELS_FIRST).contiguous()
        input_tiles, output_tiles = tiles_of(len(pixels), padding)
        images, filters = transform_tiles(input_tiles, pixels), transform_filters(weight)
        products = torch.bmm(images, filters.mT)
        if bias is not None:
            # Every power of 1 is 1, so a number added at point 1 is added to every output of the tile.
            products[BOTH_AT_ONE] += bias / coefficient_of_one() ** 2
        ctx.save_for_backward(images, filters)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return transform_tiles_back(output_tiles, products, len(pixels)).permute(PIXELS_FIRST)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """Transform the output's gradient once; derive the gradients of input, weight and bias from the result."""
        images, filters = ctx.saved_tensors
        size = gradients[0].shape[-1]
        input_tiles, output_tiles = tiles_of(size, ctx.padding)
        products = transform_tiles(output_tiles, gradients[0].permute(PIXELS_FIRST).contiguous())
        grad_bias = products[BOTH_AT_ONE].sum(0) / coefficient_of_one() ** 2 if ctx.has_bias else None
        grad_weight = transform_filters_back(torch.bmm(products.mT, images))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = transform_tiles_back(input_tiles, torch.bmm(products, filters), size).permute(PIXELS_FIRST)
        return grad_x, grad_weight, grad_bias, None


# --- transforms -----------------------------------------------------------------------------------------------------

Tiles = list[tuple[int, Tensor]]
"""The tiles along one axis: each tile's first pixel, and the matrix (9, pixels) from its pixels to the 9 points."""


def transform_tiles(tiles: Tiles, pixels: Tensor) -> Tensor:
    """Transform `pixels` (size, size, B, C) tile by tile along both axes; return (81, tiles * tiles * B, C).

    Works on one row of tiles at a time, so that the values between the two transforms stay in the CPU's cache.
    """
    size, _, batch, channels = pixels.shape
    columns = batch * channels
    flat, rows = pixels.view(size, -1), pixels.new_empty(NUM_POINTS, size, columns)
    values = pixels.new_empty(NUM_POINTS, NUM_POINTS, len(tiles), len(tiles), columns)
    for down, (top, vertical) in enumerate(tiles):
        torch.mm(vertical, flat[top : top + vertical.shape[1]], out=rows.view(NUM_POINTS, -1))
        for across, (left, horizontal) in enumerate(tiles):
            window = rows[:, left : left + horizontal.shape[1]]
            torch.bmm(horizontal.expand(NUM_POINTS, -1, -1), window, out=values[:, :, across, down])
    return values.view(NUM_POINTS * NUM_POINTS, -1, channels)


def transform_tiles_back(tiles: Tiles, values: Tensor, size: int) -> Tensor:
    """Return (size, size, B, C) of `values` (81, tiles * tiles * B, C): the transpose of `transform_tiles`.

    Where tiles overlap, their contributions are added.
    """
    channels = values.shape[-1]
    values = values.view(NUM_POINTS, NUM_POINTS, len(tiles), len(tiles), -1)
    columns = values.shape[-1]
    pixels, rows = values.new_empty(1, size, size * columns), values.new_empty(NUM_POINTS, size, columns)
    written_down = 0
    for down, (top, vertical) in enumerate(tiles):
        written_across = 0
        for across, (left, horizontal) in enumerate(tiles):
            write_products(rows[:, left:], horizontal, values[:, :, across, down], max(0, written_across - left))
            written_across = left + horizontal.shape[1]
        write_products(pixels[:, top:], vertical, rows.view(1, NUM_POINTS, -1), max(0, written_down - top))
        written_down = top + vertical.shape[1]
    return pixels.view(size, size, -1, channels)


def write_products(window: Tensor, matrix: Tensor, right: Tensor, written: int) -> None:
    """Multiply the transpose of `matrix` (9, n) with each of `right` (batch, 9, columns); write the products to the
    first n rows of `window` (batch, rows, columns). The first `written` rows hold results already and are added to.
    """
    left = matrix.T.contiguous().expand(len(right), -1, -1)
    if written:
        window[:, :written] += torch.bmm(left[:, :written], right)
    torch.bmm(left[:, written:], right, out=window[:, written : left.shape[1]])


def transform_filters(weight: Tensor) -> Tensor:
    """Return the transformed filters (81, out, in) of `weight` (out, in, 3, 3)."""
    matrix, (num_out, num_in) = filter_transform(), weight.shape[:2]
    rows = torch.mm(matrix, weight.permute(PIXELS_FIRST).reshape(TAPS, -1)).view(NUM_POINTS, TAPS, -1)
    return torch.bmm(matrix.expand(NUM_POINTS, -1, -1), rows).view(-1, num_out, num_in)


def transform_filters_back(gradient: Tensor) -> Tensor:
    """Return the gradient (out, in, 3, 3) of the weight, given that of the transformed filters (81, out, in)."""
    matrix, (num_out, num_in) = filter_transform().T.contiguous(), gradient.shape[1:]
    rows = torch.bmm(matrix.expand(NUM_POINTS, -1, -1), gradient.view(NUM_POINTS, NUM_POINTS, -1))
    weight = torch.mm(matrix, rows.view(NUM_POINTS, -1)).view(TAPS, TAPS, num_out, num_in).permute(PIXELS_FIRST)
    # Weights lie channels-last in memory, and so do the buckets of DDP, which hold their gradients.
    return weight.contiguous(memory_format=torch.channels_last)


@functools.cache
def tiles_of(size: int, padding: str) -> tuple[Tiles, Tiles]:
    """Return the tiles of a convolution's input along an axis of `size` pixels, and those of its output.

    An input tile reaches one pixel into each neighbour.
    """
    input_transform, _, output_transform = toom_cook()
    # The pixel whose value the padding repeats before the first pixel and after the last; none for zeros.
    repeated = {"zeros": {}, "reflect": {-1: 1, size: size - 2}, "replicate": {-1: 0, size: size - 1}}[padding]
    input_tiles, output_tiles = [], []
    for start in range(0, size, TILE):
        first, end = max(0, start - 1), min(size, start + TILE + 1)
        matrix = np.zeros((NUM_POINTS, end - first))
        for offset in range(NUM_POINTS):
            pixel = start + offset - 1
            pixel = repeated.get(pixel, pixel)
            if first <= pixel < end:
                matrix[:, pixel - first] += input_transform[:, offset]
        input_tiles.append((first, torch.from_numpy(matrix).float()))
        output_tiles.append((start, torch.from_numpy(output_transform.T).float().contiguous()))
    return input_tiles, output_tiles


@functools.cache
def filter_transform() -> Tensor:
    """Return the matrix (9, 3) from a filter's taps to the points."""
    return torch.from_numpy(toom_cook()[1]).float()


def coefficient_of_one() -> float:
    """Return the factor with which the product at point 1 enters every output."""
    return float(toom_cook()[2][0, INDEX_OF_ONE])


@functools.cache
def toom_cook() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the transforms of one axis: of input (9, 9), of filter (9, 3), and of products to outputs (7, 9).

    They are B^T, G and A^T of Lavin and Gray: interpolation at `POINTS` and infinity (Toom 1963, Cook 1966),
    transposed. The rows of the first two are scaled by powers of two to sums of magnitudes near 1, which keeps rounding
    errors small; the third undoes that.
    """
    nodes = np.array(POINTS)
    input_transform, taps_transform = np.zeros((NUM_POINTS, NUM_POINTS)), np.zeros((NUM_POINTS, TAPS))
    output_transform = np.zeros((TILE, NUM_POINTS))
    for index, node in enumerate(nodes):
        others = np.delete(nodes, index)
        input_transform[index, :-1] = np.poly(others)[::-1] / np.prod(node - others)
    input_transform[-1] = np.poly(nodes)[::-1]
    taps_transform[:-1], taps_transform[-1, -1] = np.vander(nodes, TAPS, increasing=True), 1.0
    output_transform[:, :-1], output_transform[-1, -1] = np.vander(nodes, TILE, increasing=True).T, 1.0
    for matrix in (input_transform, taps_transform):
        scales = 2.0 ** np.round(np.log2(np.abs(matrix).sum(1)))
        matrix /= scales[:, None]
        output_transform *= scales
    return input_transform, taps_transform, output_transform
