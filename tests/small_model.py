"""A small untrained model with a word-level tokenizer, for tests that need texts but no real weights."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from triton_st import SentenceTransformer
from triton_st.models import BertModel

WORDS = ["the", "a", "boy", "girl", "dog", "cat", "park", "river", "plays", "runs", "sleeps", "red"]
WORDS += ["small", "in", "near", "with", "ball", "tree", "happy", "old"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def small_tokenizer(**settings) -> PreTrainedTokenizerFast:
    """[CLS] words [SEP]; anything else is [UNK]."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fields = {"model_max_length": 32, "mask_token": "[MASK]", **names, **settings}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **fields)


def small_model(seed: int = 0, normalize: bool = False, **config) -> SentenceTransformer:
    """hidden 50, 2 layers, 5 heads, at most 32 tokens, no dropout."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    }
    encoder = BertModel(BertConfig(**(fields | config)))
    return SentenceTransformer.from_encoder(encoder, small_tokenizer(), normalize=normalize)
