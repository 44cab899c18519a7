"""Exact shards: which rows belong to a rank of W, and the rows themselves, out of blocks in Ray's object store.

Ray Train's own split (`streaming_split(equal=True)`) drops rows, and gives a block to whichever worker asks first. With
shards by row number, a rank gets the same rows in every run, and blocks need not be cut for each number of workers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from fashion.data.rows import SCHEMA, Split, from_table

if TYPE_CHECKING:
    import ray


def shard_bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return first row and end (excluded) of a rank's shard.

    The shards of all ranks hold every row exactly once, and differ by at most one row in size.
    """
    return num_rows * rank // world_size, num_rows * (rank + 1) // world_size


@dataclass(frozen=True)
class StoredRows:
    """Consecutive rows in Ray's object store: references to the blocks (Arrow tables) that hold them.

    Block k holds the rows numbered from `bounds[k]` up to, not including, `bounds[k + 1]`. These rows are those from
    `start` up to, not including, `stop`; the first and the last block may hold others as well.
    """

    references: "tuple[ray.ObjectRef, ...]"
    bounds: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of_blocks(cls, references: "Sequence[ray.ObjectRef]", num_rows: Sequence[int]) -> "StoredRows":
        """Return all rows of blocks that hold `num_rows` rows each, in this order."""
        assert len(references) == len(num_rows), (len(references), len(num_rows))
        bounds = (0, *itertools.accumulate(num_rows))
        return cls(tuple(references), bounds, 0, bounds[-1])

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, first: int, end: int) -> "StoredRows":
        """Return the rows from the `first` of these up to, not including, the `end`, without the blocks of others."""
        assert 0 <= first <= end <= len(self), (first, end, len(self))
        start, stop = self.start + first, self.start + end
        blocks = [
            number
            for number, (lower, upper) in enumerate(itertools.pairwise(self.bounds))
            if max(lower, start) < min(upper, stop)
        ]
        if not blocks:
            return StoredRows((), (start,), start, start)
        chosen = slice(blocks[0], blocks[-1] + 1)
        return StoredRows(self.references[chosen], self.bounds[chosen.start : chosen.stop + 1], start, stop)

    def followed_by(self, others: "StoredRows") -> "StoredRows":
        """Return these rows and `others`, which must be the next rows in the same blocks' numbering."""
        assert self.stop == others.start, (self.stop, others.start)
        # A block that holds the last of these and the first of `others` is in both.
        shared = 1 if self.references and others.references and self.bounds[-1] > others.bounds[0] else 0
        references = self.references + others.references[shared:]
        return StoredRows(references, self.bounds + others.bounds[shared + 1 :], self.start, others.stop)

    def shard(self, rank: int, world_size: int) -> "StoredRows":
        """Return the shard of a rank."""
        return self.part(*shard_bounds(len(self), rank, world_size))

    def pull(self) -> Split:
        """Bring the blocks to this node, and return the rows; those of one block are not copied."""
        import ray

        tables = [
            block.slice(max(self.start - lower, 0), min(self.stop, upper) - max(self.start, lower))
            for block, (lower, upper) in zip(
                ray.get(list(self.references)), itertools.pairwise(self.bounds), strict=True
            )
        ]
        # Ray Data adds metadata to the schema.
        columns = [table.select(SCHEMA.names).cast(SCHEMA) for table in tables]
        rows = from_table(pa.concat_tables(columns) if columns else SCHEMA.empty_table())
        assert len(rows.labels) == len(self), (len(rows.labels), len(self))
        return rows
