"""From texts to embeddings: tokenizing, batching, and every way of asking for it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from triton_st import multi_process, util
from triton_st.engine import Engine
from triton_st.engine import problem as engine_problem
from triton_st.models.encoder import PackedEncoder
from triton_st.models.packing import Features, pack, to_device
from triton_st.models.pooling import Normalize, Pooling
from triton_st.quantization import check_precision, quantize_embeddings, quantized_shape

logger = logging.getLogger(__name__)

_TOKENS_PER_TEXT = 64
"""A batch of `encode` holds as many tokens as `batch_size` texts of this length, however long its texts are."""

_TEXTS_AT_ONCE = 4096
"""Texts that the tokenizer is given at a time: enough for its threads, few enough to hold their full encodings."""

_OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class Encoding(nn.Module):
    """The part of a `SentenceTransformer` that turns texts into embeddings."""

    encoder: PackedEncoder
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    head: nn.ModuleList
    inference_dtype: str = "float32"  # one of `triton_st.engine.DTYPES`
    _engine: Engine | None = None
    prompts: dict[str, str]
    default_prompt_name: str | None
    max_seq_length: int
    truncate_dim: int | None

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        raise NotImplementedError

    def _dimension(self) -> int:
        """Dimension of an embedding before it is truncated."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> Features:
        """Tokenize texts into packed features on the CPU, cut at `max_seq_length`, with no padding.

        Raises:
            TypeError: an entry is no string, naming its index.
        """
        return pack(self._token_ids(_checked_texts(texts)))

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # The padding and truncation that a tokenizer.json carries are not this model's: all-MiniLM's pads to 128.
        backend = self.tokenizer.backend_tokenizer
        rule = {"max_length": self.max_seq_length, "direction": self.tokenizer.truncation_side, "stride": 0}
        if backend.padding is not None:  # set only what differs: another thread may be encoding
            backend.no_padding()
        if backend.truncation is None or not rule.items() <= backend.truncation.items():
            backend.enable_truncation(**rule)
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts)]
        except TypeError:  # lone surrogates, which UTF-8 cannot carry
            texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
            return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

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
        the order of the input. There is no dropout, whatever mode the model is in: another thread may train it. On the
        CPU, in evaluation mode, `triton_st.engine` computes in `inference_dtype`, and batches are its own affair.

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
            out: an array, say a memory map, that the embeddings are written to; it is what is returned.
            ranges, calibration_embeddings: make int8 and uint8 codes of several calls comparable, as
                `triton_st.quantization.quantize_embeddings` says.

        Returns:
            [n, D] in the type that `precision` says; [D] for a single text; [0, D] for no texts.

        Raises:
            TypeError: an entry is no string, naming its index.
            ValueError: an argument out of range or not served, or an unknown prompt name.
        """
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
            embeddings = torch.from_numpy(np.concatenate([np.empty((0, dimension), np.float32), *chunks]))
        else:
            if device is not None:
                self.to(device)
            with tqdm(total=len(texts), desc="Encode", unit="text", disable=not show_progress_bar) as bar:
                tokens = batch_size * _TOKENS_PER_TEXT
                if output_value != "sentence_embedding":
                    items = self._features(texts, before, tokens, truncate_dim, bar)
                    if output_value is not None:
                        items = [item[output_value] for item in items]
                    return items[0] if single else items
                embeddings = self._embeddings(texts, before, tokens, dimension, bar)
            if normalize_embeddings:
                embeddings = util.normalize_embeddings(embeddings)
        result: Tensor | np.ndarray = embeddings
        if precision != "float32":
            result = quantize_embeddings(embeddings, precision, ranges, calibration_embeddings)
        return _delivered(result, out, single, convert_to_numpy, convert_to_tensor)

    def encode_query(self, inputs: str | Iterable[str] | None = None, **kwargs: Any) -> Any:
        """`encode` with the prompt named "query", if the model has one and none is given. Arguments as `encode`."""
        return self._encode_as(("query",), inputs, kwargs)

    def encode_document(self, inputs: str | Iterable[str] | None = None, **kwargs: Any) -> Any:
        """`encode` with the first prompt that the model has of "document", "passage" and "corpus", if none is given.

        Arguments as `encode`.
        """
        return self._encode_as(("document", "passage", "corpus"), inputs, kwargs)

    def _encode_as(self, names: tuple[str, ...], inputs: str | Iterable[str] | None, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("prompt_name") is None and kwargs.get("prompt") is None:
            kwargs["prompt_name"] = next((name for name in names if name in self.prompts), None)
        return self.encode(inputs, **kwargs)

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

    def _batches(self, texts: list[str], prompt: str, tokens: int, bar: tqdm) -> Iterator[tuple[list[int], Features]]:
        """The indices of each batch's texts, longest first, and the batch's outputs."""
        ids = [
            text_ids
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
            for text_ids in self._token_ids([prompt + text for text in texts[start : start + _TEXTS_AT_ONCE]])
        ]
        for members in _token_batches([len(text_ids) for text_ids in ids], tokens):
            features = to_device(pack([ids[i] for i in members]), self.device)
            if prompt and not self.pooling.include_prompt:
                features["prompt_length"] = self._prompt_length(prompt)
            with torch.inference_mode():
                outputs = self(features, dropout=False)
            yield members, outputs
            bar.update(len(members))

    def _prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt takes at the beginning of a text: with the special ones before it, not those after."""
        [ids] = self._token_ids([prompt])
        return len(ids) - (bool(ids) and ids[-1] in self.tokenizer.all_special_ids)

    def _embeddings(self, texts: list[str], prompt: str, tokens: int, dimension: int, bar: tqdm) -> Tensor:
        embeddings = torch.empty(len(texts), dimension, device=self.device)
        if (engine := self._cpu_engine()) is not None:
            self._embed_with(engine, texts, prompt, embeddings, bar)
            return embeddings
        for members, outputs in self._batches(texts, prompt, tokens, bar):
            embeddings[members] = outputs["sentence_embedding"][:, :dimension].float()
        return embeddings

    def _cpu_engine(self) -> Engine | None:
        """The engine for inference, if it serves the model as it stands; the model itself serves otherwise."""
        encoder = self.encoder
        if self.training or encoder.activation_dtype != torch.float32 or engine_problem(encoder) is not None:
            return None
        if self._engine is None or self._engine.encoder is not encoder or self._engine.dtype != self.inference_dtype:
            self._engine = Engine(encoder, self.inference_dtype)
        return self._engine

    def _embed_with(self, engine: Engine, texts: list[str], prompt: str, out: Tensor, bar: tqdm) -> None:
        """Embed into out [n, dimension]; texts are tokenized while others are embedded."""
        unit = len(self.head) == 1 and isinstance(self.head[0], Normalize)
        direct = unit or len(self.head) == 0
        pooled = out if direct else torch.empty(len(texts), self.pooling.output_dimension(engine.hidden_size))
        with torch.inference_mode():
            engine.embed_texts(
                texts,
                lambda some: self._token_ids([prompt + text for text in some] if prompt else some),
                pooled,
                pooling=self.pooling.modes,
                prompt_length=self._prompt_length(prompt) if prompt and not self.pooling.include_prompt else 0,
                normalize=unit,
                done=bar.update,
            )
            if not direct:
                for module in self.head:
                    pooled = module(pooled)
                out.copy_(pooled[:, : out.shape[1]])

    def _features(
        self, texts: list[str], prompt: str, tokens: int, truncate_dim: int | None, bar: tqdm
    ) -> list[dict[str, Tensor]]:
        """Of every text: `input_ids` [L], `token_embeddings` [L, D], `sentence_embedding` [D]."""
        items: dict[int, dict[str, Tensor]] = {}
        for members, outputs in self._batches(texts, prompt, tokens, bar):
            lengths = outputs["cu_seqlens"].diff().tolist()
            ids, states = (outputs[name].split(lengths) for name in ("input_ids", "token_embeddings"))
            pooled = outputs["sentence_embedding"][:, :truncate_dim].float()
            for i, text_ids, text_states, embedding in zip(members, ids, states, pooled, strict=True):
                items[i] = {
                    "input_ids": text_ids,
                    "token_embeddings": text_states.float(),
                    "sentence_embedding": embedding,
                }
        return [items[i] for i in range(len(texts))]


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
        out[:] = embeddings.cpu().numpy() if isinstance(embeddings, Tensor) else embeddings
        return out[0] if single else out
    if to_tensor or not to_numpy:
        tensor = torch.as_tensor(embeddings)
        if single:
            return tensor[0]
        return tensor if to_tensor else list(tensor)
    array = embeddings.cpu().numpy() if isinstance(embeddings, Tensor) else embeddings
    return array[0] if single else array


def _token_batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Cut texts, longest first, into batches of at most `tokens` tokens (a longer text goes alone)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = total = 0
    for end, i in enumerate(order):
        if end > start and total + lengths[i] > tokens:
            yield order[start:end]
            start, total = end, 0
        total += lengths[i]
    if start < len(order):
        yield order[start:]
