"""3 x 3 convolutions of whole images by minimal filtering: what training in fp32 on a CPU takes. Knows torch alone.

Tiles of 7 x 7 outputs, which 28 and 14 pixels hold exactly, come from 9 x 9 products each instead of 7 x 7 x 9: 5.4
times fewer (Winograd 1980; Lavin and Gray 2016, arXiv 1509.09308). The products of one place of all tiles are a product
of matrices, and the transforms before and after are products with small matrices, so all of it is BLAS.

In memory, pixels come before images and channels (height, width, B, C): a transform along an axis of the image is then
a product with everything else as its columns. Shapes stay torch's, (B, C, height, width); what follows keeps the order.
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
PLACES = TILE + TAPS - 1
# Where the polynomials are evaluated, besides infinity. Of the sets of 0, three pairs of small fractions of both signs,
# and one more, it rounds least but for one that lacks 1, where biases enter: a convolution over 128 channels is off by
# 1.7e-5, root mean square, against 4e-7 of a direct one, 3e-4 of TF32, which GPUs take by default, and 2.4e-3 of bf16.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.75, -0.75, 0.25)
ONE = POINTS.index(1.0)
TO_PIXELS = (2, 3, 0, 1)  # (B, C, height, width) to (height, width, B, C), and back


def is_quicker(x: Tensor) -> bool:
    """Whether to convolve `x` (B, C, size, size) here: trained on, in fp32, by a CPU, of a size that tiles fill.

    Evaluation is left to torch: what a network predicts then does not depend on what it is evaluated with.
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
        return convolve_single(x, weight, bias, padding)
    y: Tensor = MinimalFiltering.apply(x, weight, bias, padding)
    return y


def convolve_single(x: Tensor, weight: Tensor, bias: Tensor | None, padding: str) -> Tensor:
    """Return the same for one channel, where tiles would not pay: the nine taps are the rows of one matrix."""
    batch, _, size, _ = x.shape
    padded = F.pad(x, (1, 1, 1, 1), mode="constant" if padding == "zeros" else padding).permute(TO_PIXELS).contiguous()
    shifts = [padded[row : row + size, column : column + size] for row in range(TAPS) for column in range(TAPS)]
    taps, filters = torch.stack(shifts).view(TAPS * TAPS, -1).T, weight.permute(0, 2, 3, 1).reshape(len(weight), -1).T
    y = taps @ filters if bias is None else torch.addmm(bias, taps, filters)
    return y.view(size, size, batch, len(weight)).permute(TO_PIXELS)


def max_pool(x: Tensor) -> Tensor:
    """Return `F.max_pool2d(x, 2)` of (B, C, size, size) in the order in memory that `x` lies in.

    torch pools where channels lie together, and images and channels are alike to it.
    """
    pixels = x.permute(TO_PIXELS)
    if not pixels.is_contiguous():
        return F.max_pool2d(x, 2)
    size, _, batch, channels = pixels.shape
    pooled = F.max_pool2d(pixels.view(1, size, size, batch * channels).permute(0, 3, 1, 2), 2)
    return pooled.permute(0, 2, 3, 1).view(size // 2, size // 2, batch, channels).permute(TO_PIXELS)


class MinimalFiltering(torch.autograd.Function):
    """The convolution, and its gradients from what it transformed already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: str) -> Tensor:
        """Keep the transformed images and filters for the way back."""
        pixels = x.permute(TO_PIXELS).contiguous()
        enter, leave = axes(len(pixels), padding)
        images, filters = spread(enter, pixels), transform_filters(weight)
        products = torch.bmm(images, filters.mT)
        if bias is not None:
            # At 1 every power is 1: what is added to that place of a tile comes out at each of its pixels.
            products[ONE * PLACES + ONE] += bias / share_of_one() ** 2
        ctx.save_for_backward(images, filters)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return gather(leave, products, len(pixels)).permute(TO_PIXELS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        """Transform the gradient once, for all three."""
        images, filters = ctx.saved_tensors
        size = gradients[0].shape[-1]
        enter, leave = axes(size, ctx.padding)
        products = spread(leave, gradients[0].permute(TO_PIXELS).contiguous())
        of_bias = products[ONE * PLACES + ONE].sum(0) / share_of_one() ** 2 if ctx.has_bias else None
        of_weight = transform_filters_back(torch.bmm(products.mT, images))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gather(enter, torch.bmm(products, filters), size).permute(TO_PIXELS)
        return of_x, of_weight, of_bias, None


# --- transforms -----------------------------------------------------------------------------------------------------

Axis = list[tuple[int, Tensor]]
"""The tiles of an axis: where a tile's pixels begin, and the matrix (9, pixels) between them and its places."""


def spread(axis: Axis, pixels: Tensor) -> Tensor:
    """Take `pixels` (size, size, B, C) to the places of their tiles along both axes: (81, tiles * tiles * B, C).

    A row of tiles at a time, whose share of what lies between the two transforms stays in a cache.
    """
    size, _, batch, channels = pixels.shape
    columns = batch * channels
    flat, rows = pixels.view(size, -1), pixels.new_empty(PLACES, size, columns)
    places = pixels.new_empty(PLACES, PLACES, len(axis), len(axis), columns)
    for down, (top, vertical) in enumerate(axis):
        torch.mm(vertical, flat[top : top + vertical.shape[1]], out=rows.view(PLACES, -1))
        for across, (left, horizontal) in enumerate(axis):
            window = rows[:, left : left + horizontal.shape[1]]
            torch.bmm(horizontal.expand(PLACES, -1, -1), window, out=places[:, :, across, down])
    return places.view(PLACES * PLACES, -1, channels)


def gather(axis: Axis, places: Tensor, size: int) -> Tensor:
    """Return (size, size, B, C) of what `spread` returns: its transpose, which adds where tiles overlap."""
    channels = places.shape[-1]
    places = places.view(PLACES, PLACES, len(axis), len(axis), -1)
    columns = places.shape[-1]
    pixels, rows = places.new_empty(1, size, size * columns), places.new_empty(PLACES, size, columns)
    written_down = 0
    for down, (top, vertical) in enumerate(axis):
        written_across = 0
        for across, (left, horizontal) in enumerate(axis):
            put(rows[:, left:], horizontal, places[:, :, across, down], max(0, written_across - left))
            written_across = left + horizontal.shape[1]
        put(pixels[:, top:], vertical, rows.view(1, PLACES, -1), max(0, written_down - top))
        written_down = top + vertical.shape[1]
    return pixels.view(size, size, -1, channels)


def put(window: Tensor, matrix: Tensor, right: Tensor, written: int) -> None:
    """Put the products of the transpose of `matrix` (9, n) and each of `right` (batch, 9, columns) to the first n rows
    of `window` (batch, rows, columns): the first `written` of them are added to what is there, others replace it.
    """
    left = matrix.T.contiguous().expand(len(right), -1, -1)
    if written:
        window[:, :written] += torch.bmm(left[:, :written], right)
    torch.bmm(left[:, written:], right, out=window[:, written : left.shape[1]])


def transform_filters(weight: Tensor) -> Tensor:
    """Return (81, out, in) of `weight` (out, in, 3, 3)."""
    matrix, (num_out, num_in) = filter_transform(), weight.shape[:2]
    rows = torch.mm(matrix, weight.permute(TO_PIXELS).reshape(TAPS, -1)).view(PLACES, TAPS, -1)
    return torch.bmm(matrix.expand(PLACES, -1, -1), rows).view(-1, num_out, num_in)


def transform_filters_back(places: Tensor) -> Tensor:
    """Return the gradient (out, in, 3, 3) of the weight from that of `transform_filters`, (81, out, in)."""
    matrix, (num_out, num_in) = filter_transform().T.contiguous(), places.shape[1:]
    rows = torch.bmm(matrix.expand(PLACES, -1, -1), places.view(PLACES, PLACES, -1))
    weight = torch.mm(matrix, rows.view(PLACES, -1)).view(TAPS, TAPS, num_out, num_in).permute(TO_PIXELS)
    # The order that weights lie in, and DDP's buckets with them.
    return weight.contiguous(memory_format=torch.channels_last)


@functools.cache
def axes(size: int, padding: str) -> tuple[Axis, Axis]:
    """Return the axis of a convolution's `size` pixels, whose tiles see two pixels of their neighbours, and that of its
    outputs.
    """
    to_places, _, to_outputs = toom_cook()
    # The pixel that stands for what lies before the first and after the last; none where zeros do.
    beyond = {"zeros": {}, "reflect": {-1: 1, size: size - 2}, "replicate": {-1: 0, size: size - 1}}[padding]
    enter, leave = [], []
    for start in range(0, size, TILE):
        first, last = max(0, start - 1), min(size, start + TILE + 1)
        matrix = np.zeros((PLACES, last - first))
        for offset in range(PLACES):
            pixel = start + offset - 1
            pixel = beyond.get(pixel, pixel)
            if first <= pixel < last:
                matrix[:, pixel - first] += to_places[:, offset]
        enter.append((first, torch.from_numpy(matrix).float()))
        leave.append((start, torch.from_numpy(to_outputs.T).float().contiguous()))
    return enter, leave


@functools.cache
def filter_transform() -> Tensor:
    """Return what takes three taps to their places (9, 3)."""
    return torch.from_numpy(toom_cook()[1]).float()


def share_of_one() -> float:
    """Return what every output takes of the place of point 1."""
    return float(toom_cook()[2][0, ONE])


@functools.cache
def toom_cook() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the transforms of one axis: of pixels (9, 9), of taps (9, 3), and of products to outputs (7, 9).

    By interpolation at `POINTS` and infinity (Toom 1963, Cook 1966), transposed, as Lavin and Gray have it. Pixels and
    taps are scaled per place, by powers of two, to sums of magnitudes near 1; outputs are scaled back.
    """
    nodes = np.array(POINTS)
    pixels, taps = np.zeros((PLACES, PLACES)), np.zeros((PLACES, TAPS))
    outputs = np.zeros((TILE, PLACES))
    for place, node in enumerate(nodes):
        others = np.delete(nodes, place)
        pixels[place, :-1] = np.poly(others)[::-1] / np.prod(node - others)
    pixels[-1] = np.poly(nodes)[::-1]
    taps[:-1], taps[-1, -1] = np.vander(nodes, TAPS, increasing=True), 1.0
    outputs[:, :-1], outputs[-1, -1] = np.vander(nodes, TILE, increasing=True).T, 1.0
    for matrix in (pixels, taps):
        scales = 2.0 ** np.round(np.log2(np.abs(matrix).sum(1)))
        matrix /= scales[:, None]
        outputs *= scales
    return pixels, taps, outputs
