"""One rank's batches: shuffled and augmented for training, in order for evaluation."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fashion.config import IMAGE_SIZE
from fashion.model.device import to_device

Batch = tuple[Tensor, Tensor]
"""Images (B, 1, 28, 28) uint8 and labels (B,) int64, on the model's device."""

# Random erasing, Zhong et al. 2017, arXiv 1708.04896: a rectangle's share of the image, and its height over its width.
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 1 / 0.3)


def stream_seed(*key: int) -> int:
    """Return a 63-bit seed for a key such as (seed, epoch, rank, purpose); different keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass(frozen=True)
class Draws:
    """What augmentation draws at random for B images: fields that are not needed are None."""

    flips: Tensor | None = None
    """(B,) float32 in 0..1; an image is mirrored where it is below 0.5."""
    moves: Tensor | None = None
    """(2, B, 1) int64, how far an image moves down and right, from 0 to twice the largest shift."""
    rectangles: Tensor | None = None
    """(5, B) float32 in 0..1: whether an image is erased, then the rectangle's area, ratio and place."""
    noise: Tensor | None = None
    """(B, 1, 28, 28) uint8, what rectangles are filled with."""

    def to(self, device: torch.device) -> "Draws":
        """Return the same on `device`."""
        each = {name: value if value is None else to_device(value, device) for name, value in vars(self).items()}
        return Draws(**each)


def joined(draws: Sequence[Draws]) -> Draws:
    """Return the draws of several batches as those of one, in the same order."""

    def join(name: str, dim: int) -> Tensor | None:
        values = [getattr(each, name) for each in draws]
        return None if values[0] is None else torch.cat(values, dim)

    return Draws(join("flips", 0), join("moves", 1), join("rectangles", 1), join("noise", 0))


def shift_images(images: Tensor, shift: int, moves: Tensor) -> Tensor:
    """Return `images` (B, 1, 28, 28) uint8, each moved by up to `shift` pixels in each direction.

    `moves` are those of `Draws`; pixels that move in are background (0).
    """
    rows, _, height, width = images.shape
    padded = F.pad(images, (shift, shift, shift, shift))
    down = (moves[0] + torch.arange(height, device=images.device)).view(rows, height, 1)
    right = (moves[1] + torch.arange(width, device=images.device)).view(rows, 1, width)
    row = torch.arange(rows, device=images.device).view(rows, 1, 1)
    return padded[row, 0, down, right].unsqueeze(1)


def erase_rectangles(images: Tensor, share: float, rectangles: Tensor, noise: Tensor) -> Tensor:
    """Return `images` (B, 1, 28, 28) uint8, in each of which a rectangle is erased with probability `share`.

    `rectangles` and `noise` are those of `Draws`. The rectangle's area is uniform within `ERASED_AREA` and its ratio
    log-uniform within `ERASED_RATIO`, so that tall and wide ones are equally likely; a side longer than the image is
    clipped. Every place where the rectangle fits is equally likely. It is filled with random values, the fill that the
    paper recommends: a network could learn to recognise a constant.
    """
    rows, _, height, width = images.shape
    chance, area, ratio, down, right = rectangles
    low, high = ERASED_AREA
    pixels = (low + (high - low) * area) * (height * width)
    stretch = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** ratio
    tall = (pixels * stretch).sqrt().round().clamp(1, height) * (chance < share)  # a height of 0 erases nothing
    wide = (pixels / stretch).sqrt().round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    top, left, tall, wide = torch.stack([top, left, tall, wide]).view(4, rows, 1)
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (top <= row) & (row < top + tall), (left <= column) & (column < left + wide)
    inside = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
    return torch.where(inside, noise, images)


@dataclass(frozen=True)
class Augmentation:
    """How to augment training images.

    `flip` is none, random or alternating; `shift` the largest shift in pixels; `erase` the probability, 0..1, with
    which a rectangle of an image is erased.
    """

    flip: str = "none"
    shift: int = 0
    erase: float = 0.0

    def apply(self, images: Tensor, row: Tensor, *, seed: int, epoch: int, generator: torch.Generator) -> Tensor:
        """Return augmented `images` (B, 1, 28, 28) uint8; `row` (B,) int64 holds their row numbers in the shard.

        `generator` is one of the CPU.
        """
        draws = self.draw(len(images), generator).to(images.device)
        return self.augmented(images, to_device(row, images.device), draws, seed=seed, epoch=epoch)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """Return all that is drawn at random for a batch of `rows` images, on the CPU, always in the same order."""
        rectangles = noise = None
        flips = torch.rand(rows, generator=generator) if self.flip == "random" else None
        moves = torch.randint(0, 2 * self.shift + 1, (2, rows, 1), generator=generator) if self.shift else None
        if self.erase:
            rectangles = torch.rand(5, rows, generator=generator)
            # Each int64 drawn makes eight pixels.
            pixels = rows * IMAGE_SIZE**2
            drawn = torch.empty(-(-pixels // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
            noise = drawn.view(torch.uint8)[:pixels].view(rows, 1, IMAGE_SIZE, IMAGE_SIZE)
        return Draws(flips, moves, rectangles, noise)

    def augmented(self, images: Tensor, row: Tensor, draws: Draws, *, seed: int, epoch: int) -> Tensor:
        """Return augmented `images` (B, 1, 28, 28) uint8, given the `draws` of `draw`; all are on the same device.

        An alternating flip tosses a coin per row once and turns it over every epoch, so that two epochs show both views
        (Jordan 2024, arXiv 2404.00498).
        """
        flips = None
        if draws.flips is not None:
            flips = draws.flips < 0.5
        elif self.flip == "alternating":
            # Knuth's multiplicative hash of the row number tosses the coin, so no table of coins is needed.
            coin = ((row + seed) * 2654435761 >> 16) & 1
            flips = (coin + epoch) % 2 == 1
        if flips is not None:
            images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
        if draws.moves is not None:
            images = shift_images(images, self.shift, draws.moves)
        if draws.rectangles is not None and draws.noise is not None:
            # Erased last, so that a rectangle may cover what moved in.
            images = erase_rectangles(images, self.erase, draws.rectangles, draws.noise)
        return images


def is_drawn_at_once(device: torch.device) -> bool:
    """Return whether an epoch's batches are drawn and augmented together, before the first of them."""
    return device.type != "cpu"


def shuffled_batches(
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    num_steps: int,
    augmentation: Augmentation,
    seed: int,
    epoch: int,
    rank: int,
) -> Iterator[Batch]:
    """Yield `num_steps` augmented batches of `batch_size` rows, in an order given by (seed, epoch, rank).

    `images` (N, 1, 28, 28) uint8 and `labels` (N,) int64 are this rank's shard. Every row occurs at most once. On a GPU
    the epoch is drawn, sent and augmented at once, before its first batch: a step then waits for no copy and launches
    nothing for its rows. A CPU makes one batch at a time, which stays in its caches. Both draw the same.
    """
    assert num_steps * batch_size <= len(labels), (num_steps, batch_size, len(labels))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch, rank, 0))
    order = torch.randperm(len(labels), generator=generator)[: num_steps * batch_size]
    draws: Iterable[Draws] = (augmentation.draw(batch_size, generator) for _ in range(num_steps))
    rows = order.view(num_steps, batch_size)
    if is_drawn_at_once(images.device):
        draws = [joined(list(draws)).to(images.device)]
        rows = to_device(order, images.device).unsqueeze(0)
    for row, drawn in zip(rows, draws, strict=True):
        picked = augmentation.augmented(images[row], row, drawn, seed=seed, epoch=epoch)
        yield from zip(torch.split(picked, batch_size), torch.split(labels[row], batch_size), strict=True)


def plain_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[Batch]:
    """Yield all rows in order, in batches of `batch_size`; the last one may be smaller."""
    for start in range(0, len(labels), batch_size):
        yield images[start : start + batch_size], labels[start : start + batch_size]
