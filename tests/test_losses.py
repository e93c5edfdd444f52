"""MultipleNegativesRankingLoss against sentence-transformers', in value and in every parameter's gradient."""

from __future__ import annotations

import pytest
import sentence_transformers
import torch
from sentence_transformers.sentence_transformer import losses as st_losses

from tests.small_model import WORDS, small_model
from triton_st import losses, util


def _texts(column: int, rows: int = 6) -> list[str]:
    generator = torch.Generator().manual_seed(column)
    lengths = torch.randint(1, 12, (rows,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in lengths]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model twice: ours and sentence-transformers', with the same weights."""
    folder = tmp_path_factory.mktemp("model")
    ours = small_model()
    ours.save_pretrained(folder)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return ours.eval(), theirs.eval()


def _loss_and_gradients(loss, features, model):
    model.zero_grad()
    value = loss(features, None)
    value.backward()
    grads = {
        name.split("embeddings.", 1)[-1] if "embeddings." in name else name.split("encoder.layer.")[-1]: p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return value.detach(), grads


@pytest.mark.parametrize("columns", [2, 3, 5])
# Dot products here are about 50: scaled by 20 they would leave float32's softmax too few digits to compare.
@pytest.mark.parametrize(
    ("similarity", "scale"), [("cos_sim", 1.0), ("cos_sim", 20.0), ("dot_score", 0.1), ("dot_score", 1.0)]
)
def test_value_and_gradients_equal_sentence_transformers(models, columns, scale, similarity):
    ours, theirs = models
    texts = [_texts(i) for i in range(columns)]
    loss = losses.MultipleNegativesRankingLoss(ours, scale, getattr(util, similarity))
    st_loss = st_losses.MultipleNegativesRankingLoss(theirs, scale, getattr(sentence_transformers.util, similarity))
    value, grads = _loss_and_gradients(loss, [ours.tokenize(column) for column in texts], ours)
    expected, st_grads = _loss_and_gradients(st_loss, [theirs.preprocess(column) for column in texts], theirs)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert grads.keys() == st_grads.keys()
    largest = max(grad.norm() for grad in st_grads.values())
    for name, grad in grads.items():
        error = (grad - st_grads[name]).norm()
        assert error <= 1e-4 * max(st_grads[name].norm(), 1e-3 * largest), f"{name}: {error:.3e}"


def test_a_callable_of_ones_own_runs_in_plain_pytorch(models):
    ours, _ = models
    features = [ours.tokenize(_texts(i)) for i in range(3)]
    fused = losses.MultipleNegativesRankingLoss(ours)(features)
    plain = losses.MultipleNegativesRankingLoss(ours, similarity_fct=lambda a, b: util.cos_sim(a, b))(features)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_loss_of_embeddings_equals_loss_of_features(models):
    ours, _ = models
    loss = losses.MultipleNegativesRankingLoss(ours)
    features = [ours.tokenize(_texts(i)) for i in range(3)]
    embeddings = [ours(column)["sentence_embedding"] for column in features]
    torch.testing.assert_close(loss.compute_loss_from_embeddings(embeddings), loss(features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_activations_give_a_float32_loss_near_the_exact_one(models, dtype):
    ours, _ = models
    loss = losses.MultipleNegativesRankingLoss(ours)
    features = [ours.tokenize(_texts(i)) for i in range(3)]
    exact, exact_grads = _loss_and_gradients(loss, features, ours)
    with ours.activations_in(dtype):
        value, grads = _loss_and_gradients(loss, features, ours)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=20 * torch.finfo(dtype).eps)
    largest = max(grad.norm() for grad in exact_grads.values())
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        error = (grad - exact_grads[name]).norm()
        assert error <= 200 * torch.finfo(dtype).eps * max(exact_grads[name].norm(), 1e-2 * largest), name


def test_settings_and_citation(models):
    ours, theirs = models
    loss = losses.MultipleNegativesRankingLoss(ours, scale=10.0)
    st_loss = st_losses.MultipleNegativesRankingLoss(theirs, scale=10.0)
    assert loss.get_config_dict().items() <= st_loss.get_config_dict().items()
    assert loss.temperature == st_loss.temperature
    assert "oord2019representation" in loss.citation


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(models, scale):
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        losses.MultipleNegativesRankingLoss(models[0], scale=scale)


def test_columns_that_do_not_fit_are_refused(models):
    ours, _ = models
    loss = losses.MultipleNegativesRankingLoss(ours)
    column = ours.tokenize(_texts(0))
    with pytest.raises(ValueError, match="at least two columns, anchor and positive, got 1"):
        loss([column])
    with pytest.raises(ValueError, match=r"columns of one batch size, got sizes \[6, 6, 4\]"):
        loss([column, column, ours.tokenize(_texts(1, rows=4))])
    with pytest.raises(ValueError, match=r"columns of one batch size, got sizes \[6, 4\]"):
        loss.compute_loss_from_embeddings([torch.randn(6, 3), torch.randn(4, 3)])
    with pytest.raises(TypeError, match="similarity_fct: expected a callable, got str"):
        losses.MultipleNegativesRankingLoss(ours, similarity_fct="cos_sim")
