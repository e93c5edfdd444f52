"""SentenceTransformer: texts in, embeddings out, on the packed encoder; under sentence-transformers' names."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from triton_st import util
from triton_st.encoding import Encoding, checked_truncate_dim
from triton_st.engine import checked_dtype
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.models.checkpoint import load_encoder, save_encoder
from triton_st.models.encoder import PackedEncoder
from triton_st.models.files import replacing_folder
from triton_st.models.folder import FolderConfig, find_folder, load_tokenizer, read_folder, write_folder
from triton_st.models.packing import Features
from triton_st.models.pooling import Dense, Normalize, Pooling

__all__ = ["SentenceTransformer"]


class SentenceTransformer(Encoding):
    """A BERT encoder with mean pooling that embeds sentences.

    Args:
        model_name_or_path: a folder that sentence-transformers or transformers saved, or a hub id. None is refused:
            build a new model with `from_encoder`.
        device: where it runs; CUDA where there is one, else the CPU.
        prompts: name -> text put before every text encoded under that name; adds to and overrides the saved ones.
            "query" and "document" are always there, empty by default.
        default_prompt_name: the prompt used where `encode` is given none.
        cache_folder, revision, local_files_only, token: as `huggingface_hub.snapshot_download` takes them;
            `use_auth_token` is an older name of `token`.
        trust_remote_code: accepted and without effect: code from a model repository is never run.
        processor_kwargs, config_kwargs: for transformers' tokenizer and config; `tokenizer_kwargs` is an older name.
        backend: "torch", the one there is.
        model_card_data: what the card written by `save_pretrained` is made from.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan"; the saved one by default, else "cosine".
        truncate_dim: keep only the first dimensions of every embedding.
        dtype: what `encode` computes in: "float32", "float16", "bfloat16" or, on the CPU, "int8" (see
            `triton_st.engine.Engine`); also as `model_kwargs={"dtype": …}`. Parameters stay float32.

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
        use_auth_token: bool | str | None = None,
        model_card_data: SentenceTransformerModelCardData | None = None,
        similarity_fn_name: str | None = None,
        truncate_dim: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__()
        loading = dict(model_kwargs or {})
        asked = [value for value in (dtype, loading.get("dtype"), loading.get("torch_dtype")) if value is not None]
        inference_dtype = checked_dtype(asked[0]) if asked and asked[0] != "auto" else "float32"
        if backend != "torch":
            raise ValueError(f"backend: expected 'torch', got {backend!r}; the kernels are this package's own")
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
            token=use_auth_token if token is None else token,
        )
        processor_kwargs = tokenizer_kwargs if processor_kwargs is None else processor_kwargs
        config = read_folder(folder)
        config.prompts |= prompts or {}
        config.default_prompt_name = default_prompt_name or config.default_prompt_name
        config.similarity_fn_name = similarity_fn_name or config.similarity_fn_name
        config.truncate_dim = config.truncate_dim if truncate_dim is None else truncate_dim
        encoder = load_encoder(folder / config.encoder_path, **(config_kwargs or {}))
        tokenizer = load_tokenizer(folder / config.encoder_path, config, **(processor_kwargs or {}))
        self._assemble(encoder, tokenizer, config)
        self.inference_dtype = inference_dtype
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
        pooling_mode: str | Sequence[str] = "mean",
        normalize: bool = False,
    ) -> SentenceTransformer:
        """Build a model from its parts, on the encoder's device.

        Args:
            encoder: a `triton_st.models.PackedEncoder`.
            tokenizer: a fast tokenizer of transformers whose ids the encoder knows.
            max_seq_length: longest sequence in tokens; the position table's size by default.
            pooling_mode: as `triton_st.models.pooling.Pooling` takes it: "mean", "cls", "max", …
            normalize: scale embeddings to length 1, as sentence-transformers' Normalize module does.
        """
        if not isinstance(encoder, PackedEncoder):
            raise TypeError(f"encoder: expected a triton_st.models.PackedEncoder, got {type(encoder).__name__}")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        head: list[Dense | Normalize] = [Normalize()] if normalize else []
        config = FolderConfig(max_seq_length=max_seq_length, pooling=Pooling(pooling_mode), head=head)
        model._assemble(encoder, tokenizer, config)
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
        self.pooling = config.pooling
        self.head = nn.ModuleList(config.head)
        self.prompts = {"query": "", "document": ""} | config.prompts
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
        return next(self.encoder.parameters()).device

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
        self._truncate_dim = checked_truncate_dim(value)

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

    def get_backend(self) -> str:
        """ "torch", as sentence-transformers calls what runs without ONNX or OpenVINO."""
        return "torch"

    def get_max_seq_length(self) -> int:
        """As `max_seq_length`."""
        return self.max_seq_length

    def get_embedding_dimension(self) -> int:
        """Dimension of what `encode` returns."""
        dimension = self._dimension()
        return dimension if self.truncate_dim is None else min(dimension, self.truncate_dim)

    def _dimension(self) -> int:
        dimension = self.pooling.output_dimension(self.encoder.config.hidden_size)
        for module in self._head_modules():
            dimension = module.output_dimension(dimension)
        return dimension

    def _head_modules(self) -> list[Dense | Normalize]:
        return cast("list[Dense | Normalize]", list(self.head))

    @contextlib.contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """`encode` keeps the first `truncate_dim` dimensions inside the block."""
        previous, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = previous

    def set_pooling_include_prompt(self, include_prompt: bool) -> None:
        """Whether a prompt's tokens take part in the pooling; False is what INSTRUCTOR models want."""
        self.pooling.include_prompt = include_prompt

    def get_sentence_embedding_dimension(self) -> int:
        """As `get_embedding_dimension`, under its older name."""
        return self.get_embedding_dimension()

    def extra_repr(self) -> str:
        """What follows the encoder, for `print(model)` and the model card."""
        return f"max_seq_length={self.max_seq_length}"

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, features: Features, dropout: bool = True, token_embeddings: bool = True) -> Features:
        """Embed a packed batch.

        Args:
            features: `input_ids` [T], `cu_seqlens` [B + 1], `max_seqlen`, optionally `token_type_ids` [T]; on the
                model's device; optionally `prompt_length`, of which pooling takes note.
            dropout: False for none in training mode either.
            token_embeddings: False where only the embeddings are wanted: mean pooling then takes place on the last
                layer's way out, and there are none.

        Returns:
            The features, with `token_embeddings` [T, D] and `sentence_embedding` [B, D] in the activation dtype.
        """
        missing = [name for name in ("input_ids", "cu_seqlens", "max_seqlen") if name not in features]
        if missing:
            raise ValueError(f"features: expected a packed batch, as tokenize returns it; {', '.join(missing)} missing")
        pool = not token_embeddings and self.pooling.is_mean_of_all(features.get("prompt_length", 0))
        hidden = self.encoder(
            features["input_ids"],
            features["cu_seqlens"],
            features["max_seqlen"],
            features.get("token_type_ids"),
            dropout=dropout,
            pool=pool,
        )
        if not pool:
            return self._outputs(features, hidden)
        for module in self.head:
            hidden = module(hidden)
        return {**features, "sentence_embedding": hidden}

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

    # --- similarity ---------------------------------------------------------------------------------------------------

    def similarity(self, embeddings1: util.Embeddings, embeddings2: util.Embeddings) -> Tensor:
        """Similarity of every embedding of [M, D] with every one of [N, D], by `similarity_fn_name` -> [M, N]."""
        return util.SIMILARITIES[self.similarity_fn_name][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: util.Embeddings, embeddings2: util.Embeddings) -> Tensor:
        """Similarity of embedding i with embedding i, both [N, D], by `similarity_fn_name` -> [N]."""
        return util.SIMILARITIES[self.similarity_fn_name][1](embeddings1, embeddings2)

    def evaluate(self, evaluator: Callable[..., Any], output_path: str | Path | None = None) -> Any:
        """What `evaluator` says of this model; it writes its results to the folder `output_path`, made if need be."""
        if output_path is not None:
            Path(output_path).mkdir(parents=True, exist_ok=True)
        return evaluator(self, output_path)

    # --- save ---------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: Sequence[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write a folder that this class and sentence-transformers load.

        Everything is written to a temporary folder beside it first, so that nothing is ever half-written; other files
        in an existing folder stay.

        Args:
            path: the folder.
            model_name: name for the card's title.
            create_model_card: write README.md from `model_card_data` (for a model that was loaded with a card and
                neither trained nor evaluated since: that card).
            train_datasets: names of data sets for the card.
            safe_serialization: True, as nothing but safetensors is written.

        Raises:
            OSError: the folder cannot be written; nothing of it was touched. ValueError: `safe_serialization` is False.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True, weights are written as safetensors; got False")
        if train_datasets is not None:
            self.model_card_data.train_datasets = [{"name": name, "id": name} for name in train_datasets]
        config = FolderConfig(
            max_seq_length=self.max_seq_length,
            pooling=self.pooling,
            head=self._head_modules(),
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

    def save(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """As `save_pretrained`."""
        self.save_pretrained(path, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | Path | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: Sequence[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the model, as `save_pretrained` writes it, to a repository on the Hugging Face hub.

        Args:
            repo_id: the repository, made if it is not there. private: whether a new one is.
            token: of the hub.
            safe_serialization, train_datasets: as `save_pretrained`.
            commit_message: "Add a SentenceTransformer model" by default.
            local_model_path: a folder to upload as it is, instead of this model.
            exist_ok: write to a repository that is there already, too.
            replace_model_card: write the card also over one that the repository has.
            revision: the branch. create_pr: open a pull request instead of writing to it.

        Returns:
            The address of the commit, or of the pull request.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=exist_ok or create_pr).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = str(local_model_path or temporary)
            if local_model_path is None:
                keep_card = not replace_model_card and api.file_exists(repo_id, "README.md", revision=revision)
                self.save_pretrained(folder, repo_id, not keep_card, train_datasets, safe_serialization)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Add a SentenceTransformer model",
                create_pr=create_pr,
                revision=revision,
            )
        return (commit.pr_url if create_pr else None) or commit.commit_url

    def _card(self) -> str:
        card = self.model_card_data
        if self._loaded_card is not None and not card.evaluations and not card.hyperparameters:
            return self._loaded_card
        return card.to_card(self)
