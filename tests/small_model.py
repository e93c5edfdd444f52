"""Small random models: a sentence encoder with a word-level tokenizer, and BERT beside transformers' own."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from triton_st import SentenceTransformer
from triton_st.models import BertModel, pack

WORDS = ["the", "a", "boy", "girl", "dog", "cat", "park", "river", "plays", "runs", "sleeps", "red"]
WORDS += ["small", "in", "near", "with", "ball", "tree", "happy", "old"]
RAGGED = [3, 1, 17, 64, 2, 18, 5, 5]
"""Sequence lengths of the usual random batch."""
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


def bert_config(**changes) -> transformers.BertConfig:
    fields = {
        "vocab_size": 60,
        "hidden_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # large enough that every parameter matters
    }
    return transformers.BertConfig(**(fields | changes))


def bert_pair(dtype=torch.float32, **changes) -> tuple[BertModel, transformers.BertModel]:
    """Ours and transformers', with the same random weights, in evaluation mode."""
    torch.manual_seed(0)
    theirs = transformers.BertModel(bert_config(**changes)).to(dtype).eval()
    for parameter in theirs.parameters():  # biases and LayerNorms too
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ours = BertModel(theirs.config).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def random_batch(lengths=RAGGED, vocabulary=60, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return pack([torch.randint(1, vocabulary, (n,), generator=generator).tolist() for n in lengths])
