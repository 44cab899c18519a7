"""Where the rows of Fashion-MNIST come from: a folder in any of the forms that others leave, the network, the stand-in.

What proves the rows is their SHA-256, whatever the wrapping. Several forms in one folder are never mixed: the first
complete one is read.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fashion.config import UserError, require
from fashion.data import archives, synthetic
from fashion.data.archives import Pair, file_sha256
from fashion.data.tabular import read_csv, read_parquet_images

STEMS = ("train", "t10k")
# Below the folder that is named: itself, torchvision's root or its FashionMNIST, Keras's cache, the hub's folders.
FOLDERS = (".", "FashionMNIST/raw", "raw", "fashion-mnist", "datasets/fashion-mnist", "fashion_mnist", "data")
# The official names, and those that unpackers write.
KINDS = {"images": ("-idx3-ubyte", ".idx3-ubyte"), "labels": ("-idx1-ubyte", ".idx1-ubyte")}
CSV_FILES = {"train": "fashion-mnist_train.csv", "t10k": "fashion-mnist_test.csv"}
PARQUET_FILES = {"train": "train*.parquet", "t10k": "test*.parquet"}
KNOWN = (
    "the four archives, gzip'd or plain (also in torchvision's or Keras's folder), Kaggle's fashion-mnist_train.csv "
    "and fashion-mnist_test.csv, or train*.parquet and test*.parquet with PNG images"
)


@dataclass(frozen=True)
class Form:
    """The files of one form of the data set in one folder, by what they hold: `train-images`, ..., `t10k-labels`."""

    name: str
    folder: Path
    files: dict[str, list[Path]]
    missing: list[str]
    """Names of files that are not there."""

    def show(self) -> str:
        """Return the form and its folder, for messages."""
        return f"{self.name} in {self.folder}"


@dataclass(frozen=True)
class Source:
    """The rows of a source, in the official order."""

    place: str
    """Where they were found and in which form, for messages."""
    train: Pair
    test: Pair
    archives: dict[str, str]
    """SHA-256 of the archives that hold these rows, by file name."""
    official: bool
    """Whether they are Fashion-MNIST, and not the stand-in."""
    passed_over: tuple[str, ...] = ()
    """Why `auto` did not take what lies in the usual places; a line each."""


def forms_in(folder: Path) -> Iterator[Form]:
    """Yield the forms of which at least one file, or a folder of that name, lies in `folder`: gzip'd files first."""
    found: list[Form] = []
    for suffixes in ((".gz",), ("",), (".gz", "")):
        for separators in ((0,), (1,), (0, 1)):
            found.append(idx_form(folder, suffixes, separators))
    for name, patterns in (("CSV files", CSV_FILES), ("Parquet files", PARQUET_FILES)):
        files = {stem: sorted(folder.glob(pattern)) for stem, pattern in patterns.items()}
        both = {f"{stem}-{kind}": files[stem] for stem in STEMS for kind in KINDS}
        missing = [patterns[stem] for stem in STEMS if not all_files(files[stem])]
        found.append(Form(name, folder, both, missing))
    yield from (form for form in found if any(form.files.values()))


def idx_form(folder: Path, suffixes: tuple[str, ...], separators: tuple[int, ...]) -> Form:
    """Return the IDX files in `folder` whose names have one of these ends and, before `idx`, one of these signs."""
    files: dict[str, list[Path]] = {}
    missing: list[str] = []
    for stem in STEMS:
        for kind, names in KINDS.items():
            choices = [folder / f"{stem}-{kind}{names[k]}{suffix}" for suffix in suffixes for k in separators]
            there = sorted((path for path in choices if path.exists()), key=Path.is_dir)
            files[f"{stem}-{kind}"] = there[:1]
            if not all_files(there[:1]):
                missing.append(choices[0].name)
    name = {".gz": "gzip'd archives", "": "plain IDX files"}.get("|".join(suffixes), "gzip'd and plain IDX files")
    return Form(name, folder, files, missing)


def all_files(paths: list[Path]) -> bool:
    """Tell whether there are paths and each is a file."""
    return bool(paths) and all(path.is_file() for path in paths)


def find_form(folder: Path, named: str) -> Form:
    """Return the first complete form in `folder` or where torchvision, Keras and the hub put it below.

    Raises `UserError` if there is none: it names what is missing of the form that is nearest to being complete.
    """
    found = [form for below in FOLDERS for form in forms_in(folder / below)]
    for form in found:
        if not form.missing:
            return form
    require(bool(found), f"{named} holds no Fashion-MNIST; it must hold {KNOWN}")
    nearest = min(found, key=lambda form: len(form.missing) / len(form.files))
    folders = [path for paths in nearest.files.values() for path in paths if path.is_dir()]
    require(not folders, f"{folders[0] if folders else ''} is a folder, not a file; put the file there")
    raise UserError(f"{named} lacks {', '.join(nearest.missing)} of the {nearest.show()}; it must hold {KNOWN}")


def read_form(form: Form) -> tuple[Pair, Pair]:
    """Return the rows of train and test, proven, in the official order; raises `UserError` if they are others."""
    pairs = []
    for stem in STEMS:
        images, labels = (form.files[f"{stem}-{kind}"] for kind in KINDS)
        if form.name == "CSV files":
            pair = read_csv(images[0])
        elif form.name == "Parquet files":
            pair = read_parquet_images(images)
        else:
            pair = archives.read_pair(images[0], labels[0])
        files = {f"{stem}-images": images[0], f"{stem}-labels": labels[0]}
        pairs.append(archives.prove(stem, pair, files))
    return pairs[0], pairs[1]


def read_folder(folder: Path, named: str) -> Source:
    """Read the data set from a folder; messages call it `named`. Raises `UserError` as the parts do."""
    form = find_form(folder, named)
    train, test = read_form(form)
    return Source(form.show(), train, test, dict(archives.ARCHIVES), official=True)


def usual_places() -> list[Path]:
    """Return the folders where other programs leave the data set: Keras, torchvision's examples, the hub's cache."""
    keras = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser()
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser() / "hub"
    snapshots = sorted(hub.glob("datasets--*fashion_mnist/snapshots/*"))
    return [keras / "datasets" / "fashion-mnist", Path("data"), Path("~/data").expanduser(), *snapshots]


def read_auto() -> Source:
    """Read the data set from the first usual place that holds it, else download it.

    A place that holds something else or something damaged is passed over, and the source says so. Raises
    `DownloadFailed`.
    """
    passed_over: list[str] = []
    for place in usual_places():
        if not any(True for below in FOLDERS for _ in forms_in(place / below)):
            continue
        try:
            source = read_folder(place, str(place))
        except UserError as error:
            passed_over.append(str(error))
        else:
            return Source(source.place, source.train, source.test, source.archives, True, tuple(passed_over))
    source = read_download()
    return Source(source.place, source.train, source.test, source.archives, True, tuple(passed_over))


def read_download() -> Source:
    """Download the archives and read them; raises `DownloadFailed`."""
    with tempfile.TemporaryDirectory() as temporary:
        source = read_folder(archives.download(Path(temporary)), "the download")
    return Source("the official download", source.train, source.test, source.archives, official=True)


def read_synthetic() -> Source:
    """Draw the stand-in."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        synthetic.write_archives(folder)
        train, test = (
            archives.read_pair(folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz")
            for stem in STEMS
        )
        sums = {name: file_sha256(folder / name) for name in archives.ARCHIVES}
    return Source("drawn by formulas", train, test, sums, official=False)


def read_source(source: str) -> Source:
    """Return the rows of `source`: `auto`, `download`, `synthetic`, or a folder.

    Raises `UserError` for anything else, and for data that is not Fashion-MNIST; `DownloadFailed`.
    """
    special = {"auto": read_auto, "download": read_download, "synthetic": read_synthetic}
    if source in special:
        return special[source]()
    return read_folder(source_folder(source), f"--source {source}")


def check_folder(source: str) -> None:
    """Raise `UserError` unless the folder `source` holds Fashion-MNIST. The archives are compared, not parsed."""
    folder = source_folder(source)
    form = find_form(folder, f"--source {source}")
    files = {paths[0].name: paths[0] for paths in form.files.values()}
    if set(files) == set(archives.ARCHIVES):
        sums = {name: file_sha256(path) for name, path in files.items()}
        if sums == archives.ARCHIVES:
            return
    read_form(form)


def source_folder(source: str) -> Path:
    """Return `source` as a folder; raises `UserError` if it is none."""
    folder = Path(source).expanduser()
    require(
        folder.is_dir(),
        f"--source {source} is neither auto, download, synthetic nor a folder; a folder must hold {KNOWN}",
    )
    return folder
