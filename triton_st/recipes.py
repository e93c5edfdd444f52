"""Sentence encoders trained from scratch on triplets, as code.

Everything that a run fixes stands here once, so that the command line, the benchmarks and a user's own script start
from the same numbers. `REFERENCE` is the small run that a published model card describes; `BETTER` is what the same
data and a few minutes of two CPU cores allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from triton_st.losses import MultipleNegativesRankingLoss
    from triton_st.sentence_transformer import SentenceTransformer
    from triton_st.training_args import SentenceTransformerTrainingArguments

SEED = 42


@dataclass(frozen=True)
class Recipe:
    """The settings of a run from scratch.

    Args:
        name: what the command line and the model card call it.
        vocab_size: size of the WordPiece vocabulary at most.
        max_seq_length: longest sequence in tokens; also the size of the position table.
        encoder: `transformers.BertConfig` fields.
        arguments: fields of `SentenceTransformerTrainingArguments`.
        loss: settings of `MultipleNegativesRankingLoss`.
        lowercase: whether the vocabulary is uncased.
        split_endings: whether English words are cut before their endings, so that their forms share a stem.
        weighted_words: start as a bag of words weighted by IDF, see `models.lexical`; else from random weights.
        hard_negatives: train on the columns after the positive as well.
    """

    name: str
    vocab_size: int
    max_seq_length: int
    encoder: Mapping[str, Any]
    arguments: Mapping[str, Any]
    loss: Mapping[str, Any] = field(default_factory=lambda: {"scale": 20.0})
    lowercase: bool = False
    split_endings: bool = False
    weighted_words: bool = False
    hard_negatives: bool = True


REFERENCE = Recipe(
    name="reference",
    vocab_size=2_000,
    max_seq_length=512,
    encoder={
        "hidden_size": 50,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "intermediate_size": 200,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12,
    },
    arguments={
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 128,
        "num_train_epochs": 1,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "batch_sampler": "no_duplicates",
        "seed": SEED,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 40,
        "save_total_limit": 2,
    },
)

BETTER = Recipe(
    name="better",
    vocab_size=20_000,
    max_seq_length=128,
    encoder={
        "hidden_size": 1_024,
        "num_hidden_layers": 0,
        "num_attention_heads": 16,
        "intermediate_size": 1_024,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
    },
    arguments={
        **REFERENCE.arguments,
        "per_device_train_batch_size": 2_048,
        "num_train_epochs": 4,
        "learning_rate": 4e-3,
        "batch_sampler": "batch_sampler",
        "adam_beta2": 0.98,
    },
    loss={
        "scale": 20.0,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
        "false_negatives": "mask_duplicates",
    },
    lowercase=True,
    split_endings=True,
    weighted_words=True,
    hard_negatives=False,
)

RECIPES = {recipe.name: recipe for recipe in (REFERENCE, BETTER)}


def new_model(
    texts: Iterable[str],
    *,
    recipe: Recipe = REFERENCE,
    vocab_size: int | None = None,
    max_seq_length: int | None = None,
    seed: int = SEED,
    device: str | torch.device | None = None,
    **encoder: Any,
) -> SentenceTransformer:
    """An encoder that has seen no example yet, with a tokenizer of its own, trained on `texts`.

    Args:
        texts: what the WordPiece vocabulary, and the words' weights where the recipe has some, are learnt from: the
            training texts.
        recipe: its settings.
        vocab_size, max_seq_length: in place of the recipe's.
        seed: of the initial weights.
        device: where the model is put.
        **encoder: `transformers.BertConfig` fields in place of the recipe's.
    """
    import torch
    from transformers import BertConfig

    from triton_st.data import train_wordpiece_tokenizer
    from triton_st.models.bert import BertModel
    from triton_st.models.lexical import start_as_weighted_words
    from triton_st.sentence_transformer import SentenceTransformer

    texts = list(texts)
    length = recipe.max_seq_length if max_seq_length is None else max_seq_length
    size = recipe.vocab_size if vocab_size is None else vocab_size
    tokenizer = train_wordpiece_tokenizer(
        texts, size, length, lowercase=recipe.lowercase, split_endings=recipe.split_endings
    )
    settings = {**recipe.encoder, "max_position_embeddings": length, **encoder}
    special = tokenizer.num_special_tokens_to_add()
    if length <= special:
        raise ValueError(f"max_seq_length: expected more than the {special} special tokens of a text, got {length}")
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = BertModel(config)
    if recipe.weighted_words:
        start_as_weighted_words(weights, tokenizer, texts, seed)
    model = SentenceTransformer.from_encoder(weights, tokenizer, max_seq_length=length)
    return model.to(device) if device is not None else model


def arguments(output_dir: str, recipe: Recipe = REFERENCE, /, **changes: Any) -> SentenceTransformerTrainingArguments:
    """The recipe's training arguments with `changes` in place."""
    from triton_st.training_args import SentenceTransformerTrainingArguments

    return SentenceTransformerTrainingArguments(output_dir=output_dir, **{**recipe.arguments, **changes})


def training_columns(dataset: Dataset, recipe: Recipe = REFERENCE) -> Dataset:
    """The columns of `dataset` (anchor, positive, negatives) that the recipe trains on."""
    return dataset if recipe.hard_negatives else dataset.select_columns(dataset.column_names[:2])


def ranking_loss(
    model: SentenceTransformer, recipe: Recipe = REFERENCE, /, **changes: Any
) -> MultipleNegativesRankingLoss:
    """The recipe's loss with `changes` in place."""
    from triton_st.losses import MultipleNegativesRankingLoss

    return MultipleNegativesRankingLoss(model, **{**recipe.loss, **changes})
