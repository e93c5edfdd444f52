"""A start for training from scratch: an encoder whose embeddings already compare texts by their weighted words.

A random encoder knows nothing of its words, and a small data set teaches it little about rare ones. This one begins as
a bag of words weighted by inverse document frequency (IDF), in which words that share spelling are alike, and training
goes on from there. IDF: K. Spärck Jones, "A statistical interpretation of term specificity", 1972. Words as bags of
their character n-grams: P. Bojanowski et al., "Enriching Word Vectors with Subword Information",
https://arxiv.org/abs/1607.04606; here the n-grams have random vectors, so that only the overlap counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from triton_st.models.bert import BertLayer, BertModel

NGRAM_LENGTHS = (3, 4, 5)
SPELLING = 2.0  # length of what words share by spelling, in lengths of what is each word's own
FILLERS = 8
TEXTS_AT_ONCE = 4096


def inverse_document_frequencies(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """How much a token says about a text: log((1 + texts) / (1 + texts with the token)) for each id, float32 [V].

    Special tokens and those without a letter or a digit say nothing: 0. A text that occurs twice counts once.
    """
    distinct = list(dict.fromkeys(texts))
    counts: Counter[int] = Counter()
    for begin in range(0, len(distinct), TEXTS_AT_ONCE):
        some = distinct[begin : begin + TEXTS_AT_ONCE]
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            counts.update(set(ids))
    frequencies = torch.zeros(len(tokenizer))
    special = set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index not in special and any(character.isalnum() for character in token):
            frequencies[index] = math.log((1 + len(distinct)) / (1 + counts[index]))
    return frequencies


def word_vectors(tokenizer: PreTrainedTokenizerBase, width: int, seed: int) -> Tensor:
    """A vector of length 1 for each token of a WordPiece vocabulary: alike for like spelling, else nearly orthogonal.

    Each is the sum of a random vector and of `SPELLING` times the direction of the sum of its character n-grams'
    random vectors. Its elements add up to 0, so that LayerNorm, which takes their mean away, leaves it as it is.

    Args:
        tokenizer: its vocabulary marks pieces inside a word by "##".
        width: D.
        seed: of the random vectors.

    Returns:
        float32 [V, D].
    """
    numbers: dict[str, int] = {}
    members: list[int] = []
    offsets = [0]
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        marked = (token[2:] if token.startswith("##") else f"<{token}") + ">"
        for length in NGRAM_LENGTHS:
            parts = (marked[i : i + length] for i in range(len(marked) - length + 1))
            members += [numbers.setdefault(part, len(numbers)) for part in parts]
        offsets.append(len(members))
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(len(offsets) - 1, width, generator=generator)
    ngrams = torch.randn(max(len(numbers), 1), width, generator=generator)
    shared = F.embedding_bag(torch.tensor(members), ngrams, torch.tensor(offsets), mode="sum", include_last_offset=True)
    vectors = F.normalize(own) + SPELLING * F.normalize(shared)
    return F.normalize(vectors - vectors.mean(1, keepdim=True))


def start_as_weighted_words(
    encoder: BertModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], seed: int
) -> None:
    """Set an untrained encoder's weights so that the mean of a text's token states is the sum of its words, by IDF.

    LayerNorm would give every token the same length, and with it the same weight. So the last `FILLERS` dimensions of a
    word embedding hold what its weighted vector lacks in length, every LayerNorm leaves the vector's length as it is,
    and the last one's weight for these dimensions is 0. Positions and token types start at 0, and so do both output
    projections of a layer, which therefore passes its input on. Rows have length 1, so that a step of AdamW at 1e-3
    turns one by about 1e-3 · sqrt(D).

    Args:
        encoder: of a hidden size above `FILLERS`; its vocabulary is the tokenizer's.
        tokenizer: WordPiece.
        texts: what document frequencies are counted on: the training texts.
        seed: of the word vectors.

    Raises:
        ValueError: the encoder is too narrow.
    """
    width = encoder.architecture.hidden_size - FILLERS
    if width < 1:
        raise ValueError(f"hidden_size: expected more than {FILLERS}, got {encoder.architecture.hidden_size}")
    weights = inverse_document_frequencies(tokenizer, texts)
    weights /= weights.max().clamp_min(torch.finfo(weights.dtype).tiny)
    signs = torch.tensor([1.0, -1.0]).repeat(FILLERS // 2)  # they add up to 0 as well
    fillers = ((1 - weights.square()) / FILLERS).sqrt().outer(signs)
    rows = torch.cat([word_vectors(tokenizer, width, seed) * weights.unsqueeze(1), fillers], 1)
    embeddings = encoder.embeddings
    last = embeddings.LayerNorm
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(rows)
        embeddings.word_embeddings.weight[tokenizer.pad_token_id].zero_()
        embeddings.position_embeddings.weight.zero_()
        embeddings.token_type_embeddings.weight.zero_()
        for layer in cast("Sequence[BertLayer]", encoder.layers()):
            layer.attention.output.dense.weight.zero_()
            layer.output.dense.weight.zero_()
            last = layer.output.LayerNorm
        last.weight[-FILLERS:] = 0
