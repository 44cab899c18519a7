"""The four official files of Fashion-MNIST: parse them, plain or gzip'd, prove their rows, download them."""

import gzip
import hashlib
import socket
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from fashion.config import IMAGE_SIZE, NUM_CLASSES, UserError, require

# The largest official split has 60,000 rows; a header that promises many more is refused before memory is allocated.
MAX_ROWS_PER_SPLIT = 100_000
# The longest wait for the next byte of a download: a slow mirror goes on, a silent one is given up.
DOWNLOAD_TIMEOUT_S = 30.0

# SHA-256 of the official gzip archives, as in Keras' fashion_mnist loader.
ARCHIVES = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
# SHA-256 of the rows inside them, without the headers: the proof of the data in any other wrapping.
ROWS = {
    "train-images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "train-labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "t10k-images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "t10k-labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
# For each official row, its place among the rows sorted by `row_keys`; all 70,000 rows differ. With it, rows that
# others have shuffled, as those of Kaggle's CSV files are, return to the official order.
ORDER_FILE = Path(__file__).with_name("official_order.npz")

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images (N, 28, 28) uint8 and labels (N,) uint8."""


class DownloadFailed(UserError):
    """No mirror delivered the archives. After this failure, and no other, `make quickstart` takes the stand-in."""


def open_plain_or_gzip(path: Path) -> IO[bytes]:
    """Open a file, inflating it if it is gzip'd, whatever its name says.

    Raises `UserError` if it is a folder or a web page, or cannot be read.
    """
    start = first_bytes(path)
    packed = start[:2] == b"\x1f\x8b"
    require(packed or path.suffix != ".gz" or start[:2] == b"\0\0", f"{path}: not a whole gzip file; fetch it again")
    return cast("IO[bytes]", gzip.GzipFile(path)) if packed else path.open("rb")


def first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a file; raises `UserError` if it is a folder or a web page, or cannot be read."""
    require(not path.is_dir(), f"{path} is a folder, not a file; put the file there")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or name another --source") from error
    page = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype", b"<html"))
    require(not page, f"{path} is a web page (HTML), not data; a link to a page was saved, so fetch the file itself")
    return start


def read_idx(
    path: Path, *, magic: int, shape: tuple[int, ...], max_rows: int = MAX_ROWS_PER_SPLIT
) -> NDArray[np.uint8]:
    """Parse one IDX file, plain or gzip'd, into (N, *shape) uint8.

    The header is checked before any row is read, so a wrong header costs no memory. Raises `UserError` on a truncated
    or corrupt gzip, a wrong magic number, wrong sizes, an impossible count, missing or surplus bytes.
    """
    num_fields = 2 + len(shape)
    row_size = int(np.prod(shape, dtype=np.int64))
    try:
        with open_plain_or_gzip(path) as stream:
            header = stream.read(4 * num_fields)
            require(len(header) == 4 * num_fields, f"{path}: header is cut short after {len(header)} bytes")
            found_magic, num_rows, *sizes = struct.unpack(f">{num_fields}I", header)
            require(found_magic == magic, f"{path}: magic number is {found_magic}, expected {magic}")
            require(tuple(sizes) == shape, f"{path}: image size is {tuple(sizes)}, expected {shape}")
            require(1 <= num_rows <= max_rows, f"{path}: promises {num_rows} rows, expected 1 to {max_rows}")
            body = stream.read(num_rows * row_size)
            surplus = len(stream.read(1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    require(
        len(body) == num_rows * row_size and not surplus,
        f"{path}: promises {num_rows} rows of {row_size} bytes but holds "
        f"{'more' if surplus else str(len(body)) + ' bytes'}; fetch it again",
    )
    return np.frombuffer(body, np.uint8).reshape(num_rows, *shape)


def read_pair(images_path: Path, labels_path: Path) -> Pair:
    """Read the images and labels of a split from two IDX files.

    Raises `UserError` if they differ in length, a label is above 9, or as `read_idx` does.
    """
    images = read_idx(images_path, magic=2051, shape=(IMAGE_SIZE, IMAGE_SIZE))
    labels = read_idx(labels_path, magic=2049, shape=())
    require(
        len(images) == len(labels),
        f"{images_path} holds {len(images)} images but {labels_path.name} {len(labels)} labels; they do not match",
    )
    highest = int(labels.max())
    require(highest < NUM_CLASSES, f"{labels_path}: holds label {highest}, expected 0 to {NUM_CLASSES - 1}")
    return images, labels


def row_keys(pair: Pair) -> NDArray[np.uint64]:
    """Return a key of 64 bits for each row, (N,) uint64: the BLAKE2b digest of its 784 pixels and its label."""
    digests = [
        hashlib.blake2b(image.tobytes() + bytes([label]), digest_size=8).digest()
        for image, label in zip(*pair, strict=True)
    ]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def rows_sha256(stem: str, pair: Pair) -> dict[str, str]:
    """Return the SHA-256 of the images and of the labels of `stem`, by their names in `ROWS`."""
    sums = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in pair]
    return dict(zip((f"{stem}-images", f"{stem}-labels"), sums, strict=True))


def prove(stem: str, pair: Pair, files: dict[str, Path]) -> Pair:
    """Return the rows of `stem`, which is `train` or `t10k`, in the official order, if they are the official rows.

    `files` names, for messages, the file that holds the images and the one that holds the labels, by `ROWS`'s names.
    Raises `UserError` if there are more or fewer rows, or if their SHA-256 is another than `ROWS` says.
    """
    with np.load(ORDER_FILE, allow_pickle=False) as orders:
        order = orders[stem]
    count, images_file = len(pair[1]), files[f"{stem}-images"]
    require(count == len(order), f"{images_file} holds {count} rows, the official {stem} {len(order)}; fetch it again")
    sums = rows_sha256(stem, pair)
    wrong = [name for name, sha256 in sums.items() if sha256 != ROWS[name]]
    if wrong:
        places = np.argsort(row_keys(pair), kind="stable")[order]
        ordered = pair[0][places], pair[1][places]
        if all(sha256 == ROWS[name] for name, sha256 in rows_sha256(stem, ordered).items()):
            return ordered
        raise UserError(
            f"{files[wrong[0]]}: right format, but the SHA-256 of its rows {sums[wrong[0]][:12]}... is not the "
            f"official {ROWS[wrong[0]][:12]}..., in whichever order; fetch it again"
        )
    return pair


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex; raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or name another --source") from error


def download(folder: Path) -> Path:
    """Download the archives from torchvision's mirrors into `folder`; return the folder that then holds them.

    Raises `DownloadFailed`, which names the two other sources, when no mirror delivers them.
    """
    from torchvision.datasets import FashionMNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and would wait for a silent mirror for ever
    try:
        FashionMNIST(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision turns some into RuntimeError
        reason = " ".join(str(error).split())[:200]
        raise DownloadFailed(
            f"Fashion-MNIST could not be downloaded ({reason}); pass --source DIR with the data "
            "(or set FASHION_MNIST_SOURCE), or --source synthetic for the drawn stand-in"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / "FashionMNIST" / "raw"
