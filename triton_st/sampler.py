"""Which rows make up each batch: plain shuffling, and batches in which no text appears twice.

A sampler plans a whole epoch at once from (seed, epoch). So its length is exact, the same epoch can be drawn again
after a restart, and starting in its middle costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import Sampler

__all__ = ["DefaultBatchSampler", "NoDuplicatesBatchSampler"]

IntArray = npt.NDArray[np.int64]


class DefaultBatchSampler(Sampler[list[int]]):
    """Batches of a seeded shuffle: each row once an epoch, the remainder as a last, smaller batch.

    The order is `torch.randperm` under a generator seeded with `seed + epoch`: in epoch 0 the one that torch's
    `RandomSampler`, and so sentence-transformers, draws from a fresh generator of that seed.

    Args:
        dataset: the rows; only how many there are matters here.
        batch_size: rows in a batch.
        drop_last: leave out batches with fewer rows.
        seed: what the shuffles derive from, together with the epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool = False, seed: int = 0) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size: expected an int, got {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if len(dataset) == 0:
            raise ValueError("dataset: has no rows")
        self.num_rows = len(dataset)
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.epoch = 0
        self._planned: tuple[int, IntArray, IntArray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The exact number of batches in the current epoch."""
        return self.num_batches(self.epoch)

    def num_batches(self, epoch: int) -> int:
        """The exact number of batches in `epoch`; without duplicates it can differ from one epoch to the next."""
        return len(self._plan(epoch)[1]) - 1

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the current epoch, each a list of row indices."""
        return self.iterate_from(0)

    def iterate_from(self, first_batch: int) -> Iterator[list[int]]:
        """The batches of the current epoch from number `first_batch` on: what a resumed run has still to see."""
        if first_batch < 0:
            raise ValueError(f"first_batch: expected at least 0, got {first_batch}")
        rows, bounds = self._plan(self.epoch)
        for start, end in zip(bounds[first_batch:-1].tolist(), bounds[first_batch + 1 :].tolist(), strict=True):
            yield rows[start:end].tolist()

    def _plan(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Rows in the order they are used, and the bounds of the batches in it; the latest epoch's is kept."""
        if self._planned is None or self._planned[0] != epoch:
            rows, sizes = self._assign(self._shuffled_rows(epoch))
            if self.drop_last:
                rows = rows[np.repeat(sizes == self.batch_size, sizes)]
                sizes = sizes[sizes == self.batch_size]
            self._planned = (epoch, rows, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        return self._planned[1], self._planned[2]

    def _shuffled_rows(self, epoch: int) -> IntArray:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_rows, generator=generator).numpy()

    def _assign(self, order: IntArray) -> tuple[IntArray, IntArray]:
        """Rows sorted by batch, and the size of each batch, from rows in shuffled order."""
        full, rest = divmod(len(order), self.batch_size)
        return order, np.array([self.batch_size] * full + [rest] * (rest > 0), dtype=np.int64)


class NoDuplicatesBatchSampler(DefaultBatchSampler):
    """Batches in which no text appears in two rows, whatever the columns: for losses with in-batch negatives.

    Gives the batches of sentence-transformers' sampler of the same name, seed and epoch, in the same order: each batch
    takes, in shuffled order, the rows left over by earlier batches that share no text with it, until it is full. A row
    that clashes thus goes first into one of the next batches. Rows are used once an epoch; texts are compared exactly,
    so a text in two columns of the SAME row, which no choice of batches can part, is let be.

    Two differences. `len()` is the exact number of batches, where sentence-transformers estimates ceil(rows /
    batch_size): clashes at the end of an epoch can leave more, smaller batches. And `drop_last=True` leaves out every
    incomplete batch and stops there, where sentence-transformers draws rows again until the estimate is reached.

    Time is linear in the rows but for contrived data: see `_first_fit`. Texts become numbers once, here, by Arrow's
    dictionary encoding, which is exact: there are no hashes and no collisions.

    Args:
        dataset: the rows; its string columns are compared, others (labels) are not.
        batch_size: rows in a full batch.
        drop_last: leave out batches with fewer rows.
        seed: what the shuffles derive from, together with the epoch.

    Raises:
        ValueError: no rows, no text column, or a cell that is null.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool = False, seed: int = 0) -> None:
        super().__init__(dataset, batch_size, drop_last, seed)
        self._keys, self._key_texts = _group_rows_by_repeated_texts(_text_codes(dataset))

    def _assign(self, order: IntArray) -> tuple[IntArray, IntArray]:
        batch_of = _first_fit(self._keys[order].tolist(), self._key_texts, self.batch_size)
        return order[np.argsort(batch_of, kind="stable")], np.bincount(batch_of)


def _text_codes(dataset: Dataset) -> npt.NDArray[np.int32]:
    """Number the texts of all columns: [rows, text columns], equal numbers for equal texts only."""
    names = [
        n for n, feature in dataset.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not names:
        raise ValueError(f"dataset: expected text columns, got {', '.join(dataset.column_names)}")
    table = dataset.select_columns(names).with_format("arrow")[:]
    for name in names:
        if table.column(name).null_count:
            raise ValueError(f"dataset, column {name!r}: expected strings, got null")
    chunks = [chunk.cast(pa.large_string()) for name in names for chunk in table.column(name).chunks]
    codes = pa.concat_arrays(chunks).dictionary_encode().indices.to_numpy()
    return codes.reshape(len(names), len(dataset)).T


def _group_rows_by_repeated_texts(codes: npt.NDArray[np.int32]) -> tuple[IntArray, list[tuple[int, ...]]]:
    """Give rows with the same repeated texts the same key.

    A text that occurs once in the data set clashes with nothing and is forgotten here.

    Returns:
        keys: [rows], the key of each row, -1 for a row without repeated texts.
        key_texts: for each key, its texts as numbers from 1, the most frequent first.
    """
    counts = np.bincount(codes.ravel())
    by_count = np.argsort(-counts, kind="stable")
    rank = np.empty_like(by_count)
    rank[by_count] = np.arange(1, len(by_count) + 1)
    repeated = int((counts > 1).sum())  # ranks 1..repeated: most frequent first
    ranks = np.where(rank <= repeated, rank, repeated + 1)[codes]
    ranks.sort(axis=1)

    keys = np.zeros(len(codes), dtype=np.int64)
    for column in ranks.T:  # one column at a time: far cheaper than sorting whole rows
        _, keys = np.unique(keys * (repeated + 2) + column, return_inverse=True)
    _, first_row = np.unique(keys, return_index=True)
    of_key = ranks[first_row]
    lengths = (of_key <= repeated).sum(axis=1)
    padded = zip(*(column.tolist() for column in of_key.T), strict=True)  # tuples at once: a third of the time
    key_texts = [texts[:length] for texts, length in zip(padded, lengths.tolist(), strict=True)]
    keys[lengths[keys] == 0] = -1
    return keys, key_texts


def _first_fit(keys: list[int], key_texts: list[tuple[int, ...]], batch_size: int) -> IntArray:
    """Put each row, in the order given, into the first batch that is not full and holds none of its texts.

    This gives the same batches as filling them one after the other, each from all the rows left over, but in one pass:
    what a row may skip is remembered, in three ways that only ever grow.

    - For all rows, the first batch that is not full.
    - Per key (a row's set of repeated texts), the batch after the last used: every earlier one stays blocked.
    - Per text, a union-find over batch numbers: from a batch once found to hold it to the next that might not. That of
      the most frequent text of a row also skips full batches.

    What is left to walk are alternations between batches blocked by one text of a row and by another, once per key:
    for n rows at most n**1.5 steps, with data made for it; a few per row in practice.
    """
    stride = len(keys) + 1  # more than there can be batches: text * stride + batch is unique
    after: dict[int, int] = {}
    start = [0] * len(key_texts)
    sizes = [0]
    held: list[set[int]] = [set()]  # the repeated texts in each batch; emptied when it is full
    head = 0
    batch_of = np.empty(len(keys), dtype=np.int64)
    for position, key in enumerate(keys):
        batch = head
        if key >= 0:
            texts = key_texts[key]
            batch = max(start[key], head)
            while batch < len(sizes):
                if sizes[batch] == batch_size:
                    blocking = texts[0]
                else:
                    here = held[batch]
                    for blocking in texts:
                        if blocking in here:
                            break
                    else:
                        break
                batch = _skip(after, blocking * stride, batch)
            start[key] = batch + 1
        if batch == len(sizes):
            sizes.append(0)
            held.append(set())
        batch_of[position] = batch
        sizes[batch] += 1
        if sizes[batch] == batch_size:
            held[batch] = set()
            while head < len(sizes) and sizes[head] == batch_size:
                head += 1
        elif key >= 0:
            held[batch].update(texts)
    return batch_of


def _skip(after: dict[int, int], base: int, batch: int) -> int:
    """The first batch beyond `batch` that is not known to be blocked; everything passed will lead straight to it."""
    passed = [base + batch]
    batch = after.get(base + batch, batch + 1)
    while (beyond := after.get(base + batch)) is not None:
        passed.append(base + batch)
        batch = beyond
    for link in passed:
        after[link] = batch
    return batch
