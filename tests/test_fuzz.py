"""Hostile input: whatever is handed in is read, or refused in one line; it runs nothing, and reads nothing elsewhere.

Each parser is given `FUZZ_INPUTS` inputs (an environment variable, 10,000 if it is not set): valid files with damage,
JSON of any shape, random bytes. A failure names its input, which is made of its name alone.
"""

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import random
import struct
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import split_paths
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from photographs import content as image_content
from PIL import Image
from torch import nn

from fashion import cli, config
from fashion.config import TrainConfig, UserError
from fashion.data import archives, loading
from fashion.data.images.decoding import Unreadable, decode_image
from fashion.data.images.listing import list_images
from fashion.data.images.reading import read_images
from fashion.data.manifest import DATA_FOLDER, FORMAT_VERSION, SPLITS, Manifest, load_manifest
from fashion.data.rows import Split, to_table
from fashion.reports import runs, schemas, tables
from fashion.search import trial_store
from fashion.search.space import SearchConfig
from fashion.search.stored_settings import (
    check_same_search,
    read_settings,
    settings_place,
    stored_settings,
    write_settings,
)
from fashion.storage import Storage, read_parquet
from fashion.training import checkpoint, metrics
from fashion.training.checkpoint import DamagedCheckpoint
from fashion.training.ema import start_ema
from fashion.training.optimizer import build_optimizer
from fashion.training.run import PROGRESS_FORMAT

pytestmark = pytest.mark.slow

INPUTS = int(os.environ.get("FUZZ_INPUTS", "10000"))
BATCH = 100

Random = random.Random


# --- inputs -----------------------------------------------------------------------------------------------------------


MORE = "FUZZ_INPUTS" in os.environ
"""Whoever asks for a number of inputs gets new ones in each run; otherwise all runs have the same."""


def fuzz(parse: Callable[[Random], object], *, told: str = "", inputs: int = INPUTS) -> None:
    """Give `parse` a generator for each of many inputs: it returns, or refuses in one line that holds `told`."""
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=math.ceil(inputs / BATCH),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=not MORE,
    )
    @given(st.integers(0, 2**63))
    def batch(seed: int) -> None:
        for number in range(BATCH):
            name = f"{seed}/{number}"
            outcomes[outcome(lambda name=name: parse(Random(name)), told, name)] += 1

    batch()
    assert outcomes.total() >= inputs, outcomes
    assert outcomes["refused"] > inputs // 10, outcomes


def outcome(call: Callable[[], object], told: str = "", name: str = "") -> str:
    """Return whether `call` is `accepted` or `refused`; anything but a clear refusal fails."""
    try:
        call()
    except (UserError, DamagedCheckpoint) as error:
        message = str(error)
        assert message.isprintable() and told in message, (name, message)
        assert 10 < len(message) <= config.LONGEST_MESSAGE + 5, (name, message)
        return "refused"
    except BaseException as error:  # whatever it is, it is no refusal: the test fails and names the input
        raise AssertionError(f"input {name}: {type(error).__name__}: {error}") from error
    return "accepted"


NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def damaged(rng: Random, content: bytes) -> bytes:
    """Return `content` with one to three wounds."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 2, 4, 8, 16, 64, 256])
        wound = rng.randrange(8)
        if wound == 0:  # bits turn
            changed = bytearray(content or b"\0")
            for _ in range(rng.choice([1, 1, 2, 8])):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            content = bytes(changed)
        elif wound == 1:
            content = content[:at]
        elif wound == 2:  # a part is lost
            content = content[:at] + content[at + length :]
        elif wound == 3:  # a part is there twice
            content = content[: at + length] + content[at:]
        elif wound == 4:  # a part of it lies elsewhere
            source = rng.randrange(len(content) + 1)
            content = content[:at] + content[source : source + length] + content[at + length :]
        elif wound == 5:
            content = content[:at] + rng.randbytes(length) + content[at + length :]
        elif wound == 6:  # a number at a limit, in either order of bytes
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(["little", "big"]))
            size = rng.choice([1, 2, 4, 8])
            content = content[:at] + rng.choice([number[:size], number[-size:]]) + content[at + size :]
        else:
            content = rng.randbytes(length) if rng.random() < 0.3 else content + rng.randbytes(length)
    return content


WORDS = [
    "",
    "a",
    "train",
    "adam",
    "../../etc/passwd",
    "/etc/passwd",
    "\0",
    "\n\x1b[31m",
    "\ud800",
    "\u202e",
    "x" * 5000,
]
PLAIN = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.0, -0.5, 1e308, math.nan, math.inf, -math.inf, *WORDS]


def any_json(rng: Random, depth: int = 3) -> Any:
    """Return a value that JSON can hold."""
    kind = rng.randrange(6) if depth else 0
    if kind == 4:
        return [any_json(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(WORDS): any_json(rng, depth - 1) for _ in range(rng.randrange(4))}
    return rng.choice(PLAIN)


def altered(rng: Random, value: Any) -> Any:
    """Return a copy of a JSON value with another value, a missing or a surplus entry somewhere."""
    if rng.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return any_json(rng)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], altered(rng, value[at]), *value[at + 1 :]]
    key = rng.choice(list(value))
    change = rng.random()
    if change < 0.1:
        return {name: each for name, each in value.items() if name != key}
    if change < 0.2:
        return value | {rng.choice(WORDS): any_json(rng)}
    return value | {key: altered(rng, value[key])}


def hostile_json(rng: Random, value: Any) -> bytes:
    """Return JSON like that of `value`, but not quite; sometimes no JSON at all."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice([b"[", b'{"a":', b"[[],", b'{"a":[']) * 20_000
    if kind < 0.6:
        return json.dumps(altered(rng, value)).encode()
    return damaged(rng, json.dumps(value).encode())


def put(storage: Storage, content: bytes, *place: str) -> None:
    """Write a file of a storage, without waiting for the disk."""
    path = Path(storage.path(*place))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- archives ---------------------------------------------------------------------------------------------------------

IMAGES = struct.pack(">4I", 2051, 3, 28, 28) + bytes(range(256)) * 9 + bytes(48)
LABELS = struct.pack(">2I", 2049, 3) + bytes([1, 2, 3])
IMAGES_FILE, LABELS_FILE = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def test_archives(tmp_path: Path) -> None:
    files = {name: (raw, gzip.compress(raw, 1)) for name, raw in ((IMAGES_FILE, IMAGES), (LABELS_FILE, LABELS))}

    def parse(rng: Random) -> None:
        for name, (_, packed) in files.items():
            (tmp_path / name).write_bytes(packed)
        name = rng.choice(list(files))
        raw, packed = files[name]
        inside = rng.random() < 0.5
        content = gzip.compress(damaged(rng, raw), rng.choice([0, 1])) if inside else damaged(rng, packed)
        (tmp_path / name).write_bytes(content)
        images, labels = archives.read_pair(tmp_path / IMAGES_FILE, tmp_path / LABELS_FILE)
        assert images.shape == (len(labels), 28, 28) and labels.max() < 10

    fuzz(parse, told="train")


@pytest.mark.parametrize("num_rows", [100_001, 2**31, 2**32 - 1])
@pytest.mark.parametrize("sizes", [(28, 28), (2**32 - 1, 2**32 - 1)])
def test_an_archive_that_promises_the_world_costs_no_memory(tmp_path: Path, num_rows: int, sizes: tuple[int]) -> None:
    header = struct.pack(">4I", 2051, num_rows, *sizes)
    (tmp_path / IMAGES_FILE).write_bytes(gzip.compress(header))
    assert memory_to_refuse(lambda: archives.read_idx(tmp_path / IMAGES_FILE, magic=2051, shape=(28, 28))) < 2**20


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    """A file of a megabyte that holds a gigabyte."""
    path = tmp_path / LABELS_FILE
    path.write_bytes(gzip.compress(struct.pack(">2I", 2049, 3)) + gzip.compress(bytes(10 << 20), 9) * 100)
    assert path.stat().st_size < 2 << 20
    assert memory_to_refuse(lambda: archives.read_idx(path, magic=2049, shape=())) < 2**20


def memory_to_refuse(call: Callable[[], object]) -> int:
    """Return the bytes that Python takes at most until `call` is refused."""
    tracemalloc.start()
    assert outcome(call) == "refused"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# --- prepared data ----------------------------------------------------------------------------------------------------


def rows_of(count: int) -> Split:
    images = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
    return Split(images, np.arange(count, dtype=np.uint8) % 10, np.arange(count, dtype=np.int32))


def parquet(table: pa.Table, **options: Any) -> bytes:
    """Return a table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return bytes(sink.getvalue())


def manifest_of(files: dict[str, bytes], rows: int) -> dict[str, Any]:
    """Return what a manifest holds whose splits all have the same files."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return {
        "dataset": "fashion-mnist",
        "sha256": "0" * 64,
        "seed": 0,
        "val_rows": 10,
        "rows": dict.fromkeys(SPLITS, rows),
        "class_counts": {split: [rows, *([0] * 9)] for split in SPLITS},
        "pixel_mean": 0.3,
        "pixel_std": 0.3,
        "files": dict.fromkeys(SPLITS, sums),
        "archives": {},
        "format_version": FORMAT_VERSION,
    }


def test_manifests(storage: Storage) -> None:
    valid = manifest_of({"part-000-0123456789ab.parquet": b""}, 10)

    def parse(rng: Random) -> None:
        put(storage, hostile_json(rng, valid), *DATA_FOLDER, "manifest.json")
        manifest = load_manifest(storage)
        for split in SPLITS:
            for path in split_paths(storage, manifest, split):
                assert Path(path).parent == Path(storage.path(*DATA_FOLDER, split))

    fuzz(parse, told="manifest.json")


def test_rows(storage: Storage) -> None:
    """With sums that fit, as whoever hands over prepared data could make them."""
    name = "part-000-0123456789ab.parquet"
    table = to_table(rows_of(4))
    kinds = [{"compression": "zstd", "use_dictionary": False}, {"compression": "snappy"}, {"compression": "none"}]
    valid = [parquet(table, **options) for options in kinds]
    valid += [parquet(table.set_column(1, "label", pa.array([1, None, 3, 200], pa.uint8())))]

    def parse(rng: Random) -> None:
        content = damaged(rng, damaged_footer(rng, rng.choice(valid)))
        put(storage, content, *DATA_FOLDER, "val", name)
        manifest = config.build(Manifest, manifest_of({name: content}, 4))
        rows = loading.load_split(storage, manifest, "val")
        assert rows.images.shape == (4, 28, 28) and rows.labels.max() < 10

    fuzz(parse, told=storage.show(*DATA_FOLDER, "val"))


def damaged_footer(rng: Random, content: bytes) -> bytes:
    """Sometimes return a Parquet file with damage to its metadata alone, their length put right."""
    if rng.random() < 0.5:
        return content
    length = int.from_bytes(content[-8:-4], "little")
    footer = damaged(rng, content[-8 - length : -8])
    return content[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def test_metadata_that_promise_absurd_rows() -> None:
    """The promise of the file, of its row group, or of a column."""
    content = parquet(pa.table({"epoch": pa.nulls(100_003, pa.int32())}))
    length = int.from_bytes(content[-8:-4], "little")
    footer = content[-8 - length : -8]
    honest, absurd = varint(2 * 100_003), varint(2 * 2**60)  # signs are folded into the lowest bit
    places = [at for at in range(length) if footer[at : at + len(honest)] == honest]
    assert len(places) >= 3
    for at in places:
        lying = footer[:at] + absurd + footer[at + len(honest) :]
        whole = content[: -8 - length] + lying + len(lying).to_bytes(4, "little") + b"PAR1"
        before = pa.default_memory_pool().max_memory()
        with contextlib.suppress(ValueError):  # a wrong number of nulls, in the statistics, is nothing that counts
            assert len(read_parquet(whole)) == 100_003
        assert pa.default_memory_pool().max_memory() - before < 2**24
    with pytest.raises(ValueError, match="promises 2000000 rows, more than 1000000"):
        read_parquet(parquet(pa.table({"epoch": pa.nulls(2_000_000, pa.int32())})))


def varint(number: int) -> bytes:
    """Return a number as Parquet's metadata hold it: seven bits a byte, the lowest first."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


# --- reports ----------------------------------------------------------------------------------------------------------

RUN = {"kind": "train", "status": "completed", "config_json": runs.config_json(TrainConfig()), "epochs_done": 3}
EPOCH = {"epoch": 1, "lr": 0.1, "epoch_time_s": 1.0, "data_wait_s": 0.0}
EPOCHS = [EPOCH | {"split": split, "loss": 0.5, "accuracy": 0.8, "rows": 10} for split in ("train", "val")]
TRIAL = {"search_id": "s", "trial_id": "t0000", "status": "completed", "settings_json": '{"lr": 0.1}', "wall_s": 1.0}


def test_reports(storage: Storage) -> None:
    prediction = {"split": "val", "index": 1, "label": 1, "predicted": 1, "probabilities": [0.1] * 10, "loss": 0.1}
    rows = {"runs": [RUN], "epochs": EPOCHS, "trials": [TRIAL], "predictions": [prediction] * 3}
    valid = {table: bytes(tables.encode(table, each)) for table, each in rows.items()}

    def parse(rng: Random) -> None:
        table = rng.choice(list(valid))
        content = damaged(rng, damaged_footer(rng, valid[table]))
        if rng.random() < 0.2:
            content = valid[rng.choice(list(valid))]
        elif rng.random() < 0.3:
            content = parquet(strange_table(rng, schemas.SCHEMAS[table].names))
        put(storage, content, "reports", table, "run_id=a", f"{table}.parquet")
        found = tables.read_table(storage, table, "a")
        assert all(list(row) == schemas.SCHEMAS[table].names for row in found)

    fuzz(parse, told="is damaged")


def strange_table(rng: Random, names: list[str]) -> pa.Table:
    """Return a table with columns of these names, of any types."""
    far = pa.array([2**62, 1], pa.timestamp("us", tz="UTC"))
    latin = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"a"]).buffers())
    kinds = [pa.array([1, 2]), pa.array([1.5, None]), pa.array(["a", "b"]), pa.array([[1], []]), far, latin]
    kinds += [pa.array([{"a": 1}, None]), pa.array([True, False]), pa.nulls(2), pa.array([b"\0", b"a" * 100])]
    chosen = [rng.choice([*names, "other"]) for _ in range(rng.randrange(1, 5))]
    return pa.Table.from_arrays([rng.choice(kinds) for _ in chosen], names=chosen)


def test_trials(storage: Storage) -> None:
    """The rows that a resumed search goes on from."""
    space = SearchConfig(num_samples=1)
    values = {"split": ["train", "test", None], "epoch": [0, 2, None], "loss": [None, math.nan], "epoch_time_s": [0.0]}
    known: dict[str, bytes] = {}  # epochs come again often, and most of the time would go into writing them as Parquet

    def encode(table: str, rows: list[dict[str, Any]]) -> bytes:
        named = [{"run_id": "s-t0000"} | row for row in rows]
        return bytes(tables.to_parquet(tables.in_file_schema(table, named)))

    def put_rows(table: str, content: bytes) -> None:
        put(storage, content, "reports", table, "s.parquet")

    put_rows("runs", encode("runs", [RUN]))

    def parse(rng: Random) -> None:
        epochs = [dict(row) for row in EPOCHS]
        for row in epochs:
            if rng.random() < 0.3:
                name = rng.choice(list(values))
                row[name] = rng.choice(values[name])
        trials = [TRIAL | {"settings_json": hostile_json(rng, {"lr": 0.1}).decode(errors="replace")}]
        if str(epochs) not in known:
            known[str(epochs)] = encode("epochs", epochs)
        put_rows("epochs", known[str(epochs)])
        put_rows("trials", encode("trials", trials))
        [trial] = trial_store.TrialStore(storage, "s", space, {}, TrainConfig().to_dict()).ranked()
        assert isinstance(trial.settings, dict)
        # Two epochs, where the val row of the first has become the train row of a second.
        assert metrics.summarise(trial.history, 1)["epochs_done"] in (1, 2)

    fuzz(parse, told="s-t0000")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_states_of_searches(storage: Storage) -> None:
    identity = {"dataset": "fashion-mnist", "dataset_sha256": "0", "source_hash": "0"}
    space = SearchConfig(padding=("zeros", "partial"), weight_decay=(0.1, 0.2), first=('{"lr": 0.1}',))
    write_settings(storage, "s", space, TrainConfig(), identity)
    valid = json.loads(storage.read_bytes(*settings_place("s")))

    def parse(rng: Random) -> None:
        put(storage, hostile_json(rng, valid), *settings_place("s"))
        found, base = stored_settings(storage, "s")
        check_settings(base)
        found.draw(0)
        assert found.rungs
        if rng.random() < 0.1:
            check_same_search(storage, "s", found, base)

    fuzz(parse, told="search.json")


def check_settings(settings: TrainConfig) -> None:
    """Make sure that settings which were let in are of use."""
    assert TrainConfig.from_dict(json.loads(runs.config_json(settings))) == settings
    settings.steps_per_epoch(2**62)
    model = nn.Linear(2, 2)
    if settings.optimizer != "muon":
        build_optimizer(settings, model)


def test_settings() -> None:
    train, space = TrainConfig().to_dict(), SearchConfig(first=('{"lr": 0.1}',)).to_dict()

    def parse(rng: Random) -> None:
        if rng.random() < 0.5:
            check_settings(TrainConfig.from_dict(altered(rng, train)))
        else:
            found = SearchConfig.from_dict(altered(rng, json.loads(json.dumps(space))))
            found.draw(0)
            assert found.rungs

    fuzz(parse)


def test_settings_of_runs(storage: Storage) -> None:
    valid = TrainConfig().to_dict()

    def parse(rng: Random) -> None:
        text = hostile_json(rng, valid).decode(errors="replace")
        row = RUN | {"config_json": text if rng.random() < 0.95 else None}
        check_settings(runs.config_of(storage, "a", row))

    fuzz(parse, told=storage.show("reports", "runs", "a"))


# Parsing all flags of a search takes 50 ms, those of the page 1 ms: as many inputs as take about as long.
SHARES = {"prepare": 98, "report": 98, "evaluate": 2, "bench": 1, "train": 1, "tune": 1}
VALUES = ["", "0", "-1", "1", "nan", "inf", "1e999", "9" * 5000, "0.5", "a", "a,b", "=", "--", "-", "--seed", *WORDS]


def test_flags(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: importlib.import_module(f"jobs.{name}") for name in SHARES}
    monkeypatch.setattr(cli, "DEFAULT_STORAGE", storage.uri)
    names = ["--storage", "--run-id", "--run_id", "--resume", "--search-id", "--preset", "--seed", "--val-rows"]
    names += ["--lr", "--epochs", "--num-workers", "--first", "--padding", "--split", "--rows", "--no-such", "--out"]
    names += ["--erase", "--ema-decay", "--tta"]

    def parse(rng: Random) -> None:
        [name] = rng.choices(list(SHARES), SHARES.values())
        argv = [rng.choice([*names, *VALUES]) for _ in range(rng.randrange(5))]
        argv = [f"{word}={rng.choice(VALUES)}" if rng.random() < 0.3 else word for word in argv]
        flags = modules[name].Flags
        default = {}
        if name in ("train", "tune"):
            default = {"default": modules[name].starting_point(argv)[0]}
        elif name == "prepare":
            default = {"default": flags()}
        cli.parse(flags, argv, prog=f"python -m jobs.{name}", description="", **default)

    fuzz(parse)


# --- users' images ----------------------------------------------------------------------------------------------------


def image_files() -> list[bytes]:
    """Return small images of several kinds, whose damage concerns all that a decoder reads."""
    pixels = np.add.outer(np.arange(28) * 5, np.arange(28) * 3).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(pixels)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (grey, "PNG", {}),
        (grey, "PNG", {"exif": exif, "compress_level": 0}),
        (grey.convert("P"), "PNG", {"transparency": 3}),
        (grey.convert("RGBA"), "PNG", {"save_all": True, "append_images": [grey.convert("RGBA").rotate(90)]}),
        (Image.fromarray(pixels.astype(np.uint16)), "PNG", {}),
        (grey, "JPEG", {"exif": exif}),
        (grey.convert("RGB"), "JPEG", {"progressive": True}),
        (grey.convert("CMYK"), "JPEG", {}),
    ]
    return [image_content(image, form, **options) for image, form, options in kinds]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow passes over damaged tags, and says so
def test_images() -> None:
    """As they are and as photographs: pixels, or a phrase that says why not."""
    files = image_files()

    def parse(rng: Random) -> None:
        try:
            pixels = decode_image(damaged(rng, rng.choice(files)), photo=rng.random() < 0.3)
        except Unreadable as error:
            raise UserError(f"an image: {error}") from error
        assert (pixels.shape, pixels.dtype) == ((28, 28), np.uint8)

    fuzz(parse)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parquet_files_of_images(tmp_path: Path) -> None:
    """What is damaged is a file as a whole, or single images."""
    cells = pa.array([{"bytes": each, "path": None} for each in image_files()])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": cells}), sink, row_group_size=3)
    content, path = sink.getvalue().to_pybytes(), tmp_path / "a.parquet"

    def parse(rng: Random) -> None:
        path.write_bytes(damaged(rng, content))
        listing = list_images(str(path))
        for pixels, errors in read_images(listing, 0, min(len(listing), 20), 7):
            assert pixels.shape == (len(errors), 28, 28)

    fuzz(parse, inputs=INPUTS // 20)


# --- checkpoints ------------------------------------------------------------------------------------------------------

PROGRESS = {"format": PROGRESS_FORMAT, "history": [{"epoch": 1, "train_loss": 0.5}]}


def restored(
    files: dict[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer, trained: nn.Module | None = None
) -> dict[str, Any]:
    """Restore from `files` and take any progress: what it holds is `fit`'s to judge."""

    def read_file(name: str) -> bytes:
        if name not in files:  # as the checkpoint manager's reader says it
            raise DamagedCheckpoint(f"checkpoint file {name} is missing")
        return files[name]

    return checkpoint.restore(read_file, model, optimizer, lambda progress: None, trained)


def make(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network that is small, and has all kinds of parameters; and an optimizer that has taken a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    made = build_optimizer(replace(TrainConfig(), optimizer=optimizer), model)  # type: ignore[arg-type]
    model(torch.ones(3, 2, 4, 4)).square().sum().backward()
    made.step()
    return model, made


def make_with_ema(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """Return the same, but the network that is trained last, and an average of it first."""
    trained, made = make(optimizer)
    ema = start_ema(trained)
    for parameter in ema.parameters():
        parameter.mul_(0.5)
    return ema, made, trained


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, trained: nn.Module | None = None) -> str:
    """Return, written out, all that a restored checkpoint could change."""
    state, groups = optimizer.state_dict()["state"], optimizer.state_dict()["param_groups"]
    weights = [value for network in (model, trained) if network is not None for value in network.state_dict().values()]
    tensors = [*weights, *(value for each in state.values() for value in each.values())]
    return repr([[tensor.tolist() for tensor in tensors], [sorted(each) for each in state.values()], groups])


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_checkpoints(one_thread: None) -> None:
    """Damaged after the sums were made, and before: then they fit."""
    saved = {name: checkpoint.encode(*make(name), PROGRESS) for name in ("sgd", "adam", "muon")}
    targets: dict[str, Any] = {name: make(name) for name in saved}
    ema, made, trained = targets["ema"] = make_with_ema("adam")
    saved["ema"] = checkpoint.encode(ema, made, PROGRESS, trained)
    untouched = {name: everything(*target) for name, target in targets.items()}

    def parse(rng: Random) -> None:
        kind = rng.choice(list(saved))
        files = dict(saved[kind if rng.random() < 0.9 else rng.choice(list(saved))])
        names = [each for each in files if each != checkpoint.MANIFEST]
        name = rng.choice(names)
        if name == checkpoint.PROGRESS:
            files[name] = hostile_json(rng, PROGRESS)
        elif name == checkpoint.OPTIMIZER and rng.random() < 0.7:
            files[name] = hostile_state(rng, files[name])
        else:
            files[name] = damaged(rng, files[name])
        if rng.random() < 0.9:
            files[checkpoint.MANIFEST] = checkpoint.manifest_of({each: files[each] for each in names}).encode()
        elif rng.random() < 0.5:
            files[checkpoint.MANIFEST] = hostile_json(rng, json.loads(files[checkpoint.MANIFEST]))
        model, optimizer, *trained = targets[kind]
        try:
            progress = restored(files, *targets[kind])
        except DamagedCheckpoint:
            assert everything(*targets[kind]) == untouched[kind]
            raise
        assert isinstance(progress, dict)
        [*trained, model][0](torch.ones(3, 2, 4, 4)).square().sum().backward()
        optimizer.step()  # what was let in can be gone on from
        untouched[kind] = everything(*targets[kind])

    fuzz(parse, told="checkpoint")


def hostile_state(rng: Random, content: bytes) -> bytes:
    """Return an optimizer's file that is whole outside, and has damage within, or another state."""
    if rng.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = rng.choice([name for name in members if name.endswith("data.pkl")] * 5 + list(members))
        members[name] = damaged(rng, members[name])
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
            for each, inside in members.items():
                archive.writestr(each, inside)
        return buffer.getvalue()
    state = torch.load(io.BytesIO(content), weights_only=True)
    tensors = [torch.zeros(()), torch.zeros(3), torch.zeros(1).expand(2, 2, 3, 3), torch.zeros(2, 2, 3, 3).half()]
    where = rng.choice(list(state["state"].values()) + state["param_groups"] + [state["state"], state])
    key = rng.choice([*where, "step", "lr", 0, 77, "other"])
    where[key] = rng.choice([any_json(rng), *tensors])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Trap:
    """Calls something when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: Any) -> None:
        self.told = call, arguments

    def __reduce__(self) -> Any:
        return self.told


def with_state(state: Any, **options: Any) -> dict[str, bytes]:
    """Return a checkpoint with another optimizer's state, its sums put right."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    files = checkpoint.encode(*make("adam"), PROGRESS) | {checkpoint.OPTIMIZER: buffer.getvalue()}
    sums = checkpoint.manifest_of({name: files[name] for name in checkpoint.FILES})
    return files | {checkpoint.MANIFEST: sums.encode()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["state", "param_groups", "momentum"])
def test_nothing_runs_from_a_checkpoint(tmp_path: Path, place: str, zipped: bool) -> None:
    mark = tmp_path / "sprung"
    state = make("adam")[1].state_dict()
    for call in (Trap(os.mkdir, str(mark)), Trap(os.system, f"touch {mark}"), Trap(eval, f"open({str(mark)!r}, 'w')")):
        if place == "momentum":
            state["state"][0]["exp_avg"] = call
        else:
            state[place] = call
        files = with_state(state, _use_new_zipfile_serialization=zipped)
        assert outcome(lambda files=files: restored(files, *make("adam"))) == "refused"
        assert not mark.exists()


def test_a_checkpoint_takes_no_more_memory_than_it_has() -> None:
    """`bytearray` is among what torch calls for a file; and a compressed file may hold a thousand times its size."""
    inflated = io.BytesIO()
    with zipfile.ZipFile(inflated, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(100 << 20))
    bombs = [with_state({"state": Trap(bytearray, 1 << 32)}), with_state({})]
    bombs[1][checkpoint.OPTIMIZER] = inflated.getvalue()
    sums = checkpoint.manifest_of({name: bombs[1][name] for name in checkpoint.FILES})
    bombs[1][checkpoint.MANIFEST] = sums.encode()
    for files in bombs:
        model, optimizer = make("adam")
        assert memory_to_refuse(lambda f=files, m=model, o=optimizer: restored(f, m, o)) < 2**21


# --- places -----------------------------------------------------------------------------------------------------------

ESCAPES = ["..", "../x", "a/../../x", "/etc/passwd", "a/b", "a\0b", "a\n", "\ud800", "\u00e9", "x" * 5000, "", ".", "A"]


@pytest.mark.parametrize("name", ESCAPES)
def test_no_id_leads_out_of_the_storage(storage: Storage, name: str) -> None:
    flags = ["--storage", storage.uri]
    for job, named in (("train", "--run-id"), ("evaluate", "--run-id"), ("tune", "--search-id")):
        module = importlib.import_module(f"jobs.{job}")
        for more in ([], ["--resume"])[: 1 if job == "evaluate" else 2]:
            if not name and not more:
                continue  # stands for a name of our own
            assert outcome(lambda m=module, n=named, x=more: m.main([*flags, f"{n}={name}", *x]), named) == "refused"
    assert outcome(lambda: read_settings(storage, name), "--search-id") == "refused"
    assert not Path(storage.root).exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "a\0b", "\ud800"])
def test_a_storage_gives_no_path_that_lies_elsewhere(storage: Storage, name: str) -> None:
    for call in (storage.read_bytes, storage.exists, storage.list, storage.delete_folder):
        assert outcome(lambda call=call: call("runs", name), "leads out of --storage") == "refused"


@pytest.mark.parametrize(
    "place",
    [
        "../outside/epoch-0001",
        "/etc",
        "runs/a/../../../outside",
        "runs/b/epoch-0001",
        "runs/a/epoch-\0",
        "runs/a",
        "a" * 5000,
    ],
)
def test_a_run_is_evaluated_from_its_own_checkpoint_alone(storage: Storage, place: str) -> None:
    from fashion.inference import classifier

    row = dict.fromkeys(schemas.SCHEMAS["runs"].names) | RUN | {"checkpoint": place}
    assert outcome(lambda: classifier.check_run(storage, "a", row), "--run-id a") == "refused"


def test_a_damaged_checkpoint_is_refused_before_it_is_evaluated(storage: Storage) -> None:
    from fashion.inference import classifier

    row = dict.fromkeys(schemas.SCHEMAS["runs"].names) | RUN | {"checkpoint": "runs/a/epoch-0001"}
    for name, content in checkpoint.encode(*make("adam"), PROGRESS).items():
        assert outcome(lambda: classifier.check_run(storage, "a", row), "no whole checkpoint") == "refused"
        put(storage, content, "runs", "a", "epoch-0001", name)
    assert outcome(lambda: classifier.check_run(storage, "a", row), "model.safetensors cannot be used") == "refused"
