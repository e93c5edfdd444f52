"""A data set as token ids: every text is tokenised once, ahead, and batches are cut out of memory without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_st.data import LABEL_COLUMNS
from triton_st.losses.columns import TEXT_IDS, text_id

TEXTS_AT_ONCE = 4096


class TokenizedDataset:
    """Token ids of the text columns of a data set, and its labels if it has any.

    A text that occurs in many rows is tokenised and kept once.

    Args:
        dataset: a `datasets.Dataset`; every column but one named like a label (`LABEL_COLUMNS`) holds texts.
        tokenize: texts -> packed features, truncated as the model wants them (`SentenceTransformer.tokenize`).
        prompts: a text to put before every text, or column name -> such a text.
        name: what errors call the data set.
        text_ids: put an id for each text, the same for the same text under any prompt, into the features.

    Raises:
        TypeError: `dataset` is not a `datasets.Dataset`, or a cell is no string (or a label no number).
        ValueError: no rows, no text column, more than one label column, or a prompt for a column that is not there.
    """

    def __init__(
        self,
        dataset: Any,
        tokenize: Callable[[list[str]], Mapping[str, Any]],
        prompts: str | Mapping[str, str] | None = None,
        name: str = "dataset",
        *,
        text_ids: bool = False,
    ) -> None:
        if not hasattr(dataset, "column_names") or isinstance(dataset, dict) or not hasattr(dataset, "__len__"):
            raise TypeError(f"`{name}`: expected one datasets.Dataset, got {type(dataset).__name__}")
        if len(dataset) == 0:
            raise ValueError(f"`{name}`: has no rows")
        labels = [column for column in dataset.column_names if column in LABEL_COLUMNS]
        self.columns = [column for column in dataset.column_names if column not in LABEL_COLUMNS]
        if not self.columns or len(labels) > 1:
            raise ValueError(
                f"`{name}`: expected text columns and at most one of {', '.join(LABEL_COLUMNS)}; "
                f"got {', '.join(dataset.column_names)}"
            )
        if isinstance(prompts, Mapping) and (unknown := set(prompts) - set(self.columns)):
            raise ValueError(f"`prompts`: {name} has no column {', '.join(sorted(unknown))}; it has {self.columns}")

        numbers: dict[str, int] = {}  # text -> its number, in order of appearance
        self._ids = np.empty((len(self.columns), len(dataset)), dtype=np.int64) if text_ids else None
        self._text_of = np.empty((len(self.columns), len(dataset)), dtype=np.int64)  # [columns, rows]
        for index, column in enumerate(self.columns):
            prompt = prompts.get(column, "") if isinstance(prompts, Mapping) else prompts or ""
            cells = dataset[column][:]
            for row, text in enumerate(cells):
                if not isinstance(text, str):
                    raise TypeError(f"`{name}`, column {column!r}, row {row}: expected a string, got {text!r}")
                self._text_of[index, row] = numbers.setdefault(prompt + text, len(numbers))
                if self._ids is not None:
                    self._ids[index, row] = text_id(text.encode("utf-8", "surrogatepass"))

        texts = list(numbers)
        parts = [tokenize(texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
        self._input_ids = np.concatenate([part["input_ids"].cpu().numpy().astype(np.int32) for part in parts])
        self._lengths = np.concatenate([np.diff(part["cu_seqlens"].cpu().numpy()) for part in parts]).astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._labels = _numbers(dataset[labels[0]][:], name, labels[0]) if labels else None

    def __len__(self) -> int:
        """Rows."""
        return self._text_of.shape[1]

    def batch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return the packed features of some rows, one dict a column, on the CPU."""
        chosen = np.asarray(rows, dtype=np.int64)
        columns = [self._pack(texts) for texts in self._text_of[:, chosen]]
        if self._ids is not None:
            for column, ids in zip(columns, self._ids[:, chosen], strict=True):
                column[TEXT_IDS] = torch.from_numpy(ids)
        return columns

    def labels(self, rows: Sequence[int]) -> Tensor | None:
        """Return the labels of some rows, or None where the data set has no label column."""
        return None if self._labels is None else self._labels[torch.as_tensor(rows)]

    def _pack(self, texts: np.ndarray) -> dict[str, Any]:
        lengths = self._lengths[texts]
        cu_seqlens = np.zeros(len(texts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        offsets = np.repeat(self._starts[texts] - cu_seqlens[:-1], lengths)
        return {
            "input_ids": torch.from_numpy(self._input_ids[offsets + np.arange(len(offsets))].astype(np.int64)),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": int(lengths.max(initial=0)),
        }

    def digest(self) -> str:
        """Return a hash of everything that training sees of the data: token ids, lengths, rows, labels."""
        sha = hashlib.sha256(repr(self._text_of.shape).encode())
        for array in (self._input_ids, self._lengths, self._text_of):
            sha.update(np.ascontiguousarray(array).data)
        if self._labels is not None:
            sha.update(self._labels.contiguous().numpy().data)
        return sha.hexdigest()


def _numbers(cells: list[Any], name: str, column: str) -> Tensor:
    for row, cell in enumerate(cells):
        if not isinstance(cell, (int, float)):
            raise TypeError(f"`{name}`, column {column!r}, row {row}: expected a number, got {cell!r}")
    return torch.tensor(cells)
