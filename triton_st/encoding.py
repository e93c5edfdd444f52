"""From texts to embeddings: tokenizing, batching, and every way of asking for it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_st import multi_process, util
from triton_st.engine import settle_after_fork
from triton_st.inference import Inference
from triton_st.models.packing import Features, pack
from triton_st.progress import progress
from triton_st.quantization import check_precision, quantize_embeddings, quantized_shape

logger = logging.getLogger(__name__)

_TOKENS_PER_TEXT = 64
"""A batch of `encode` holds as many tokens as `batch_size` texts of this length, however long its texts are."""

_ROWS_AT_ONCE = 16_384
"""Embeddings in memory at a time where they go to an array of the caller's."""

_OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class Encoding(Inference):
    """The part of a `SentenceTransformer` that answers what is asked of it: texts in, embeddings in any form out."""

    prompts: dict[str, str]
    default_prompt_name: str | None
    truncate_dim: int | None

    def _dimension(self) -> int:
        """Dimension of an embedding before it is truncated."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> Features:
        """Tokenize texts into packed features on the CPU, cut at `max_seq_length`, with no padding.

        Raises:
            TypeError: an entry is no string, naming its index.
        """
        return pack(self._token_ids(_checked_texts(texts)))

    def encode(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | list[str | torch.device] | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: multi_process.Pool | None = None,
        chunk_size: int | None = None,
        *,
        sentences: str | Iterable[str] | None = None,
        task: str | None = None,
        out: np.ndarray | None = None,
        ranges: np.ndarray | None = None,
        calibration_embeddings: np.ndarray | None = None,
    ) -> Any:
        """Embed texts.

        Texts are sorted by length and cut into batches of `batch_size` * 64 tokens, without padding; results come in
        the order of the input. There is no dropout, whatever mode the model is in: another thread may train it.

        What is computed in is the model's `dtype`, for every `output_value`. On the CPU, in evaluation mode,
        `triton_st.engine` does it, and batches are its own affair. Elsewhere activations are stored in float32, float16
        or bfloat16 (on a GPU small batches are CUDA graphs, see `triton_st.graphs`), and int8, which the engine alone
        has, is float32 with a warning.

        Args:
            inputs: a text, or texts in a list, tuple, array, column, generator, … `sentences` is its older name.
            prompt_name: key of `prompts`; its text is put before every text. prompt: that text itself.
            batch_size: batch size in texts of 64 tokens.
            show_progress_bar: None shows one if this package's logger is at INFO or DEBUG.
            output_value: "sentence_embedding"; "token_embeddings": a list of [L, D] tensors; None: for each text a
                dict of both, and of its `input_ids`.
            precision: "float32" (as None is), or a smaller type: "int8", "uint8", "binary", "ubinary".
            convert_to_numpy: return a numpy array; else a list of tensors. convert_to_tensor: return one tensor.
            device: move the model there first; a list: encode in one process for each of these devices.
            normalize_embeddings: scale every embedding to length 1.
            truncate_dim: keep the first dimensions only (before normalising); the model's `truncate_dim` by default.
            pool: a pool of `start_multi_process_pool` to encode in. chunk_size: texts that a process takes at a time.
            task: taken for sentence-transformers' sake, and not used: every text takes the same way.
            out: an array, say a memory map, that the embeddings are written to, block by block; it is what is returned.
                If an exception ends the call, KeyboardInterrupt for one, the blocks written by then stay.
            ranges, calibration_embeddings: make int8 and uint8 codes of several calls comparable, as
                `triton_st.quantization.quantize_embeddings` says.

        Returns:
            [n, D] in the type that `precision` says; [D] for a single text; [0, D] for no texts.

        Raises:
            TypeError: an entry is no string, naming its index.
            ValueError: an argument out of range or not served, or an unknown prompt name.
        """
        settle_after_fork()
        if (inputs is None) == (sentences is None):
            raise TypeError("inputs: expected a string or strings" + (", got None" if inputs is None else " once"))
        given: str | Iterable[str] = sentences if inputs is None else inputs  # type: ignore[assignment]
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size <= 0:
            raise ValueError(f"batch_size: expected a positive int, got {batch_size!r}")
        if chunk_size is not None and chunk_size <= 0:
            raise ValueError(f"chunk_size: expected a positive int or None, got {chunk_size!r}")
        if output_value not in _OUTPUTS:
            raise ValueError(f"output_value: expected one of {', '.join(map(str, _OUTPUTS))}, got {output_value!r}")
        precision = precision or "float32"
        check_precision(precision)
        truncate_dim = self.truncate_dim if truncate_dim is None else checked_truncate_dim(truncate_dim)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        single = isinstance(given, str)
        texts = _checked_texts([given] if isinstance(given, str) else given)
        before = self._prompt(prompt, prompt_name) or ""
        dimension = min(self._dimension(), truncate_dim or self._dimension())
        if out is not None:
            _check_out(out, (len(texts), *quantized_shape(dimension, precision)), output_value)

        def finished(embeddings: Tensor) -> Tensor | np.ndarray:
            if precision == "float32":
                return embeddings
            return quantize_embeddings(embeddings, precision, ranges, calibration_embeddings)

        if pool is not None or isinstance(device, list):
            arguments = {
                "prompt": before,
                "batch_size": batch_size,
                "output_value": output_value,
                "truncate_dim": truncate_dim,
                "normalize_embeddings": normalize_embeddings,
            }
            chunks = self._encode_in_processes(pool, device, texts, chunk_size, show_progress_bar, arguments)
            if output_value != "sentence_embedding":
                items = [item for chunk in chunks for item in chunk]
                return items[0] if single else items
            rows = finished(torch.from_numpy(np.concatenate([np.empty((0, dimension), np.float32), *chunks])))
            if out is not None:
                out[:] = np.asarray(rows)
            return _delivered(rows, out, single, convert_to_numpy, convert_to_tensor)

        if device is not None:
            self.to(device)
        tokens = batch_size * _TOKENS_PER_TEXT
        with progress(bool(show_progress_bar), total=len(texts), desc="Encode", unit="text") as bar:
            if output_value != "sentence_embedding":
                items = self._features(texts, before, tokens, dimension, output_value is None, bar)
                if output_value is not None:
                    items = [item[output_value] for item in items]
                return items[0] if single else items
            row_by_row = precision not in ("int8", "uint8") or ranges is not None or calibration_embeddings is not None
            at_once = _ROWS_AT_ONCE if out is not None and row_by_row else max(len(texts), 1)
            for start in range(0, max(len(texts), 1), at_once):
                part = slice(start, start + at_once)
                embeddings = self._embeddings(texts[part], before, tokens, dimension, bar)
                if normalize_embeddings:
                    embeddings = util.normalize_embeddings(embeddings)
                rows = finished(embeddings)
                if out is not None:
                    out[part] = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
        return _delivered(rows, out, single, convert_to_numpy, convert_to_tensor)

    def encode_query(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`encode` with the prompt named "query", if the model has one and none is given. Arguments as `encode`."""
        prompt_name = self._prompt_for(("query",), prompt_name, prompt)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def encode_document(
        self,
        inputs: str | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """`encode` with the first prompt that the model has of "document", "passage" and "corpus", if none is given.

        Arguments as `encode`.
        """
        prompt_name = self._prompt_for(("document", "passage", "corpus"), prompt_name, prompt)
        return self.encode(inputs, prompt_name, prompt, *args, **kwargs)

    def _prompt_for(self, names: tuple[str, ...], prompt_name: str | None, prompt: str | None) -> str | None:
        if prompt_name is not None or prompt is not None:
            return prompt_name
        return next((name for name in names if name in self.prompts), None)

    def encode_multi_process(
        self,
        sentences: Iterable[str],
        pool: multi_process.Pool,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        chunk_size: int | None = None,
        show_progress_bar: bool | None = None,
        precision: str = "float32",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """`encode(..., pool=pool)` under its older name."""
        return self.encode(
            sentences,
            prompt_name,
            prompt,
            batch_size,
            show_progress_bar,
            precision=precision,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            pool=pool,
            chunk_size=chunk_size,
        )

    def encode_iter(self, inputs: Iterable[str], chunk_size: int = 16_384, **kwargs: Any) -> Iterator[np.ndarray]:
        """Embed a stream: an array [n, D] for every `chunk_size` texts, read only when it is wanted.

        Args:
            inputs: texts; an iterator is consumed chunk by chunk.
            chunk_size: texts at a time.
            kwargs: as `encode`. For precision "int8" and "uint8", `ranges` or `calibration_embeddings` are needed.

        Raises:
            TypeError: an entry is no string, naming its index in the stream. ValueError: as `encode`.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size <= 0:
            raise ValueError(f"chunk_size: expected a positive int, got {chunk_size!r}")
        if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Iterable):
            raise TypeError(f"inputs: expected strings, got {type(inputs).__name__}")
        calibrated = kwargs.get("ranges") is not None or kwargs.get("calibration_embeddings") is not None
        if kwargs.get("precision") in ("int8", "uint8") and not calibrated:
            raise ValueError("precision: int8 and uint8 of a stream need ranges or calibration_embeddings")
        return self._encode_chunks(iter(inputs), chunk_size, kwargs)

    def _encode_chunks(self, texts: Iterator[str], chunk_size: int, kwargs: dict[str, Any]) -> Iterator[np.ndarray]:
        first = 0
        while chunk := list(itertools.islice(texts, chunk_size)):
            yield self.encode(_checked_texts(chunk, first), **kwargs)
            first += len(chunk)

    def start_multi_process_pool(
        self, target_devices: Sequence[str | torch.device] | None = None
    ) -> multi_process.Pool:
        """Processes to `encode(..., pool=pool)` in: one for each device; by default each GPU, or four on the CPU."""
        return multi_process.start_pool(self, target_devices)

    @staticmethod
    def stop_multi_process_pool(pool: multi_process.Pool) -> None:
        """End the processes of a pool."""
        multi_process.stop_pool(pool)

    def _encode_in_processes(
        self,
        pool: multi_process.Pool | None,
        devices: Any,
        texts: list[str],
        chunk_size: int | None,
        show_progress_bar: bool,
        arguments: dict[str, Any],
    ) -> list[Any]:
        started = self.start_multi_process_pool(devices) if pool is None else None
        try:
            return multi_process.encode_in_pool(pool or started, texts, chunk_size, show_progress_bar, arguments)  # type: ignore[arg-type]
        finally:
            if started is not None:
                self.stop_multi_process_pool(started)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str | None:
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is not None and name not in self.prompts:
            raise ValueError(f"prompt_name: expected one of {list(self.prompts)}, got {name!r}")
        return None if name is None else self.prompts[name]


def checked_truncate_dim(value: Any) -> int | None:
    """None or a positive int; else ValueError."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"truncate_dim: expected a positive int or None, got {value!r}")
    return value


def _checked_texts(texts: Iterable[Any], first: int = 0) -> list[str]:
    """Texts as a list of str; TypeError names the index, counted from `first`, of what is none."""
    if isinstance(texts, np.ndarray) and texts.ndim:
        texts = texts.tolist()  # to Python's str at once
    # What is still an array has no dimension: it is one text, as a string is.
    if isinstance(texts, (str, bytes, np.ndarray)) or not isinstance(texts, Iterable):
        raise TypeError(f"inputs: expected a string or strings, got {type(texts).__name__}")
    checked = list(texts)
    for i, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"inputs[{first + i}]: expected a string, got {type(text).__name__}")
    return checked


def _check_out(out: np.ndarray, expected: tuple[int, int, np.dtype], output_value: str | None) -> None:
    if output_value != "sentence_embedding":
        raise ValueError("out: expected None with an output_value other than 'sentence_embedding'")
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out: expected a numpy array, got {type(out).__name__}")
    *shape, dtype = expected
    if list(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"out: expected {dtype} of shape {shape}, got {out.dtype} of shape {list(out.shape)}")
    if not out.flags.writeable:
        raise ValueError("out: expected an array that can be written to, got a read-only one")


def _delivered(
    embeddings: Tensor | np.ndarray, out: np.ndarray | None, single: bool, to_numpy: bool, to_tensor: bool
) -> Any:
    """Embeddings [n, D] in the form that was asked for."""
    if out is not None:
        return out[0] if single else out
    if to_tensor or not to_numpy:
        tensor = torch.as_tensor(embeddings)
        if single:
            return tensor[0]
        return tensor if to_tensor else list(tensor)
    array = embeddings.cpu().numpy() if isinstance(embeddings, Tensor) else embeddings
    return array[0] if single else array
