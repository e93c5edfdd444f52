"""SentenceTransformer: texts in, embeddings out, on the packed encoder; under sentence-transformers' names."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from triton_st import ops, util
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.models.checkpoint import load_encoder, save_encoder
from triton_st.models.encoder import PackedEncoder
from triton_st.models.files import replacing_folder
from triton_st.models.folder import FolderConfig, find_folder, load_tokenizer, read_folder, write_folder
from triton_st.models.packing import Features, pack, to_device

logger = logging.getLogger(__name__)

__all__ = ["SentenceTransformer"]

_TOKENS_PER_TEXT = 64
"""A batch of `encode` holds as many tokens as `batch_size` texts of this length, however long its texts are."""

_TEXTS_AT_ONCE = 4096
"""Texts that the tokenizer is given at a time: enough for its threads, few enough to hold their full encodings."""

_OUTPUTS = ("sentence_embedding", "token_embeddings")


class SentenceTransformer(nn.Module):
    """A BERT encoder with mean pooling that embeds sentences.

    Args:
        model_name_or_path: a folder that sentence-transformers or transformers saved, or a hub id. None is refused:
            build a new model with `from_encoder`.
        device: where it runs; CUDA where there is one, else the CPU.
        prompts: name -> text put before every text encoded under that name; adds to and overrides the saved ones.
        default_prompt_name: the prompt used where `encode` is given none.
        cache_folder, revision, local_files_only, token: as `huggingface_hub.snapshot_download` takes them.
        trust_remote_code: accepted and without effect: code from a model repository is never run.
        model_card_data: what the card written by `save_pretrained` is made from.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan"; the saved one by default, else "cosine".
        truncate_dim: keep only the first dimensions of every embedding.

    Attributes:
        encoder: the `PackedEncoder`. tokenizer: a fast tokenizer of transformers.
        prompts, default_prompt_name, truncate_dim, model_card_data: as above.

    Raises:
        FileNotFoundError: no such folder or hub id, or the folder holds no model.
        ValueError: a model type, module, pooling mode or setting that is not served, naming it.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/SentenceTransformer.html;
    Reimers & Gurevych, https://arxiv.org/abs/1908.10084.
    """

    encoder: PackedEncoder
    _loaded_card: str | None  # README.md of the folder that the model came from

    def __init__(
        self,
        model_name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        model_card_data: SentenceTransformerModelCardData | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model_name_or_path, (str, Path)) or not str(model_name_or_path):
            raise TypeError(
                f"model_name_or_path: expected a folder or a hub id, got {model_name_or_path!r}; "
                "SentenceTransformer.from_encoder builds a new model"
            )
        folder = find_folder(
            model_name_or_path,
            cache_dir=cache_folder,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
        )
        config = read_folder(folder)
        config.prompts |= prompts or {}
        config.default_prompt_name = default_prompt_name or config.default_prompt_name
        config.similarity_fn_name = similarity_fn_name or config.similarity_fn_name
        config.truncate_dim = config.truncate_dim if truncate_dim is None else truncate_dim
        encoder = load_encoder(folder / config.encoder_path)
        tokenizer = load_tokenizer(folder / config.encoder_path, config)
        self._assemble(encoder, tokenizer, config)
        if model_card_data is not None:
            self.model_card_data = model_card_data
        if not Path(model_name_or_path).is_dir():
            self.model_card_data.set_base_model(str(model_name_or_path), revision)
        card = folder / "README.md"
        if card.is_file():
            self._loaded_card = card.read_text(encoding="utf-8", errors="replace")
        self.to(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")

    @classmethod
    def from_encoder(
        cls,
        encoder: PackedEncoder,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_length: int | None = None,
        pooling_mode: str = "mean",
        normalize: bool = False,
    ) -> SentenceTransformer:
        """Build a model from its parts, on the encoder's device.

        Args:
            encoder: a `triton_st.models.PackedEncoder`.
            tokenizer: a fast tokenizer of transformers whose ids the encoder knows.
            max_seq_length: longest sequence in tokens; the position table's size by default.
            pooling_mode: "mean".
            normalize: scale embeddings to length 1, as sentence-transformers' Normalize module does.
        """
        if not isinstance(encoder, PackedEncoder):
            raise TypeError(f"encoder: expected a triton_st.models.PackedEncoder, got {type(encoder).__name__}")
        if pooling_mode != "mean":
            raise ValueError(f"pooling_mode: {pooling_mode!r} is not served; served: 'mean'")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._assemble(encoder, tokenizer, FolderConfig(max_seq_length=max_seq_length, normalize=normalize))
        return model

    def _assemble(self, encoder: PackedEncoder, tokenizer: PreTrainedTokenizerBase, config: FolderConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(f"tokenizer: expected a fast tokenizer of transformers, got {type(tokenizer).__name__}")
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {encoder.config.vocab_size} tokens, the encoder's vocab_size, "
                f"got {len(tokenizer)}"
            )
        self.encoder = encoder
        self.training = encoder.training  # a loaded one is in evaluation mode
        self.tokenizer = tokenizer
        self.normalize = config.normalize
        self.prompts = dict(config.prompts)
        self.default_prompt_name = config.default_prompt_name
        if self.default_prompt_name is not None and self.default_prompt_name not in self.prompts:
            raise ValueError(
                f"default_prompt_name: expected one of {list(self.prompts)}, got {config.default_prompt_name!r}"
            )
        self.truncate_dim = config.truncate_dim
        self.similarity_fn_name = config.similarity_fn_name or "cosine"
        self.max_seq_length = (
            min(tokenizer.model_max_length, encoder.max_length)
            if config.max_seq_length is None
            else config.max_seq_length
        )
        self.model_card_data = SentenceTransformerModelCardData()
        self._loaded_card = None

    # --- settings -----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.encoder.embeddings.word_embeddings.weight.device

    @property
    def max_seq_length(self) -> int:
        """Longest sequence in tokens, special tokens included; longer texts are cut. At most the position table."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        least = self.tokenizer.num_special_tokens_to_add() + 1
        most = self.encoder.max_length
        if not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"max_seq_length: expected an int from {least} to {most}, got {value!r}")
        self._max_seq_length = value

    @property
    def truncate_dim(self) -> int | None:
        """How many dimensions `encode` keeps; None: all."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        self._truncate_dim = _checked_truncate_dim(value)

    @property
    def similarity_fn_name(self) -> str:
        """ "cosine", "dot", "euclidean" or "manhattan"."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: Any) -> None:
        name = getattr(value, "value", value)  # sentence-transformers' SimilarityFunction is an Enum of these names
        if name not in util.SIMILARITIES:
            raise ValueError(f"similarity_fn_name: expected one of {', '.join(util.SIMILARITIES)}, got {value!r}")
        self._similarity_fn_name = name

    def get_max_seq_length(self) -> int:
        """As `max_seq_length`."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Dimension of what `encode` returns."""
        dimension = self.encoder.config.hidden_size
        return dimension if self.truncate_dim is None else min(dimension, self.truncate_dim)

    def get_sentence_embedding_dimension(self) -> int:
        """As `get_embedding_dimension`, under its older name."""
        return self.get_embedding_dimension()

    def extra_repr(self) -> str:
        """What follows the encoder, for `print(model)` and the model card."""
        return f"max_seq_length={self.max_seq_length}, pooling_mode='mean', normalize={self.normalize}"

    # --- forward ------------------------------------------------------------------------------------------------------

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

    def forward(self, features: Features, dropout: bool = True) -> Features:
        """Embed a packed batch.

        Args:
            features: `input_ids` [T], `cu_seqlens` [B + 1], `max_seqlen`, optionally `token_type_ids` [T]; on the
                model's device.
            dropout: False for none in training mode either.

        Returns:
            The features, with `token_embeddings` [T, D] and `sentence_embedding` [B, D] in the activation dtype.
        """
        missing = [name for name in ("input_ids", "cu_seqlens", "max_seqlen") if name not in features]
        if missing:
            raise ValueError(f"features: expected a packed batch, as tokenize returns it; {', '.join(missing)} missing")
        hidden = self.encoder(
            features["input_ids"],
            features["cu_seqlens"],
            features["max_seqlen"],
            features.get("token_type_ids"),
            dropout=dropout,
        )
        pooled = ops.packed_mean_pool(hidden, features["cu_seqlens"])
        if self.normalize:
            pooled = util.normalize_embeddings(pooled)
        return {**features, "token_embeddings": hidden, "sentence_embedding": pooled}

    @contextlib.contextmanager
    def activations_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Store activations in `dtype` (float16, bfloat16 or float32) inside the block; parameters stay float32."""
        previous, self.encoder.activation_dtype = self.encoder.activation_dtype, dtype
        try:
            yield
        finally:
            self.encoder.activation_dtype = previous

    def gradient_checkpointing_enable(self) -> None:
        """As the encoder's: training keeps each layer's input alone and computes the layer again in backward."""
        self.encoder.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep what backward needs, as by default."""
        self.encoder.gradient_checkpointing_disable()

    # --- encode -------------------------------------------------------------------------------------------------------

    def encode(
        self,
        sentences: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Embed texts.

        Texts are sorted by length and cut into batches of `batch_size` * 64 tokens, without padding; results come in
        the order of the input. There is no dropout, whatever mode the model is in: another thread may train it.

        Args:
            sentences: a text, or texts in a list, tuple, array, column, generator, …
            prompt_name: key of `prompts`; its text is put before every text. prompt: that text itself.
            batch_size: batch size in texts of 64 tokens.
            show_progress_bar: None shows one if this package's logger is at INFO or DEBUG.
            output_value: "sentence_embedding", or "token_embeddings": a list of [L, D] tensors.
            precision: "float32", the one that is served.
            convert_to_numpy: return a numpy array; else a list of tensors. convert_to_tensor: return one tensor.
            device: move the model there first.
            normalize_embeddings: scale every embedding to length 1.
            truncate_dim: keep the first dimensions only (before normalising); the model's `truncate_dim` by default.

        Returns:
            float32 [n, D]; [D] for a single text; [0, D] for no texts.

        Raises:
            TypeError: an entry is no string, naming its index.
            ValueError: an argument out of range or not served, or an unknown prompt name.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size <= 0:
            raise ValueError(f"batch_size: expected a positive int, got {batch_size!r}")
        if precision != "float32":
            raise ValueError(f"precision: {precision!r} is not served; served: 'float32'")
        if output_value not in _OUTPUTS:
            raise ValueError(f"output_value: expected one of {', '.join(_OUTPUTS)}, got {output_value!r}")
        truncate_dim = self.truncate_dim if truncate_dim is None else _checked_truncate_dim(truncate_dim)
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        if device is not None:
            self.to(device)
        single = isinstance(sentences, str)
        texts = _checked_texts([sentences] if isinstance(sentences, str) else sentences)
        if before := self._prompt(prompt, prompt_name):
            texts = [before + text for text in texts]
        with tqdm(total=len(texts), desc="Encode", unit="text", disable=not show_progress_bar) as bar:
            if output_value == "token_embeddings":
                states = self._token_states(texts, batch_size * _TOKENS_PER_TEXT, bar)
                return states[0] if single else states
            embeddings = self._embeddings(texts, batch_size * _TOKENS_PER_TEXT, truncate_dim, bar)
        if normalize_embeddings:
            embeddings = util.normalize_embeddings(embeddings)
        if single:
            embeddings = embeddings[0]
        if convert_to_tensor:
            return embeddings
        if convert_to_numpy:
            return embeddings.cpu().numpy()
        return embeddings if single else list(embeddings)

    def _prompt(self, prompt: str | None, prompt_name: str | None) -> str | None:
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is not None and name not in self.prompts:
            raise ValueError(f"prompt_name: expected one of {list(self.prompts)}, got {name!r}")
        return None if name is None else self.prompts[name]

    def _batches(self, texts: list[str], tokens: int, bar: tqdm) -> Iterator[tuple[list[int], Features]]:
        """The indices of each batch's texts, longest first, and the batch's outputs."""
        ids = [
            text_ids
            for start in range(0, len(texts), _TEXTS_AT_ONCE)
            for text_ids in self._token_ids(texts[start : start + _TEXTS_AT_ONCE])
        ]
        for members in _token_batches([len(text_ids) for text_ids in ids], tokens):
            features = to_device(pack([ids[i] for i in members]), self.device)
            with torch.inference_mode():
                outputs = self(features, dropout=False)
            yield members, outputs
            bar.update(len(members))

    def _embeddings(self, texts: list[str], tokens: int, truncate_dim: int | None, bar: tqdm) -> Tensor:
        dimension = min(self.encoder.config.hidden_size, truncate_dim or self.encoder.config.hidden_size)
        embeddings = torch.empty(len(texts), dimension, device=self.device)
        for members, outputs in self._batches(texts, tokens, bar):
            embeddings[members] = outputs["sentence_embedding"][:, :dimension].float()
        return embeddings

    def _token_states(self, texts: list[str], tokens: int, bar: tqdm) -> list[Tensor]:
        states: dict[int, Tensor] = {}
        for members, outputs in self._batches(texts, tokens, bar):
            lengths = outputs["cu_seqlens"].diff().tolist()
            states.update(zip(members, outputs["token_embeddings"].float().split(lengths), strict=True))
        return [states[i] for i in range(len(texts))]

    # --- similarity ---------------------------------------------------------------------------------------------------

    def similarity(self, embeddings1: util.Embeddings, embeddings2: util.Embeddings) -> Tensor:
        """Similarity of every embedding of [M, D] with every one of [N, D], by `similarity_fn_name` -> [M, N]."""
        return util.SIMILARITIES[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: util.Embeddings, embeddings2: util.Embeddings) -> Tensor:
        """Similarity of embedding i with embedding i, both [N, D], by `similarity_fn_name` -> [N]."""
        return util.SIMILARITIES[self.similarity_fn_name][1](embeddings1, embeddings2)

    # --- save ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | Path, model_name: str | None = None, create_model_card: bool = True) -> None:
        """Write a folder that this class and sentence-transformers load.

        Everything is written to a temporary folder beside it first, so that nothing is ever half-written; other files
        in an existing folder stay.

        Args:
            path: the folder.
            model_name: name for the card's title.
            create_model_card: write README.md from `model_card_data` (for a model that was loaded with a card and
                neither trained nor evaluated since: that card).

        Raises:
            OSError: the folder cannot be written; nothing of it was touched.
        """
        config = FolderConfig(
            max_seq_length=self.max_seq_length,
            normalize=self.normalize,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            truncate_dim=self.truncate_dim,
        )
        if model_name is not None:
            self.model_card_data.model_name = model_name
        with replacing_folder(path) as folder:
            save_encoder(self.encoder, folder)
            self.tokenizer.model_max_length = self.max_seq_length
            self.tokenizer.save_pretrained(folder)
            write_folder(folder, config, self.encoder.config.hidden_size)
            if create_model_card:
                (folder / "README.md").write_text(self._card(), encoding="utf-8")

    def save(self, path: str | Path, model_name: str | None = None, create_model_card: bool = True) -> None:
        """As `save_pretrained`."""
        self.save_pretrained(path, model_name, create_model_card)

    def _card(self) -> str:
        card = self.model_card_data
        if self._loaded_card is not None and not card.evaluations and not card.hyperparameters:
            return self._loaded_card
        return card.to_card(self)


def _checked_truncate_dim(value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"truncate_dim: expected a positive int or None, got {value!r}")
    return value


def _checked_texts(texts: Iterable[Any]) -> list[str]:
    """Texts as a list of str; TypeError names the index of what is none."""
    if isinstance(texts, np.ndarray) and texts.ndim:
        texts = texts.tolist()  # to Python's str at once
    # What is still an array has no dimension: it is one text, as a string is.
    if isinstance(texts, (str, bytes, np.ndarray)) or not isinstance(texts, Iterable):
        raise TypeError(f"sentences: expected a string or strings, got {type(texts).__name__}")
    checked = list(texts)
    for i, text in enumerate(checked):
        if not isinstance(text, str):
            raise TypeError(f"sentences[{i}]: expected a string, got {type(text).__name__}")
    return checked


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
