"""Photographs drawn from images of the data set: enlarged, on a light ground, in colour, off centre."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


def content(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Return an image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Scene:
    """How a garment is photographed."""

    size: tuple[int, int]
    """Width and height in pixels."""
    ground: Sequence[float]
    """Red, green and blue of the ground, 0 to 255."""
    box: tuple[int, int, int, int]
    """Where the garment's 28 x 28 pixels come to lie: left, top, right, bottom."""
    tint: Sequence[float] = (1.0, 1.0, 1.0)
    """Share of each colour that the garment takes away."""


def photograph(garment: np.ndarray, scene: Scene) -> Image.Image:
    """Return a photograph of `garment` (28, 28) uint8, bright on black; there it is dark, on a light ground."""
    left, top, right, bottom = scene.box
    enlarged = Image.fromarray(garment).resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    picture = np.ones((scene.size[1], scene.size[0], 3)) * np.array(scene.ground)
    picture[top:bottom, left:right] *= 1 - np.asarray(enlarged)[..., None] / 255 * np.array(scene.tint)
    return Image.fromarray(picture.clip(0, 255).round().astype(np.uint8))


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a photograph of 300 to 900 pixels a side, whose garment takes 50 to 95 % of the shorter one."""
    width, height = rng.integers(300, 901, 2).tolist()
    side = int(min(width, height) * rng.uniform(0.5, 0.95))
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    ground = rng.uniform(225, 255) - rng.uniform(0, 12, 3)
    tint = rng.uniform(0.75, 1.0, 3)
    # The weights of ITU-R 601: the garment is as dark as before, and has a colour.
    tint = (tint / (tint @ [0.299, 0.587, 0.114])).clip(0, 1)
    return Scene((width, height), ground.tolist(), (left, top, left + side, top + side), tint.tolist())
