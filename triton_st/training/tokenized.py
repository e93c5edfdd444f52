"""A data set as token ids: every text is tokenised once, ahead, in a thread beside training; batches are cut of them.

The thread spends its time in the tokenizer's Rust, which lets Python go on. It takes the texts in the order in which
training wants them, so that the first step waits for the first few thousand texts alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_st.data import LABEL_COLUMNS
from triton_st.losses.columns import TEXT_IDS, text_id

TEXTS_AT_ONCE = 1024


class TokenizedDataset:
    """Token ids of the text columns of a data set, and its labels if it has any.

    A text that occurs in many rows is tokenised and kept once. Nothing is tokenised before `start`, or before the first
    batch is wanted; a batch waits for its own texts alone.

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

        self._labels = _numbers(dataset[labels[0]][:], name, labels[0]) if labels else None
        self._name, self._tokenize, self._texts = name, tokenize, list(numbers)
        self._input_ids = np.empty(0, dtype=np.int32)  # of all texts tokenised so far, in the order of tokenising
        self._starts = np.zeros(len(numbers), dtype=np.int64)
        self._lengths = np.zeros(len(numbers), dtype=np.int64)
        self._is_there = np.zeros(len(numbers), dtype=bool)
        self._thread: ThreadPoolExecutor | None = None
        self._coming: deque[tuple[np.ndarray, Future[Mapping[str, Any]]]] = deque()

    def __len__(self) -> int:
        """Rows."""
        return self._text_of.shape[1]

    def start(self, rows: Sequence[int] = ()) -> None:
        """Tokenise what is not tokenised yet in a thread: the texts of `rows` first, in their order, then the others.

        Does nothing while such a thread is at work.
        """
        if self._thread is not None:
            return
        wanted = np.append(self._text_of[:, np.asarray(rows, dtype=np.int64)].T, np.arange(len(self._lengths)))
        order = wanted[np.sort(np.unique(wanted, return_index=True)[1])]
        order = order[~self._is_there[order]]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        for i in range(0, len(order), TEXTS_AT_ONCE):
            texts = order[i : i + TEXTS_AT_ONCE]
            self._coming.append((texts, self._thread.submit(self._tokenized, texts)))

    def stop(self) -> None:
        """End the thread, if there is one, after the texts at hand; `start` goes on from there."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._coming.clear()

    def batch(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return the packed features of some rows, one dict a column, on the CPU.

        Raises:
            ValueError: the tokenizer fails at a text, naming its column and row.
        """
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
        self._wait_for(texts)
        lengths = self._lengths[texts]
        cu_seqlens = np.zeros(len(texts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        offsets = np.repeat(self._starts[texts] - cu_seqlens[:-1], lengths)
        return {
            "input_ids": torch.from_numpy(self._input_ids[offsets + np.arange(len(offsets))].astype(np.int64)),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
            "max_seqlen": int(lengths.max(initial=0)),
        }

    def _wait_for(self, texts: np.ndarray) -> None:
        while not self._is_there[texts].all():
            self.start()
            numbers, future = self._coming.popleft()
            try:
                features = future.result()
            except BaseException:
                self.stop()
                raise
            lengths = np.diff(features["cu_seqlens"].cpu().numpy()).astype(np.int64)
            self._lengths[numbers] = lengths
            self._starts[numbers] = len(self._input_ids) + np.cumsum(lengths) - lengths
            new = features["input_ids"].cpu().numpy()
            end = len(self._input_ids)
            self._input_ids.resize(end + len(new), refcheck=False)  # in place: no view of it is ever handed out
            self._input_ids[end:] = new
            self._is_there[numbers] = True
            if not self._coming:
                self.stop()
                self._texts.clear()

    def _tokenized(self, texts: np.ndarray) -> Mapping[str, Any]:
        try:
            return self._tokenize([self._texts[text] for text in texts])
        except Exception as error:
            raise self._failure(texts, error) from error

    def _failure(self, texts: np.ndarray, error: Exception) -> ValueError:
        """What to raise for an error in tokenising these texts together: it names the row of the first to blame."""
        where = ""
        for text in texts:
            try:
                self._tokenize([self._texts[text]])
            except Exception as own:
                column, row = np.argwhere(self._text_of == text)[0]
                where, error = f", column {self.columns[column]!r}, row {row}", own
                break
        return ValueError(f"`{self._name}`{where}: cannot be tokenised: {type(error).__name__}: {error}")

    def digest(self) -> str:
        """Return a hash of everything that training sees of the data: token ids, lengths, rows, labels.

        It needs every text's tokens, and does not depend on their order of tokenising.
        """
        sha = hashlib.sha256(repr(self._text_of.shape).encode())
        features = self._pack(np.arange(len(self._lengths)))
        for array in (features["input_ids"].numpy().astype(np.int32), self._lengths, self._text_of):
            sha.update(np.ascontiguousarray(array).data)
        if self._labels is not None:
            sha.update(self._labels.contiguous().numpy().data)
        return sha.hexdigest()


def _numbers(cells: list[Any], name: str, column: str) -> Tensor:
    for row, cell in enumerate(cells):
        if not isinstance(cell, (int, float)):
            raise TypeError(f"`{name}`, column {column!r}, row {row}: expected a number, got {cell!r}")
    return torch.tensor(cells)
