"""From texts to token states and embeddings, batch by batch: on the CPU's engine, or wherever else the model is."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Generator, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from triton_st import backend
from triton_st.engine import Engine, ahead
from triton_st.engine import problem as engine_problem
from triton_st.graphs import GraphedEncoder, eager_states
from triton_st.models.encoder import PackedEncoder
from triton_st.models.packing import Features, pack, to_device
from triton_st.models.pooling import Dense, Normalize, Pooling
from triton_st.progress import Bar, Silent

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 8192
"""Texts that are tokenized, sorted by length and embedded at a time, where the engine does not serve."""

_STATES_AT_ONCE = 256
"""Texts whose token states the engine computes at a time, in one piece of memory that lives as long as one of them."""


class Inference(nn.Module):
    """The part of a `SentenceTransformer` that computes what `encode` returns."""

    encoder: PackedEncoder
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    head: nn.ModuleList
    inference_dtype: str = "float32"  # one of `triton_st.engine.DTYPES`
    max_seq_length: int
    _engine: Engine | None = None
    _graphs: GraphedEncoder | None = None

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        raise NotImplementedError

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

    # --- without the engine -------------------------------------------------------------------------------------------

    def _activation_dtype(self) -> torch.dtype:
        """What activations are stored in where the engine does not serve."""
        if self.encoder.activation_dtype != torch.float32:  # asked for by `activations_in`, or a float64 model
            return self.encoder.activation_dtype
        if self.inference_dtype == "int8":
            _say_once("dtype int8 is for inference on the CPU, with its kernels; float32 serves here")
            return torch.float32
        return getattr(torch, self.inference_dtype)

    def _graphed(self, dtype: torch.dtype) -> GraphedEncoder | None:
        """The encoder with CUDA graphs; None where there are none."""
        if self.device.type != "cuda":
            return None
        if self._graphs is None or self._graphs.encoder is not self.encoder or self._graphs.dtype != dtype:
            self._graphs = GraphedEncoder(self.encoder, dtype)
        return self._graphs

    def _outputs(self, features: Features, hidden: Tensor) -> Features:
        """The features, with `token_embeddings` [T, D] and the `sentence_embedding` [B, D] made of them."""
        pooled = self.pooling(hidden, features["cu_seqlens"], features.get("prompt_length", 0))
        for module in self.head:
            pooled = module(pooled)
        return {**features, "token_embeddings": hidden, "sentence_embedding": pooled}

    def _batches(
        self, texts: list[str], prompt: str, tokens: int, bar: Bar
    ) -> Generator[tuple[list[int], list[list[int]], Features]]:
        """The indices and token ids of each batch's texts, longest first in each part of the texts, and its outputs."""
        dtype, prompt_length = self._activation_dtype(), self._uncounted(prompt)
        parts = [slice(start, start + _TEXTS_AT_ONCE) for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        with contextlib.closing(ahead(lambda part: self._prompted_ids(texts[part], prompt), parts)) as tokenized:
            for part, ids in zip(parts, tokenized, strict=True):
                for members in _token_batches([len(text_ids) for text_ids in ids], tokens):
                    chosen = [ids[i] for i in members]
                    yield [part.start + i for i in members], chosen, self._embedded(chosen, dtype, prompt_length)
                    bar.update(len(members))

    def _embedded(self, ids: list[list[int]], dtype: torch.dtype, prompt_length: int, alone: bool = False) -> Features:
        """Outputs for one batch of token ids; `alone`: with no other token in the same kernel."""
        features = pack(ids) | {"prompt_length": prompt_length}
        graphed = None if alone else self._graphed(dtype)
        with torch.inference_mode():
            hidden = eager_states(self.encoder, features, dtype) if graphed is None else graphed.states(features)
            return self._outputs(to_device(features, hidden.device), hidden)

    def _shares_tiles(self) -> bool:
        """Whether what is not finite in one text may reach its neighbours: see `triton_st.kernels.packed_attention`.

        Not where the weights are not finite themselves, for then every text is spoilt.
        """
        if backend.select(self.encoder.embeddings.tables()[0]) != "triton":
            return False
        return all(bool(weight.isfinite().all()) for layer in self.encoder.layers() for weight in layer.weights())

    def _prompted_ids(self, texts: list[str], prompt: str) -> list[list[int]]:
        return self._token_ids([prompt + text for text in texts] if prompt else texts)

    def _uncounted(self, prompt: str) -> int:
        """Tokens at the beginning of a text that pooling leaves out: the prompt's, with the special ones before it."""
        if not prompt or self.pooling.include_prompt:
            return 0
        [ids] = self._token_ids([prompt])
        return len(ids) - (bool(ids) and ids[-1] in self.tokenizer.all_special_ids)

    # --- either way ---------------------------------------------------------------------------------------------------

    def _embeddings(self, texts: list[str], prompt: str, tokens: int, dimension: int, bar: Bar) -> Tensor:
        """Embeddings [n, dimension]."""
        embeddings = torch.empty(len(texts), dimension, device=self.device)
        if (engine := self._cpu_engine()) is not None:
            self._embed_with(engine, texts, prompt, embeddings, bar)
            return embeddings
        with contextlib.closing(self._batches(texts, prompt, tokens, bar)) as batches:
            for members, _, outputs in batches:
                embeddings[members] = outputs["sentence_embedding"][:, :dimension].float()
        spoilt = (~embeddings.isfinite().all(1)).nonzero().flatten().tolist()
        if len(texts) > 1 and spoilt and self._shares_tiles():
            dtype, prompt_length = self._activation_dtype(), self._uncounted(prompt)
            for i in spoilt:
                outputs = self._embedded(self._prompted_ids([texts[i]], prompt), dtype, prompt_length, alone=True)
                embeddings[i] = outputs["sentence_embedding"][0, :dimension].float()
        return embeddings

    def _cpu_engine(self) -> Engine | None:
        """The engine for inference, if it serves the model as it stands; the model itself serves otherwise."""
        encoder = self.encoder
        if self.training or encoder.activation_dtype != torch.float32 or engine_problem(encoder) is not None:
            return None
        if self._engine is None or self._engine.encoder is not encoder or self._engine.dtype != self.inference_dtype:
            self._engine = Engine(encoder, self.inference_dtype)
        return self._engine

    def _embed_with(self, engine: Engine, texts: list[str], prompt: str, out: Tensor, bar: Bar) -> None:
        """Embed into out [n, dimension]; texts are tokenized while others are embedded."""
        unit = len(self.head) == 1 and isinstance(self.head[0], Normalize)
        direct = unit or len(self.head) == 0
        pooled = out if direct else torch.empty(len(texts), self.pooling.output_dimension(engine.hidden_size))
        with torch.inference_mode():
            engine.embed_texts(
                texts,
                lambda some: self._prompted_ids(some, prompt),
                pooled,
                pooling=self.pooling.modes,
                prompt_length=self._uncounted(prompt),
                normalize=unit,
                done=bar.update,
            )
            if not direct:
                for module in self.head:
                    pooled = engine.dense(module, pooled) if isinstance(module, Dense) else module(pooled)
                out.copy_(pooled[:, : out.shape[1]])

    def _features(
        self, texts: list[str], prompt: str, tokens: int, dimension: int, everything: bool, bar: Bar
    ) -> list[dict[str, Tensor]]:
        """Of every text: `token_embeddings` [L, D]; if `everything`, `input_ids` [L], `sentence_embedding` [D] too."""
        items: list[dict[str, Tensor]] = [{} for _ in texts]
        if (engine := self._cpu_engine()) is not None:
            for start in range(0, len(texts), _STATES_AT_ONCE):
                part = slice(start, start + _STATES_AT_ONCE)
                features = pack(self._prompted_ids(texts[part], prompt))
                features["token_embeddings"] = engine.states(features["input_ids"], features["cu_seqlens"])
                _take_apart(features, items[part])
                bar.update(len(items[part]))
            if everything:
                embeddings = torch.empty(len(texts), dimension)
                self._embed_with(engine, texts, prompt, embeddings, Silent())
                for item, embedding in zip(items, embeddings, strict=True):
                    item["sentence_embedding"] = embedding
            return items
        dtype, prompt_length = self._activation_dtype(), self._uncounted(prompt)
        with contextlib.closing(self._batches(texts, prompt, tokens, bar)) as batches:
            for members, ids, outputs in batches:
                _take_apart(outputs, [items[i] for i in members], dimension)
                if len(members) > 1 and not outputs["token_embeddings"].isfinite().all() and self._shares_tiles():
                    for i, text_ids in zip(members, ids, strict=True):
                        alone = self._embedded([text_ids], dtype, prompt_length, alone=True)
                        _take_apart(alone, items[i : i + 1], dimension)
        return items


def _take_apart(outputs: Features, items: list[dict[str, Tensor]], dimension: int | None = None) -> None:
    """Give each text's item its part of a batch's outputs; of `dimension` numbers, if embeddings are among these."""
    lengths = outputs["cu_seqlens"].diff().tolist()
    ids, states = (outputs[name].split(lengths) for name in ("input_ids", "token_embeddings"))
    for item, text_ids, text_states in zip(items, ids, states, strict=True):
        item |= {"input_ids": text_ids, "token_embeddings": text_states.float()}
    if dimension is not None:
        for item, embedding in zip(items, outputs["sentence_embedding"][:, :dimension].float(), strict=True):
            item["sentence_embedding"] = embedding


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


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
