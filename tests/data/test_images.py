"""A user's images: every kind of file is read as it looks, or told why it cannot be; listings, columns of Parquet."""

import os
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photographs import Scene, content, photograph
from PIL import Image
from pyarrow import fs as pafs

from fashion.config import UserError
from fashion.data.images.columns import MOST_FILES, decode_cells, open_parquet, read_cells
from fashion.data.images.decoding import MAX_PIXELS, Unreadable, decode_image
from fashion.data.images.globs import Glob, glob_of_uri, glob_regex
from fashion.data.images.listing import Listing, list_images
from fashion.data.images.reading import read_images

PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
GREY = Image.fromarray(PIXELS)


def smooth() -> Image.Image:
    """An image that JPEG keeps within a few levels."""
    return Image.fromarray(np.add.outer(np.arange(28) * 5, np.arange(28) * 3).astype(np.uint8))


def with_alpha(alpha: int) -> Image.Image:
    image = GREY.convert("RGBA")
    image.putalpha(alpha)
    return image


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return content(smooth(), "JPEG", quality=100, exif=exif)


def png_that_promises(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# --- one image ------------------------------------------------------------------------------------------------------

EXACT = {
    "grey": (content(GREY), PIXELS),
    "colour": (content(GREY.convert("RGB")), PIXELS),
    "palette": (content(GREY.convert("P")), PIXELS),
    "black and white": (content(GREY.convert("1", dither=Image.Dither.NONE)), np.where(PIXELS > 127, 255, 0)),
    "16 bit": (content(Image.fromarray(PIXELS.astype(np.uint16) * 257)), PIXELS),
    "16 bit, rounded": (content(Image.fromarray(PIXELS.astype(np.uint16).clip(1) * 257 - 128)), PIXELS.clip(1)),
    "opaque": (content(with_alpha(255)), PIXELS),
    "grey with alpha": (content(GREY.convert("LA")), PIXELS),
    "transparent": (content(with_alpha(0)), np.zeros_like(PIXELS)),
    "a transparent colour": (content(Image.new("L", (28, 28), 7), transparency=7), np.zeros_like(PIXELS)),
    "interlaced": (content(GREY, interlace=1), PIXELS),
    "a comment": (content(GREY) + b"trailing", PIXELS),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_png_of_any_kind_is_read_as_it_looks(kind: str) -> None:
    data, expected = EXACT[kind]
    assert np.array_equal(decode_image(data), expected)


def test_green_weighs_more_than_blue() -> None:
    """ITU-R 601: 0.299 R + 0.587 G + 0.114 B."""
    for colour, grey in (((255, 0, 0), 76), ((0, 255, 0), 150), ((0, 0, 255), 29)):
        assert (decode_image(content(Image.new("RGB", (28, 28), colour))) == grey).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_of_any_kind_is_read_as_it_looks(mode: str) -> None:
    image = smooth()
    found = decode_image(content(image.convert(mode), "JPEG", quality=100, subsampling=0)).astype(int)
    assert np.abs(found - np.asarray(image)).max() <= 4


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_a_picture_is_turned_as_its_camera_says(orientation: int, turns: int) -> None:
    """EXIF: 6 is to be turned by 90 degrees clockwise, which is three times 90 degrees the other way."""
    expected = np.rot90(decode_image(content(smooth(), "JPEG", quality=100)), turns)
    assert np.array_equal(decode_image(with_orientation(orientation)), expected)


def with_a_maker_of_numbers() -> bytes:
    """A JPEG that is to be turned, and whose EXIF data give the camera's maker as a number."""
    header = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2)
    entries = struct.pack("<HHIf", 0x010F, 11, 1, 1.5) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    return content(smooth(), "JPEG", exif=header + entries + bytes(4))


UNREADABLE = {
    "EXIF data that Pillow cannot write": (with_a_maker_of_numbers(), "it is damaged"),
    "empty": (b"", "it is empty"),
    "HTML": (b"<html><body>404 Not Found</body></html>", "neither a PNG nor a JPEG file"),
    "GIF": (content(GREY, "GIF"), "neither a PNG nor a JPEG file"),
    "text": ("héllo".encode("utf-16"), "neither a PNG nor a JPEG file"),
    "a header alone": (content(GREY)[:8], "it is damaged"),
    "half a PNG": (content(GREY)[:300], "it is damaged (image file is truncated"),
    "half a JPEG": (content(GREY, "JPEG")[:500], "it is damaged"),
    "a wrong sum": (content(GREY).replace(b"IDAT", b"IDAS"), "it is damaged"),
    "an animation": (
        content(GREY, save_all=True, append_images=[smooth()]),
        "it is an animation of 2 pictures; save one of them",
    ),
    "another size": (content(Image.new("L", (300, 200))), "it has 300 x 200 pixels, not 28 x 28; --photo takes"),
    "a row too few": (content(Image.new("L", (28, 27))), "it has 28 x 27 pixels, not 28 x 28"),
    "a bomb": (png_that_promises(60_000, 60_000), "more than 50,000,000"),
    "just too large": (png_that_promises(MAX_PIXELS // 1000 + 1, 1000), "pixels, more than 50,000,000"),
    "between": (png_that_promises(12_000, 9000), "more than 50,000,000"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_says_why(kind: str) -> None:
    data, told = UNREADABLE[kind]
    with pytest.raises(Unreadable) as error:
        decode_image(data)
    assert told in str(error.value)
    assert len(str(error.value)) < 200 and str(error.value).isprintable()


NO_PHOTOGRAPHS = {
    "a dark ground": (content(GREY.point(lambda level: level // 4)), "its ground is dark (level"),
    "nothing": (content(Image.new("RGB", (640, 480), (250, 250, 250))), "it shows one colour alone"),
    "an animation": UNREADABLE["an animation"],
    "a bomb": UNREADABLE["a bomb"],
    "just too large": UNREADABLE["just too large"],
    "HTML": UNREADABLE["HTML"],
    "half a JPEG": UNREADABLE["half a JPEG"],
}


@pytest.mark.parametrize("kind", NO_PHOTOGRAPHS)
def test_what_is_no_photograph_of_a_garment_says_why(kind: str) -> None:
    data, told = NO_PHOTOGRAPHS[kind]
    with pytest.raises(Unreadable) as error:
        decode_image(data, photo=True)
    assert told in str(error.value)


# --- photographs ----------------------------------------------------------------------------------------------------


def square(size: int, ground: tuple[int, int, int], box: tuple[int, int, int, int]) -> Scene:
    """A square photograph with a garment of no colour."""
    return Scene((size, size), ground, box)


def garment() -> np.ndarray:
    """A pair of trousers: two legs of two shades that fill the height, black on both sides."""
    image = np.zeros((28, 28), np.uint8)
    image[:, 8:13], image[:, 15:20], image[:4, 8:20] = 180, 220, 200
    return image


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("ground", [(255, 255, 255), (253, 253, 253), (240, 232, 220)])
def test_a_photograph_becomes_what_the_data_set_holds(form: str, ground: tuple[int, int, int]) -> None:
    picture = photograph(garment(), square(700, ground, (50, 120, 500, 570)))
    found = decode_image(content(picture, form), photo=True).astype(int)
    assert found.shape == (28, 28)
    assert (found[:, :6] <= 8).all() and (found[:, 22:] <= 8).all(), "the ground is black"
    rows, columns = np.flatnonzero((found > 60).any(1)), np.flatnonzero((found > 60).any(0))
    assert (rows[0], rows[-1]) == (0, 27), "the longest edge is 28 pixels"
    assert abs(columns[0] - (27 - columns[-1])) <= 1, "it is centred"
    inside = np.abs(found - garment())[6:26, 9:11]
    assert inside.max() <= 10, "away from outlines it keeps its shade"


def test_a_photograph_on_its_side_is_turned() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photograph(garment(), square(600, (250, 250, 250), (0, 0, 600, 600)))
    lying = upright.rotate(90, expand=True)
    found = decode_image(content(lying, "JPEG", exif=exif, quality=95), photo=True).astype(int)
    assert np.abs(found - decode_image(content(upright, "JPEG", quality=95), photo=True)).max() <= 12


def test_what_is_transparent_is_ground_in_a_photograph() -> None:
    picture = photograph(garment(), square(300, (255, 255, 255), (0, 0, 300, 300)))
    expected = decode_image(content(picture), photo=True)
    picture.putalpha(Image.fromarray(np.where(np.asarray(picture).min(2) > 250, 0, 255).astype(np.uint8)))
    black = Image.composite(picture, Image.new("RGBA", picture.size, (0, 0, 0, 0)), picture.getchannel("A"))
    assert np.abs(decode_image(content(black), photo=True).astype(int) - expected).max() <= 12


# --- listings -------------------------------------------------------------------------------------------------------

TREE = (
    "b.png",
    "a.JPG",
    "c.jpeg",
    "notes.txt",
    ".hidden.png",
    ".cache/d.png",
    "sub/e.png",
    "sub/deep/f.png",
    "x[1].png",
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for name in TREE:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(GREY))
    return folder


def names(listing: Listing) -> list[str]:
    return [os.fsdecode(name) for name in listing.names.to_pylist()]


LISTED = {
    ".": ["a.JPG", "b.png", "c.jpeg", "x[1].png", "sub/e.png", "sub/deep/f.png"],
    "sub": ["e.png", "deep/f.png"],
    "notes.txt": ["notes.txt"],
    ".hidden.png": [".hidden.png"],
    "*.png": ["b.png", "x[1].png"],
    "*": ["a.JPG", "b.png", "c.jpeg", "notes.txt", "x[1].png"],
    "**/*.png": ["b.png", "x[1].png", "sub/e.png", "sub/deep/f.png"],
    "sub/**": ["e.png", "deep/f.png"],
    "*/e.*": ["sub/e.png"],
    "[a-c].*": ["a.JPG", "b.png", "c.jpeg"],
    "[!a]*.[jp]*": ["b.png", "c.jpeg", "x[1].png"],
    "x[1].png": ["x[1].png"],
    ".*.png": [".hidden.png"],
    ".c*/*": [".cache/d.png"],
    "**/.cache/*": [".cache/d.png"],
}


@pytest.mark.parametrize("named", LISTED)
def test_files_are_listed_in_the_order_of_their_names(named: str, tree: Path) -> None:
    listing = list_images(str(tree / named))
    assert names(listing) == LISTED[named]
    assert listing.kind == "files" and len(listing) == len(LISTED[named])
    assert listing.num_others == (1 if named == "." else 0)
    assert all(Path(listing.file(number)).read_bytes() for number in range(len(listing)))
    assert [Path(listing.path(number)) for number in range(len(listing))] == [
        Path(listing.file(number)) for number in range(len(listing))
    ]


def test_a_glob_leaves_other_names_alone() -> None:
    for pattern, matched, other in (
        ("a?c.png", "abc.png", "a/c.png"),
        ("a.png", "a.png", "aXpng"),
        ("[]a]", "]", "b"),
        ("**/b", "b", "xb"),
        ("a/**/b", "a/c/d/b", "a/.c/b"),
        ("[^-]", "^", "x"),
    ):
        assert re.fullmatch(glob_regex(pattern), matched), pattern
        assert not re.fullmatch(glob_regex(pattern), other), pattern


@pytest.mark.parametrize(
    ("named", "listed"),
    [
        ("my%20photos", ["a b.png", "a%.png", "x[1].png"]),
        ("my%20photos/a%20b.png", ["a b.png"]),
        ("my%20photos/a%20*.png", ["a b.png"]),
        ("my%20photos/x%5B1%5D*", ["x[1].png"]),
        ("my%20photo*/a%25.png", ["my photos/a%.png"]),
        ("m*/a%20[b]*", ["my photos/a b.png"]),
    ],
)
def test_names_in_a_uri_are_escaped(named: str, listed: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    for name in ("a b.png", "a%.png", "x[1].png"):
        (folder / name).write_bytes(content(GREY))
    listing = list_images(f"file://{tmp_path}/{named}")
    assert names(listing) == listed
    assert all(Path(listing.file(number)).is_file() for number in range(len(listing)))


def test_wildcards_that_a_uri_escapes_are_signs() -> None:
    for pattern, matched, other in (("a%2a*", b"a*b", b"ab"), ("%3F", b"?", b"a"), ("%FF", b"\xff", b"f")):
        assert glob_of_uri(pattern).matches(matched), pattern
        assert not glob_of_uri(pattern).matches(other), pattern


def test_a_glob_enters_no_other_folders() -> None:
    for pattern, entered, others in (
        ("*.png", "", "a"),
        ("pics*/*.png", "pics pics1", "other pics/a .pics"),
        ("a/*/b*/x", "a a/c a/c/bb", "b a/.c a/c/d a/c/bb/e"),
        ("a/**/x", "a a/b a/b/c", "b a/.b"),
        ("**", "a a/b", ".a a/.b"),
        ("**/.a/x", "a .a b/.a", ".b a/.b .a/.a"),
    ):
        glob = Glob(pattern)
        assert all(glob.enters(folder.encode()) for folder in entered.split()), pattern
        assert not any(glob.enters(folder.encode()) for folder in others.split()), pattern


def test_a_folder_that_a_glob_does_not_name_is_left_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be one that nobody else can enter."""
    entered, scan = [], os.scandir

    def note(place: bytes) -> Any:
        entered.append(os.path.relpath(os.fsdecode(place), tree))
        return scan(place)

    monkeypatch.setattr(os, "scandir", note)
    assert names(list_images(str(tree / "s*" / "*.png"))) == ["sub/e.png"]
    assert entered == [".", "sub"]


def test_a_folder_whose_name_is_no_text_is_listed(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/a.png")).write_bytes(content(GREY))
    for named in (folder, folder + b"/*.png", folder + b"/a.png"):
        listing = list_images(os.fsdecode(named))
        assert listing.path(0) == f"{tmp_path}/\\xff/a.png"
        ((pixels, errors),) = read_images(listing, 0, 1, 1)
        assert errors == [None] and np.array_equal(pixels[0], PIXELS)


def test_the_digest_changes_with_names_sizes_and_times(tree: Path) -> None:
    first = list_images(str(tree)).digest
    assert list_images(str(tree)).digest == first
    os.utime(tree / "b.png", ns=(1, 1))
    second = list_images(str(tree)).digest
    (tree / "b.png").rename(tree / "bb.png")
    assert len({first, second, list_images(str(tree)).digest}) == 3


def test_links_pipes_and_names_that_are_no_text(tree: Path) -> None:
    for name in TREE:
        (tree / name).unlink()
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "gone.png").symlink_to(tree / "nowhere.png")
    (tree / "itself.png").symlink_to("itself.png")
    os.mkfifo(tree / "pipe.png")
    odd = os.fsencode(tree) + b"/\xff\n.png"
    Path(os.fsdecode(odd)).write_bytes(content(GREY))
    (tree / "link.png").symlink_to(os.fsdecode(odd))
    listing = list_images(str(tree))
    assert listing.names.to_pylist() == [b"gone.png", b"itself.png", b"link.png", b"\xff\n.png"]
    ((pixels, errors),) = read_images(listing, 0, 4, 4)
    reasons = ("No such file or directory", "Too many levels of symbolic links")
    assert errors == [*(f"it cannot be opened ({reason})" for reason in reasons), None, None]
    assert np.array_equal(pixels[2:], np.stack([PIXELS, PIXELS]))
    assert not pixels[:2].any()
    assert listing.path(3).endswith("/\\xff\n.png")


MISTAKES: dict[str, tuple[str, str, str]] = {
    "nothing there": ("nowhere", "", "does not exist; name a file, a folder, a glob or a URI"),
    "no folder of a glob": ("nowhere/*.png", "", "holds no file; name others"),
    "nothing that matches": ("*.gif", "", "holds no file; name others"),
    "no images": ("empty", "", "holds no PNG, JPEG or Parquet file; name others"),
    "both kinds": ("mixed", "", "holds 1 images and 1 Parquet files; name one kind by a glob"),
    "a column of files": ("sub", "x", "--column x is for Parquet files"),
    "no such column": ("mixed/*.parquet", "x", "--column x is not in"),
    "a column of text": ("mixed/*.parquet", "text", "is of type string; images are PNG or JPEG bytes"),
    "no Parquet": ("fake.parquet", "", "cannot be read"),
    "unknown scheme": ("gopher://a/b", "", "cannot be opened"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_listed_is_refused(case: str, tree: Path) -> None:
    images, column, told = MISTAKES[case]
    (tree / "empty").mkdir()
    (tree / "mixed").mkdir()
    (tree / "mixed" / "a.png").write_bytes(content(GREY))
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tree / "mixed" / "rows.parquet")
    (tree / "fake.parquet").write_bytes(b"PAR1" + bytes(50) + b"PAR1")
    with pytest.raises(UserError) as error:
        list_images(images if "://" in images else str(tree / images), column)
    assert told in str(error.value)


# --- Parquet --------------------------------------------------------------------------------------------------------

NUMBER = 23


def images(number: int = NUMBER) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (number, 28, 28), dtype=np.uint8)


def as_files(values: np.ndarray) -> list[bytes]:
    return [content(Image.fromarray(each)) for each in values]


def flat(values: np.ndarray) -> list[list[int]]:
    return [each.reshape(-1).tolist() for each in values]


COLUMNS: dict[str, Callable[[np.ndarray], pa.Array]] = {
    "PNG files": lambda values: pa.array(as_files(values), pa.binary()),
    "PNG files, large": lambda values: pa.array(as_files(values), pa.large_binary()),
    "the hub's struct": lambda values: pa.array(
        [{"bytes": each, "path": "a.png"} for each in as_files(values)],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    ),
    "784 bytes": lambda values: pa.array([each.tobytes() for each in values], pa.binary(784)),
    "784 bytes of any length": lambda values: pa.array([each.tobytes() for each in values], pa.binary()),
    "list of uint8": lambda values: pa.array(flat(values), pa.list_(pa.uint8())),
    "list of int64": lambda values: pa.array(flat(values), pa.list_(pa.int64())),
    "list of fixed size": lambda values: pa.array(flat(values), pa.list_(pa.int16(), 784)),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_kind_of_column_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    """Over two files, groups of five rows, and pieces that begin and end anywhere."""
    values = images()
    for name, part in (("a", values[:9]), ("b", values[9:])):
        table = pa.table({"id": np.arange(len(part)), "image": COLUMNS[kind](part)})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=5)
    listing = list_images(str(tmp_path))
    assert (listing.kind, len(listing), listing.column, listing.longest_group) == ("rows", NUMBER, "image", 5)
    for start, stop, step in ((0, NUMBER, NUMBER), (0, NUMBER, 4), (3, 17, 5), (8, 10, 1), (22, 23, 9)):
        pieces = list(read_images(listing, start, stop, step))
        assert [len(errors) for _, errors in pieces] == [min(step, stop - at) for at in range(start, stop, step)]
        assert np.array_equal(np.concatenate([pixels for pixels, _ in pieces]), values[start:stop])
        assert not any(error for _, errors in pieces for error in errors)


BAD_CELLS: dict[str, tuple[pa.Array, list[str | None]]] = {
    "files": (
        pa.array([None, b"", b"<html>", content(GREY), PIXELS.tobytes()], pa.binary()),
        ["it is empty", "it is empty", "neither a PNG", None, None],
    ),
    "structs": (
        pa.array([None, {"bytes": None}, {"bytes": content(GREY)}], pa.struct({"bytes": pa.binary()})),
        ["it is empty", "it is empty", None],
    ),
    "pixels": (pa.array([None, PIXELS.tobytes()], pa.binary(784)), ["it is empty", None]),
    "lists": (
        pa.array([None, [], [1, 2], [256] * 784, [None] * 784, [-1] * 784, flat([PIXELS])[0]], pa.list_(pa.int32())),
        ["it is empty", "it is empty", "it holds 2 numbers, not 784", *["it holds a number outside of 0"] * 3, None],
    ),
    "short lists": (pa.array([[1], [2]], pa.list_(pa.uint8())), ["it holds 1 numbers, not 784"] * 2),
    "a file among pixels": (
        pa.array([content(GREY, compress_level=0)[:784], PIXELS.tobytes()], pa.binary()),
        ["it is damaged", None],
    ),
}


@pytest.mark.parametrize("kind", BAD_CELLS)
def test_a_cell_that_holds_no_image_says_why(kind: str) -> None:
    cells, expected = BAD_CELLS[kind]
    for start in range(2):  # arrays may begin within their buffers
        pixels, errors = decode_cells(cells[start:], photo=False)
        for found, told, each in zip(errors, expected[start:], pixels, strict=True):
            assert (found is None) == (told is None) and (told or "") in (found or "")
            assert np.array_equal(each, PIXELS if told is None else np.zeros_like(PIXELS))


def test_the_column_is_found_or_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    picture, cell = [content(GREY)], pa.array([content(GREY)])
    for columns, given, told in (
        ({"photo": picture, "id": [1]}, "", "photo"),
        ({"photo": picture, "image": picture}, "", "image"),
        ({"photo": picture, "image": picture}, "photo", "photo"),
        ({"photo": picture, "other": cell}, "", "may hold images in photo, other; name one by --column"),
        ({"id": [1]}, "", "has no column of images; its columns are id"),
    ):
        pq.write_table(pa.table(columns), path)
        if told in columns:
            assert list_images(str(path), given).column == told
        else:
            with pytest.raises(UserError, match=told):
                list_images(str(path), given)


def test_pictures_that_many_rows_share_come_a_few_at_a_time(tmp_path: Path) -> None:
    """In a dictionary they take the room of one; pixels, all of one size, come by the thousand."""
    path, number = tmp_path / "a.parquet", 5 * MOST_FILES
    pixels = pa.array([PIXELS.tobytes()] * number, pa.binary(784))
    pq.write_table(pa.table({"image": [content(GREY)] * number, "pixels": pixels}), path)
    with open_parquet(pafs.LocalFileSystem(), str(path), "a") as file:
        assert [len(piece) for piece in read_cells(file, "image", 0, number)] == [MOST_FILES] * 5
        assert [len(piece) for piece in read_cells(file, "pixels", 0, number)] == [number]


def test_a_long_group_is_read_through_a_small_buffer(tmp_path: Path) -> None:
    """A column of 32 MB in pages of one, of which the first rows are asked for."""
    path = tmp_path / "a.parquet"
    cells = [np.random.default_rng(row).bytes(256 << 10) for row in range(128)]
    pq.write_table(pa.table({"image": cells}), path, compression="none", use_dictionary=False, write_batch_size=4)
    del cells
    tracemalloc.start()
    try:
        with open_parquet(pafs.LocalFileSystem(), str(path), "a") as file:
            assert len(next(read_cells(file, "image", 0, 128))) == MOST_FILES
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_parquet_file_that_is_damaged_later_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": as_files(images())}), path, compression="none", use_dictionary=False)
    listing = list_images(str(path))
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        list(read_images(listing, 0, NUMBER, 10))
