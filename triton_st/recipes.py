"""The reference run as code: a small BERT sentence encoder trained from scratch on triplets.

Everything that the run fixes stands here once, so that the command line, the benchmarks and a user's own script start
from the same numbers: BERT with hidden size 50, mean pooling, a cased WordPiece vocabulary of 2,000,
MultipleNegativesRankingLoss at scale 20, one epoch of `no_duplicates` batches of 128, AdamW at 5e-5 with linear decay
after a warm-up of 0.1, gradient norm clipped at 1, seed 42.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import BertConfig

from triton_st.data import train_wordpiece_tokenizer
from triton_st.models.bert import BertModel
from triton_st.sentence_transformer import SentenceTransformer
from triton_st.training_args import BatchSamplers, SentenceTransformerTrainingArguments

VOCAB_SIZE = 2_000
MAX_SEQ_LENGTH = 512
SEED = 42

ENCODER: dict[str, Any] = {
    "hidden_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "intermediate_size": 200,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": MAX_SEQ_LENGTH,
}

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 128,
    "num_train_epochs": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "batch_sampler": BatchSamplers.NO_DUPLICATES,
    "seed": SEED,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 40,
    "save_total_limit": 2,
}


def new_model(
    texts: Iterable[str],
    *,
    vocab_size: int = VOCAB_SIZE,
    max_seq_length: int = MAX_SEQ_LENGTH,
    seed: int = SEED,
    device: str | torch.device | None = None,
    **encoder: Any,
) -> SentenceTransformer:
    """An untrained encoder with a tokenizer of its own, trained on `texts`.

    Args:
        texts: what the WordPiece vocabulary is learnt from: the training texts.
        vocab_size: size of that vocabulary at most.
        max_seq_length: longest sequence in tokens; also the size of the position table.
        seed: of the initial weights.
        device: where the model is put.
        **encoder: `transformers.BertConfig` fields in place of those in `ENCODER`.
    """
    tokenizer = train_wordpiece_tokenizer(texts, vocab_size=vocab_size, max_length=max_seq_length)
    settings = {**ENCODER, "max_position_embeddings": max_seq_length, **encoder}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = BertModel(config)
    model = SentenceTransformer.from_encoder(weights, tokenizer, max_seq_length=max_seq_length)
    return model.to(device) if device is not None else model


def arguments(output_dir: str, **changes: Any) -> SentenceTransformerTrainingArguments:
    """The reference run's training arguments with `changes` in place."""
    return SentenceTransformerTrainingArguments(output_dir=output_dir, **{**ARGUMENTS, **changes})
