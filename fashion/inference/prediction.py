"""Classifies a user's images in the cluster, through Ray Data: tasks read and decode, classify, and write parts.

A row of the Dataset is a part, so Ray Data may join and split its blocks as it likes; see `docs/design.md`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import ray
import ray.data

from fashion.cluster import connection
from fashion.cluster.nodes import wait_for_room
from fashion.cluster.plan import Workers, choose_workers, live_nodes
from fashion.cluster.storage_access import check_every_node_finds, check_every_node_sees
from fashion.config import IMAGE_SIZE, ScaleConfig, UserError, printable, require
from fashion.data.images.listing import Listing
from fashion.data.images.predictions import ROWS_PER_PART, Manifest, make_part, write_manifest, write_part
from fashion.data.images.reading import read_images
from fashion.inference.classifier import Classifier, ModelFiles
from fashion.reports.progress import ImageProgress
from fashion.storage import Storage
from fashion.training.run import prepare_process

# To reach a row in a group of a Parquet file, those before it are read. So a task reads several parts, an eighth of
# the largest group at least, and what is read twice stays small beside the classification.
READS_OF_A_GROUP = 8
# Ray Data joins what a task yields until it has this many bytes: with those of one part, parts go on one by one.
BLOCK_BYTES = ROWS_PER_PART * IMAGE_SIZE**2
# What tasks yield for each part: when it is read, and when it is written. A failure is a text: see `as_text`.
READ = pa.schema(
    [("part", pa.int64()), ("pixels", pa.binary()), ("errors", pa.list_(pa.string())), ("failure", pa.string())]
)
TOLD = pa.schema([("part", pa.int64()), ("images", pa.int64()), ("unreadable", pa.int64()), ("failure", pa.string())])
# Links that lead nowhere are listed too. Of so many files one is looked for that is really there.
FILES_TRIED = 1000


@dataclass(frozen=True)
class Shared:
    """What every process of a job needs; it travels through the object store, once to each node."""

    listing: Listing
    out: Storage
    files: ModelFiles
    photo: bool
    use_gpu: bool
    threads: int


LOADED: dict[str, tuple[Shared, Classifier]] = {}
"""The newest job of this process and its network, by the reference to `Shared` in hexadecimal."""


def load(reference: "ray.ObjectRef") -> tuple[Shared, Classifier]:
    """Return what a job needs, and its network; a process of Ray, which serves many tasks, loads them once."""
    if reference.hex() not in LOADED:
        shared: Shared = ray.get(reference)
        prepare_process(shared.threads)
        LOADED.clear()
        LOADED[reference.hex()] = shared, Classifier(shared.files, use_gpu=shared.use_gpu)
    return LOADED[reference.hex()]


def predict_parts(batch: pa.Table, shared: "ray.ObjectRef") -> pa.Table:
    """Classify and write the parts of a batch; return each one's number, images, and how many could not be read.

    Images that could not be read are classified as black ones, so that batches stay what they are. A failure, of the
    reading or of the writing, is returned too: see `as_text`.
    """
    job, classifier = load(shared)
    told: list[dict[str, Any]] = []
    for row in batch.to_pylist():
        part, errors, failure = row["part"], row["errors"], row["failure"]
        if failure is not None:
            told.append({"part": part, "images": 0, "unreadable": 0, "failure": failure})
            continue
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
        predictions = classifier.predict(pixels)
        paths, rows = places(job.listing, part * ROWS_PER_PART, part * ROWS_PER_PART + len(pixels))
        table = make_part(paths, rows, predictions.labels, predictions.probabilities, errors)
        try:
            write_part(job.out, part, table)
        except OSError as error:
            failure = as_text(error)
        unreadable = sum(error is not None for error in errors)
        told.append({"part": part, "images": len(pixels), "unreadable": unreadable, "failure": failure})
    return pa.Table.from_pylist(told, TOLD)


def places(listing: Listing, start: int, stop: int) -> tuple[pa.Array, pa.Array]:
    """Return the paths of images, and their rows in Parquet files, which are null for image files."""
    if listing.kind == "files":
        paths = pa.array([listing.path(number) for number in range(start, stop)], pa.string())
        return paths, pa.nulls(stop - start, pa.int64())
    numbers = np.arange(start, stop)
    files = np.searchsorted(listing.bounds, numbers, "right") - 1
    names = {number: listing.path(number) for number in np.unique(files).tolist()}
    return pa.array([names[number] for number in files.tolist()]), pa.array(numbers - listing.bounds[files])


def read_parts(batch: pa.Table, shared: "ray.ObjectRef") -> Iterator[pa.Table]:
    """Yield the parts of a batch of stretches, each as one row: its number, its pixels, its errors.

    Where a stretch cannot be read on, its next part has a failure in place of these.
    """
    job: Shared = ray.get(shared)
    for stretch in batch.to_pylist():
        part = stretch["first"]
        start, stop = part * ROWS_PER_PART, min(stretch["stop"] * ROWS_PER_PART, len(job.listing))
        try:
            for pixels, errors in read_images(job.listing, start, stop, ROWS_PER_PART, photo=job.photo):
                row = {"part": part, "pixels": pixels.tobytes(), "errors": errors, "failure": None}
                yield pa.Table.from_pylist([row], READ)
                part += 1
        except (UserError, OSError) as error:
            row = {"part": part, "pixels": None, "errors": None, "failure": as_text(error)}
            yield pa.Table.from_pylist([row], READ)


def as_text(failure: UserError | OSError) -> str:
    """Return what a task found wrong with a file or a storage, as a text that `raise_failure` takes.

    Ray Data hands on no exception of a task: it logs its traceback, and raises one of its own.
    """
    number = getattr(failure, "errno", None)
    return json.dumps({"is_users": isinstance(failure, UserError), "errno": number, "message": str(failure)})


def raise_failure(text: str) -> NoReturn:
    """Raise what `as_text` has made a text of: `UserError`, or `OSError` with the number that it had."""
    failure = json.loads(text)
    if failure["is_users"]:
        raise UserError(failure["message"])
    error = OSError(failure["message"])
    error.errno = failure["errno"]
    raise error


def stretches(missing: Sequence[int], longest: int) -> list[dict[str, int]]:
    """Return runs of parts that follow each other, of at most `longest` parts, as first part and end (excluded)."""
    found: list[dict[str, int]] = []
    for part in missing:
        if found and found[-1]["stop"] == part and part - found[-1]["first"] < longest:
            found[-1]["stop"] = part + 1
        else:
            found.append({"first": part, "stop": part + 1})
    return found


def make_manifest(listing: Listing, files: ModelFiles, images: str, model: str, *, photo: bool) -> Manifest:
    """Return what the predictions will be of; `images` and `model` are as the user named them.

    Raises `UserError` for `photo` with a column of pixels, which are no photographs.
    """
    require(
        not (photo and listing.holds_pixels),
        f"--photo is for photographs, and the column {listing.column} holds 28 x 28 pixels; leave it out",
    )
    return Manifest(
        images=printable(images),  # not every name of a file is text
        num_images=len(listing),
        listing_sha256=listing.digest,
        model=printable(model),
        model_sha256=files.sha256,
        photo=photo,
        column=listing.column,
    )


def plan_lines(listing: Listing, manifest: Manifest, missing: Sequence[int], out: Storage) -> list[str]:
    """Return the plan of a job as text for the console."""
    what = "image files" if listing.kind == "files" else f"rows of {len(listing.names)} Parquet file(s)"
    others = f", {listing.num_others:,} other files passed over" if listing.num_others else ""
    done = manifest.num_parts - len(missing)
    lines = [
        f"images     {len(listing):,} {what} of {manifest.images}{others}",
        f"model      {manifest.model}",
        f"out        {printable(out.uri)}",
    ]
    kept = f"{done} of {manifest.num_parts} parts are there already"
    return lines + ([kept + ("; nothing to do" if not missing else "")] if done else [])


def predict_missing(
    listing: Listing, files: ModelFiles, out: Storage, missing: Sequence[int], *, manifest: Manifest, scale: ScaleConfig
) -> None:
    """Connect to the cluster, and write the manifest and the parts `missing`, with a line or a bar of progress.

    Raises `UserError` if the cluster is too small, if one of its nodes does not see `out` or the images, or if a
    Parquet file is damaged; `nodes.NodesNotUp` if awaited nodes do not come; `OSError` if a storage no longer answers.
    """
    connection.connect()
    workers = wait_for_room(lambda: plan_workers(scale), scale.wait_for_nodes_s)
    each = f"{scale.cpus_per_worker:g} CPU" + (" and 1 GPU" if workers.use_gpu else "")
    print(f"workers    {workers.high}, each {each}{f' ({workers.why})' if workers.why else ''}", flush=True)
    check_every_node_sees(out)
    check_every_node_finds(listing.storage, map(listing.file, range(min(len(listing.names), FILES_TRIED))))
    total = sum(min(ROWS_PER_PART, len(listing) - part * ROWS_PER_PART) for part in missing)
    write_manifest(out, manifest)
    with ImageProgress(total) as progress:
        predict_images(
            listing, files, out, missing, workers=workers, scale=scale, photo=manifest.photo, tell=progress.add
        )


def plan_workers(scale: ScaleConfig) -> Workers:
    """Return the workers that `scale` asks for on the live cluster; any number of them divides the images."""
    return choose_workers(live_nodes(), scale, batch_size=0, reserved=0, flag="--num-workers")


def predict_images(
    listing: Listing,
    files: ModelFiles,
    out: Storage,
    missing: Sequence[int],
    *,
    workers: Workers,
    scale: ScaleConfig,
    photo: bool,
    tell: Callable[[int, int], None],
) -> None:
    """Classify the parts `missing` of a listing, and write them to `out`; `tell(images, unreadable)` after each one.

    On CPUs both steps have equal resources, and Ray Data makes one task of them. For GPUs, images are read by as many
    tasks as there are CPUs. Raises `UserError` if a Parquet file is damaged, and `OSError` if a part cannot be written,
    as on a full disk, or if a storage no longer answers.
    """
    shared = ray.put(
        Shared(listing, out, files, photo=photo, use_gpu=workers.use_gpu, threads=scale.threads_per_worker)
    )
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = False
    longest = max(1, -(-listing.longest_group // (ROWS_PER_PART * READS_OF_A_GROUP)))
    items = stretches(missing, longest)
    reads: dict[str, Any] = {"num_cpus": 1, "compute": ray.data.TaskPoolStrategy()}
    predicts: dict[str, Any] = {
        "num_cpus": scale.cpus_per_worker,
        "compute": ray.data.TaskPoolStrategy(size=min(workers.high, len(missing))),
    }
    if workers.use_gpu:
        # By default Ray ends a process after one task on a GPU, and with it the network that it has loaded.
        predicts |= {"num_gpus": 1, "max_calls": 0}
    else:
        reads = predicts
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        read_parts, batch_size=1, batch_format="pyarrow", fn_kwargs={"shared": shared}, **reads
    )
    written = parts.map_batches(
        predict_parts, batch_size=1, batch_format="pyarrow", fn_kwargs={"shared": shared}, **predicts
    )
    seen: set[int] = set()
    for row in written.iter_rows():
        if row["failure"] is not None:
            raise_failure(row["failure"])
        assert row["part"] not in seen, row
        seen.add(row["part"])
        tell(row["images"], row["unreadable"])
    assert seen == set(missing), (len(seen), len(missing))
