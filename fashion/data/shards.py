"""Exact shards: which rows belong to a rank of W, and rows in Ray's object store as blocks that fit any such W."""

import itertools
from typing import TYPE_CHECKING

from fashion.data.rows import Split, to_table

if TYPE_CHECKING:
    import ray


def shard_bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return first row and end (excluded) of a rank's shard.

    The shards of all ranks hold every row exactly once, and differ by at most one row in size.
    """
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def block_bounds(num_rows: int, min_workers: int, max_workers: int) -> list[int]:
    """Return the bounds of blocks from which every shard of `min_workers` to `max_workers` workers can be put together.

    Block k holds the rows from `bounds[k]` up to, not including, `bounds[k + 1]`; the first bound is 0 and the last one
    `num_rows`. With them an elastic run keeps its blocks when its number of workers changes.
    """
    bounds = {0, num_rows}
    for world_size in range(min_workers, max_workers + 1):
        bounds |= {shard_bounds(num_rows, rank, world_size)[0] for rank in range(world_size)}
    return sorted(bounds)


def blocks_of_shard(bounds: list[int], rank: int, world_size: int) -> list[int]:
    """Return the numbers of the blocks that make up a rank's shard; `bounds` are those of `block_bounds`."""
    start, stop = shard_bounds(bounds[-1], rank, world_size)
    assert {start, stop} <= set(bounds), (start, stop, bounds)
    return [k for k in range(len(bounds) - 1) if start <= bounds[k] and bounds[k + 1] <= stop]


def put_blocks(rows: Split, bounds: list[int]) -> "list[ray.ObjectRef]":
    """Put `rows` into the object store as a Ray Dataset with blocks between `bounds`; return references to the blocks.

    Ray Train's own split (`streaming_split(equal=True)`) drops rows, and gives a block to whichever worker asks first;
    with blocks chosen by row number, a rank gets the same rows in every run. Workers get their blocks with `ray.get`;
    Ray Data's own executor would start two actors, 8 s of CPU, for that one copy.
    """
    import ray.data

    table = to_table(rows)
    blocks = [table.slice(start, stop - start) for start, stop in itertools.pairwise(bounds)]
    # Of Ray's ways to make a Dataset, this one starts no task.
    return list(ray.data.from_blocks(blocks).to_arrow_refs()) if blocks else []
