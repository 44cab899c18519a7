"""A rank's rows: pulled from the object store once, or streamed from Ray Data in every epoch."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from fashion.config import TrainConfig
from fashion.data.rows import SCHEMA, Split, from_table
from fashion.model.device import to_device
from fashion.training.batches import Augmentation, Batch, stream_seed
from fashion.training.run import Rank, Shards, resident_batches

# Rows that are read, and shuffled among themselves, at a time: 6.4 MB of pixels.
STREAM_BUFFER_ROWS = 8192


def open_shards(config: TrainConfig, settings: dict[str, Any], rank: Rank) -> Shards:
    """Return this rank's shards: val rows pulled onto the device, training rows pulled or to be streamed.

    `settings` are those of `worker.train_loop_per_worker`.
    """
    num_train_rows = settings["num_train_rows"]
    num_steps = config.steps_per_epoch(num_train_rows)
    train_batches: Callable[[int], Iterator[Batch]]
    if config.data_mode == "streaming":
        train_batches = streaming_batches(config, rank, num_steps)
    else:
        images, labels = pull_shard("train", settings, rank)
        train_batches = resident_batches(config, images, labels, rank, num_steps)
    return Shards(
        train_batches=train_batches,
        val=pull_shard("val", settings, rank),
        num_train_rows=num_train_rows,
        num_val_rows=len(settings["rows"]["val"]),
        pixel_mean=settings["pixel_mean"],
        pixel_std=settings["pixel_std"],
    )


def pull_shard(split: str, settings: dict[str, Any], rank: Rank) -> Batch:
    """Pull this rank's rows from the object store onto its device, once: (N, 1, 28, 28) uint8 and (N,) int64."""
    return to_tensors(settings["rows"][split].shard(rank.rank, rank.world_size).pull(), rank.device)


def as_tables(batches: Iterable[Any]) -> Iterator[pa.Table]:
    """Yield Ray's batches as tables with `data.rows.SCHEMA`, without the metadata that Ray adds."""
    for batch in batches:
        yield batch.select(SCHEMA.names).cast(SCHEMA)


def to_tensors(rows: Split, device: torch.device) -> Batch:
    """Copy rows to `device` as images (N, 1, 28, 28) uint8 and labels (N,) int64."""
    images = torch.from_numpy(np.array(rows.images)).unsqueeze(1)
    return images.to(device), torch.from_numpy(rows.labels.astype(np.int64)).to(device)


def streaming_batches(config: TrainConfig, rank: Rank, num_steps: int) -> Callable[[int], Iterator[Batch]]:
    """Return `train_batches(epoch)` for rows that do not fit in memory: read in every epoch, shuffled within a buffer.

    Ray's local shuffle buffer is not used: it yields short batches in mid-stream, and ranks with unequal numbers of
    steps wait for each other for ever.
    """
    shard = ray.train.get_dataset_shard("train")
    batch_size = config.global_batch_size // rank.world_size
    augmentation = Augmentation(config.flip, config.shift, config.erase)

    def train_batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(stream_seed(config.seed, epoch, rank.rank, 0))
        tables = as_tables(shard.iter_batches(batch_size=STREAM_BUFFER_ROWS, batch_format="pyarrow"))
        steps = 0
        for images, labels, index in resliced(tables, batch_size, generator):
            steps += 1
            images, labels = to_device(images, rank.device), to_device(labels, rank.device)
            yield augmentation.apply(images, index, seed=config.seed, epoch=epoch, generator=generator), labels
        assert steps == num_steps, (steps, num_steps)

    return train_batches


def resliced(
    tables: Iterable[pa.Table], batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield full batches of images (B, 1, 28, 28) uint8, labels and index (B,) int64, shuffled within each table.

    Rows left over from a table are shuffled with those of the next one; those left over from the last are dropped.
    """
    rest: tuple[Tensor, ...] | None = None
    for table in tables:
        split = from_table(table)
        images, labels = to_tensors(split, torch.device("cpu"))
        read: tuple[Tensor, ...] = (images, labels, torch.from_numpy(split.index.astype(np.int64)))
        rows = read if rest is None else tuple(torch.cat(pair) for pair in zip(rest, read, strict=True))
        order = torch.randperm(len(rows[1]), generator=generator)
        whole = len(order) // batch_size * batch_size
        for chosen in order[:whole].view(-1, batch_size):
            yield rows[0][chosen], rows[1][chosen], rows[2][chosen]
        rest = tuple(column[order[whole:]] for column in rows)
