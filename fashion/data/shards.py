"""Exact shards: which rows a rank owns for any number of workers, and the blocks that hold them."""

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ray.data
from fashion.data.rows import Split, to_table


def shard_bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open row range of a rank; ranges of all ranks cover every row once and differ by at most one."""
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


def cut_points(num_rows: int, min_workers: int, max_workers: int) -> list[int]:
    """Return sorted rows, 0 and `num_rows` included, where some allowed number of workers needs a cut.

    Cut there once, and every rank of every width finds its shard as a run of whole pieces.
    """
    cuts = {0, num_rows}
    for width in range(min_workers, max_workers + 1):
        cuts |= {shard_bounds(num_rows, rank, width)[0] for rank in range(width)}
    return sorted(cuts)


def blocks_of_shard(cuts: list[int], rank: int, world_size: int) -> list[int]:
    """Return which pieces (piece k is rows `cuts[k]` to `cuts[k + 1]`) make up a rank's shard."""
    start, stop = shard_bounds(cuts[-1], rank, world_size)
    assert {start, stop} <= set(cuts), (start, stop, cuts)
    return [k for k in range(len(cuts) - 1) if start <= cuts[k] and cuts[k + 1] <= stop]


def share_blocks(rows: Split, cuts: list[int]) -> "list[ray.ObjectRef]":
    """Put `rows` into the object store as a Ray Dataset, a block per piece between `cuts`; return the blocks.

    Ray Train's own split (`streaming_split(equal=True)`) drops rows, and hands blocks to whoever asks first; cut by
    row number, the same rank gets the same rows in every run. Workers pull their blocks as they are; Ray Data's own
    executor would start two actors, 8 s of CPU, for that one copy.
    """
    import ray.data

    table = to_table(rows)
    pieces = [table.slice(start, stop - start) for start, stop in itertools.pairwise(cuts)]
    # Of Ray's ways to make a Dataset, the one that starts no task.
    return list(ray.data.from_blocks(pieces).to_arrow_refs()) if pieces else []
