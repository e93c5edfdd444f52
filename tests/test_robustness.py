"""Why NaN cannot come back: from finite input, nothing in the model, in any precision, makes a non-finite number.

And what is not finite is not hidden: an infinite weight shows in the embeddings, for the trainer to stop at.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.small_model import WORDS, small_model
from triton_st import SentenceTransformer, losses

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TEXTS = [["the boy plays", "a dog", "red ball near the old tree in the park", "happy cat"],
         ["a boy runs", "the dog sleeps", "the small ball", "cat"],
         ["", "river", "tree tree tree", "the girl"]]  # fmt: skip


def _step(model: SentenceTransformer, texts: list[list[str]], dtype: torch.dtype, scale: float = 1024.0) -> float:
    """Loss of one training step; every embedding, and every gradient at a loss scale, must be finite."""
    model.train().zero_grad()
    features = [model.tokenize(column) for column in texts]
    with model.activations_in(dtype):
        for column in features:
            outputs = model(column)
            assert outputs["token_embeddings"].dtype == dtype
            assert outputs["token_embeddings"].isfinite().all()
            assert outputs["sentence_embedding"].isfinite().all()
        loss = losses.MultipleNegativesRankingLoss(model)(features)
    (loss * scale).backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    return loss.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_states(dtype):
    """Every state is the same constant: LayerNorm divides by sqrt(eps), which float16 would round to 0."""
    model = small_model()
    with torch.no_grad():
        for parameter in model.encoder.embeddings.parameters():
            parameter.fill_(0.25)
    _step(model, TEXTS, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_embeddings_give_the_loss_of_chance_and_no_gradient(dtype):
    model = small_model()
    with torch.no_grad():
        for parameter in model.encoder.encoder.layer[-1].output.LayerNorm.parameters():
            parameter.zero_()
    assert _step(model, TEXTS, dtype) == pytest.approx(math.log(8), rel=1e-5)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_texts(dtype):
    model = small_model()
    assert _step(model, [["the boy"] * 4] * 3, dtype) == pytest.approx(math.log(8), rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["", "   \t\n ", "the"])
def test_empty_and_shortest_texts(dtype, text):
    _step(small_model(hidden_dropout_prob=0.1), [[text] * 4] * 2, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "where",
    [
        "embeddings.word_embeddings.weight",
        "embeddings.LayerNorm.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.0.attention.self.value.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight",
        "encoder.layer.0.output.LayerNorm.weight",
        "encoder.layer.1.output.LayerNorm.bias",
    ],
)
def test_activations_at_the_end_of_half_range(dtype, dropout, where):
    """Weights of ±6e4: activations reach and pass float16's largest number, 65504."""
    model = small_model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    parameter = model.encoder.get_parameter(where)
    with torch.no_grad():
        parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, -6e4, 6e4))
    model.train()
    features = model.tokenize([" ".join(WORDS), "the boy", ""])
    with model.activations_in(dtype):
        outputs = model(features)
    assert outputs["token_embeddings"].isfinite().all()
    assert outputs["sentence_embedding"].isfinite().all()
    loss = losses.MultipleNegativesRankingLoss(model)
    with model.activations_in(dtype):
        value = loss([model.tokenize(column) for column in TEXTS])
    assert value.isfinite()
    if dtype != torch.float16:  # a float16 gradient may overflow: that is what the loss scale answers
        value.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_weight_that_is_not_finite_is_not_hidden(dtype, bad):
    for name in [name for name, _ in small_model().encoder.named_parameters() if not name.startswith("pooler")]:
        model = small_model()
        parameter = model.encoder.get_parameter(name)
        with torch.no_grad():
            parameter.fill_(bad)
            features = model.tokenize(["the boy plays", "a red dog"])
            with model.activations_in(dtype):
                embeddings = model(features)["sentence_embedding"]
        assert not embeddings.isfinite().any(), name


def test_a_gradient_past_half_range_shows_for_the_loss_scale_to_back_off():
    model = small_model().train()
    features = [model.tokenize(column) for column in TEXTS]
    with model.activations_in(torch.float16):
        loss = losses.MultipleNegativesRankingLoss(model)(features)
    (loss * 2.0**40).backward()
    assert loss.isfinite()
    assert any(p.grad is not None and not p.grad.isfinite().all() for p in model.parameters())
