"""One rank's batches: shuffled and augmented for training, in order for evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Batch = tuple[Tensor, Tensor]
"""Images (B, 1, 28, 28) uint8 and labels (B,) int64, on the model's device."""

# Random erasing, Zhong et al. 2017, arXiv 1708.04896: a rectangle's share of the image, and its height over its width.
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 1 / 0.3)


def stream_seed(*key: int) -> int:
    """Return a 63-bit seed for a key such as (seed, epoch, rank, purpose); different keys give independent streams."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def augment(images: Tensor, flips: Tensor | None, shift: int, generator: torch.Generator) -> Tensor:
    """Return `images` (B, 1, 28, 28) uint8, mirrored where `flips` (B,) bool is set, and shifted at random.

    Each image moves by up to `shift` pixels in each direction; pixels that move in are background (0).
    """
    if flips is not None:
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        rows, _, height, width = images.shape
        padded = F.pad(images, (shift, shift, shift, shift))
        moves = torch.randint(0, 2 * shift + 1, (2, rows, 1), generator=generator).to(images.device)
        down = (moves[0] + torch.arange(height, device=images.device)).view(rows, height, 1)
        right = (moves[1] + torch.arange(width, device=images.device)).view(rows, 1, width)
        row = torch.arange(rows, device=images.device).view(rows, 1, 1)
        images = padded[row, 0, down, right].unsqueeze(1)
    return images


def erase_rectangles(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return `images` (B, 1, 28, 28) uint8, in each of which a rectangle is erased with probability `share`.

    The rectangle's area is uniform within `ERASED_AREA` and its ratio log-uniform within `ERASED_RATIO`, so that tall
    and wide ones are equally likely; a side longer than the image is clipped. Every place where the rectangle fits is
    equally likely. It is filled with random values, the fill that the paper recommends: a network could learn to
    recognise a constant.
    """
    rows, _, height, width = images.shape
    chance, area, ratio, down, right = torch.rand(5, rows, generator=generator)
    low, high = ERASED_AREA
    pixels = (low + (high - low) * area) * (height * width)
    stretch = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** ratio
    tall = (pixels * stretch).sqrt().round().clamp(1, height) * (chance < share)  # a height of 0 erases nothing
    wide = (pixels / stretch).sqrt().round().clamp(1, width)
    top, left = (down * (height - tall + 1)).floor(), (right * (width - wide + 1)).floor()
    top, left, tall, wide = torch.stack([top, left, tall, wide]).to(images.device).view(4, rows, 1)
    row, column = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (top <= row) & (row < top + tall), (left <= column) & (column < left + wide)
    inside = (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
    # Each int64 drawn makes eight pixels.
    noise = torch.empty(-(-images.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    fill = noise.view(torch.uint8)[: images.numel()].view(images.shape).to(images.device)
    return torch.where(inside, fill, images)


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

        An alternating flip tosses a coin per row once and turns it over every epoch, so that two epochs show both views
        (Jordan 2024, arXiv 2404.00498).
        """
        flips = None
        if self.flip == "random":
            flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        elif self.flip == "alternating":
            # Knuth's multiplicative hash of the row number tosses the coin, so no table of coins is needed.
            coin = ((row + seed) * 2654435761 >> 16) & 1
            flips = ((coin + epoch) % 2 == 1).to(images.device)
        images = augment(images, flips, self.shift, generator)
        # Erased last, so that a rectangle may cover what moved in. With `erase` 0, nothing more is drawn.
        return erase_rectangles(images, self.erase, generator) if self.erase else images


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

    `images` (N, 1, 28, 28) uint8 and `labels` (N,) int64 are this rank's shard. Every row occurs at most once.
    """
    assert num_steps * batch_size <= len(labels), (num_steps, batch_size, len(labels))
    generator = torch.Generator().manual_seed(stream_seed(seed, epoch, rank, 0))
    order = torch.randperm(len(labels), generator=generator)[: num_steps * batch_size]
    for row in order.view(num_steps, batch_size):
        index = row.to(images.device)
        picked = augmentation.apply(images[index], row, seed=seed, epoch=epoch, generator=generator)
        yield picked, labels[index]


def plain_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[Batch]:
    """Yield all rows in order, in batches of `batch_size`; the last one may be smaller."""
    for start in range(0, len(labels), batch_size):
        yield images[start : start + batch_size], labels[start : start + batch_size]
