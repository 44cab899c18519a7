"""Decodes one image of a user's, a PNG or JPEG file of any kind, into 28 x 28 grey pixels.

Size and kind are read from the header before a pixel is decoded, so an image that promises much costs no memory.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fashion.config import IMAGE_SIZE, printable
from fashion.data.images.photograph import NoGarment, garment_pixels

MAX_BYTES = 100 << 20
"""Most bytes of a file, or of a cell of a table, that holds one image."""
MAX_PIXELS = 50_000_000
"""Most pixels of an image: 150 to 200 MB while it is decoded."""
MAGIC = (b"\x89PNG", b"\xff\xd8\xff")
"""First bytes of PNG and JPEG files."""
# A JPEG is decoded at a half, a quarter or an eighth of its size, as long as each side keeps this many pixels.
JPEG_SIDE = 600
# Grey levels of an image with 16 bits that are one level with 8.
LEVELS_16_BIT = 257


class Unreadable(ValueError):
    """An image that cannot be read. The message is a phrase that says why, and what to do if anything can be done."""


def decode_image(data: bytes, *, photo: bool = False) -> NDArray[np.uint8]:
    """Return an image file's content as the pixels (28, 28) uint8 that the network sees, bright clothing on black.

    Without `photo` the image must have 28 x 28 pixels. Grey ones are taken as they are, colours become grey by ITU-R
    601, and what is transparent becomes black. With `photo` it is a photograph of a garment on a light ground, of any
    size: see `garment_pixels`; what is transparent becomes white. An orientation in the EXIF data is applied.

    Raises `Unreadable`.
    """
    if not data:
        raise Unreadable("it is empty")
    if len(data) > MAX_BYTES:
        raise Unreadable(f"it takes more than {MAX_BYTES >> 20} MiB; make it smaller")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            check_header(image, photo)
            if photo:
                image.draft(None, (JPEG_SIDE, JPEG_SIDE))
            opaque = without_alpha(ImageOps.exif_transpose(image), ground=255 if photo else 0)
            return garment_pixels(opaque) if photo else np.asarray(opaque.convert("L"))
    except (Unreadable, NoGarment) as error:
        raise Unreadable(str(error)) from None
    except UnidentifiedImageError:
        told = "damaged (its header)" if data.startswith(MAGIC) else "neither a PNG nor a JPEG file; save it as one"
        raise Unreadable(f"it is {told}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unreadable(f"it has more than {MAX_PIXELS:,} pixels; make it smaller") from None
    except Exception as error:
        # Pillow promises no closed set of errors: odd EXIF data, for one, give an AttributeError. One image must not
        # end a job on a million of them.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"it is damaged ({printable(reason)[:100]})") from error


def check_header(image: Image.Image, photo: bool) -> None:
    """Raise `Unreadable` if an image that is open, but not decoded yet, is of a size or kind that is not taken."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unreadable(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    # A JPEG of several pictures (MPO) holds the photograph first, then previews or the view of a second lens.
    frames = getattr(image, "n_frames", 1) if image.format == "PNG" else 1
    if frames > 1:
        raise Unreadable(f"it is an animation of {frames} pictures; save one of them")
    if not photo and image.size != (IMAGE_SIZE, IMAGE_SIZE):
        size = f"{IMAGE_SIZE} x {IMAGE_SIZE}"
        raise Unreadable(f"it has {width} x {height} pixels, not {size}; --photo takes photographs of any size")


def without_alpha(image: Image.Image, ground: int) -> Image.Image:
    """Return an image with 8 bits in grey or in RGB; what is transparent shows the grey level `ground`."""
    if image.mode.startswith("I"):
        levels = (np.asarray(image, dtype=np.uint32) + LEVELS_16_BIT // 2) // LEVELS_16_BIT
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        below = Image.new("RGBA", colours.size, (ground, ground, ground, 255))
        return Image.alpha_composite(below, colours).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")
