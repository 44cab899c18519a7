"""The four archives of Fashion-MNIST: find or download them, verify their SHA-256, parse them into arrays."""

import gzip
import hashlib
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fashion.config import IMAGE_SIZE, NUM_CLASSES, UserError, require
from fashion.data import synthetic

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


class DownloadFailed(UserError):
    """No mirror delivered the archives. After this failure, and no other, `make quickstart` takes the stand-in."""


def read_idx(
    path: Path, *, magic: int, shape: tuple[int, ...], max_rows: int = MAX_ROWS_PER_SPLIT
) -> NDArray[np.uint8]:
    """Parse one gzip'd IDX file into (N, *shape) uint8.

    The header is checked before any row is read, so a wrong header costs no memory. Raises `UserError` on a truncated
    or corrupt gzip, a wrong magic number, wrong sizes, an impossible count, missing or surplus bytes.
    """
    num_fields = 2 + len(shape)
    row_size = int(np.prod(shape, dtype=np.int64))
    try:
        with gzip.open(path, "rb") as stream:
            header = stream.read(4 * num_fields)
            require(len(header) == 4 * num_fields, f"{path.name}: header is cut short after {len(header)} bytes")
            found_magic, num_rows, *sizes = struct.unpack(f">{num_fields}I", header)
            require(found_magic == magic, f"{path.name}: magic number is {found_magic}, expected {magic}")
            require(tuple(sizes) == shape, f"{path.name}: image size is {tuple(sizes)}, expected {shape}")
            require(1 <= num_rows <= max_rows, f"{path.name}: promises {num_rows} rows, expected 1 to {max_rows}")
            body = stream.read(num_rows * row_size)
            surplus = len(stream.read(1))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path.name}: not a whole gzip file ({error}); fetch it again") from error
    require(
        len(body) == num_rows * row_size and not surplus,
        f"{path.name}: promises {num_rows} rows of {row_size} bytes but holds "
        f"{'more' if surplus else str(len(body)) + ' bytes'}",
    )
    return np.frombuffer(body, np.uint8).reshape(num_rows, *shape)


def read_pair(folder: Path, stem: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images (N, 28, 28) uint8 and labels (N,) uint8 of `stem`, which is `train` or `t10k`.

    Raises `UserError` if the two files differ in length, a label is above 9, or as `read_idx` does.
    """
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", magic=2051, shape=(IMAGE_SIZE, IMAGE_SIZE))
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", magic=2049, shape=())
    require(
        len(images) == len(labels), f"{stem}: {len(images)} images but {len(labels)} labels; the files do not match"
    )
    highest = int(labels.max())
    require(
        highest < NUM_CLASSES, f"{stem}-labels-idx1-ubyte.gz: holds label {highest}, expected 0 to {NUM_CLASSES - 1}"
    )
    return images, labels


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex; raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that or name another --source") from error


def check_archives(folder: Path, *, official: bool) -> dict[str, str]:
    """Return the archives' SHA-256 sums by file name.

    Raises `UserError` if an archive is missing or, where they must be `official`, has another sum than `ARCHIVES` says.
    """
    missing = [name for name in ARCHIVES if not (folder / name).is_file()]
    require(not missing, f"--source {folder} lacks {', '.join(missing)}; it must hold the four Fashion-MNIST archives")
    sums = {name: file_sha256(folder / name) for name in ARCHIVES}
    wrong = [name for name in ARCHIVES if official and sums[name] != ARCHIVES[name]]
    if wrong:
        # What the parser finds (truncated, wrong magic, ...) helps the user more than a differing sum: parse first.
        read_pair(folder, "train")
        read_pair(folder, "t10k")
        raise UserError(
            f"{wrong[0]}: right format, but its SHA-256 {sums[wrong[0]][:12]}... is not the official "
            f"{ARCHIVES[wrong[0]][:12]}...; fetch it again"
        )
    return sums


@contextmanager
def archives_from(source: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folder with the four archives of `source`, and whether they must be the official ones.

    `source` is `auto` or `download`, `synthetic`, or a folder. What was downloaded or drawn is removed afterwards.
    Raises `UserError` for anything else, and `DownloadFailed`.
    """
    if source in ("download", "auto"):
        with tempfile.TemporaryDirectory() as temporary:
            yield download(Path(temporary)), True
    elif source == "synthetic":
        with tempfile.TemporaryDirectory() as temporary:
            synthetic.write_archives(Path(temporary))
            yield Path(temporary), False
    else:
        folder = Path(source).expanduser()
        require(
            folder.is_dir(),
            f"--source {source} is neither auto, download, synthetic nor a folder with the four archives",
        )
        yield folder, True


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
            f"Fashion-MNIST could not be downloaded ({reason}); pass --source DIR with the four archives "
            "(or set FASHION_MNIST_SOURCE), or --source synthetic for the drawn stand-in"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return folder / "FashionMNIST" / "raw"
