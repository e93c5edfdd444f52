"""Similarities against sentence-transformers' own, for every kind of input that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import sentence_transformers.util as st_util
import torch

from triton_st import util

MATRIX = ["cos_sim", "dot_score", "euclidean_sim", "manhattan_sim"]
PAIRWISE = ["pairwise_cos_sim", "pairwise_dot_score", "pairwise_euclidean_sim", "pairwise_manhattan_sim"]


def _vectors(rows: int, seed: int, dim: int = 50) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "tensor": lambda x: x,
    "numpy": lambda x: x.numpy(),
    "read-only numpy": lambda x: np.broadcast_to(x.numpy(), x.shape),
    "reversed numpy": lambda x: x.numpy()[::-1],
    "list of tensors": lambda x: list(x),
    "list of arrays": lambda x: list(x.numpy()),
    "nested list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_equal_sentence_transformers(name, kind):
    a, b = _vectors(7, 0), _vectors(3, 1)
    flipped = "reversed" in kind
    actual = getattr(util, name)(KINDS[kind](a), KINDS[kind](b))
    expected = getattr(st_util, name)(a.flip(0) if flipped else a, b.flip(0) if flipped else b)
    assert actual.shape == (7, 3)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_equal_sentence_transformers(name, kind):
    a, b = _vectors(7, 0), _vectors(7, 1)
    actual = getattr(util, name)(KINDS[kind](a), KINDS[kind](b))
    expected = getattr(st_util, name)(a, b)
    torch.testing.assert_close(actual, expected.flip(0) if "reversed" in kind else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MATRIX + PAIRWISE)
def test_single_vectors(name):
    a, b = _vectors(2, 0)
    actual = getattr(util, name)(a, b)
    expected = getattr(st_util, name)(a, b)
    assert actual.shape == expected.shape == (torch.Size([]) if name in PAIRWISE else (1, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MATRIX + PAIRWISE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_vectors_are_scored_in_float32(name, dtype):
    a, b = _vectors(5, 0).to(dtype), _vectors(5, 1).to(dtype)
    actual = getattr(util, name)(a, b)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, getattr(util, name)(a.float(), b.float()), rtol=0, atol=0)


def test_integers_and_mixed_dtypes():
    a, b = torch.tensor([[3, 4], [0, 0]]), _vectors(2, 0, 2).double()
    assert util.cos_sim(a, b).dtype == torch.float64
    torch.testing.assert_close(util.dot_score([[3, 4]], [[1, 2]]), torch.tensor([[11.0]]))


def test_a_zero_vector_has_similarity_zero():
    a, zero = _vectors(3, 0), torch.zeros(3, 50)
    assert torch.equal(util.cos_sim(a, zero), torch.zeros(3, 3))
    assert torch.equal(util.pairwise_cos_sim(a, zero), torch.zeros(3))


@pytest.mark.parametrize("name", [*MATRIX, "pairwise_cos_sim", "pairwise_dot_score"])
def test_gradients_equal_sentence_transformers(name):
    grads = []
    for module in (util, st_util):
        a, b = _vectors(4, 0).requires_grad_(), _vectors(4, 1).requires_grad_()
        grads.append(torch.autograd.grad(getattr(module, name)(a, b).square().sum(), (a, b)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"with one D, got \(2, 50\) and \(2, 49\)"):
        util.cos_sim(_vectors(2, 0), _vectors(2, 0, 49))
    with pytest.raises(ValueError, match=r"one shape, got \(2, 50\) and \(3, 50\)"):
        util.pairwise_cos_sim(_vectors(2, 0), _vectors(3, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalize_embeddings(dtype):
    vectors = torch.cat([_vectors(4, 0), torch.zeros(1, 50), torch.full((1, 50), 6e4)]).to(dtype)
    unit = util.normalize_embeddings(vectors)
    assert unit.dtype == dtype
    assert unit.isfinite().all()
    norms = unit.float().norm(dim=1)
    expected = torch.ones(6)
    expected[4] = 0
    torch.testing.assert_close(norms, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e30])
def test_unit_length_at_any_size(size):
    vectors = _vectors(3, 0) * size
    unit = util.normalize_embeddings(vectors)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(util.pairwise_cos_sim(vectors, vectors), torch.ones(3))


def test_a_zero_vector_gets_no_gradient():
    vectors = torch.zeros(1, 4, requires_grad=True)
    util.normalize_embeddings(vectors).sum().backward()
    assert vectors.grad.abs().max() == 0


@pytest.mark.parametrize(("queries", "corpus", "top_k"), [(1, 1, 1), (7, 50, 3), (5, 4, 10), (0, 4, 2), (3, 0, 2)])
@pytest.mark.parametrize("chunks", [(100, 65_536), (2, 3)], ids=str)
@pytest.mark.parametrize("score", ["cos_sim", "dot_score"])
def test_semantic_search(queries, corpus, top_k, chunks, score):
    generator = torch.Generator().manual_seed(0)
    q, c = (torch.randn(n, 12, generator=generator) for n in (queries, corpus))
    found = util.semantic_search(q, c, *chunks, top_k, getattr(util, score))
    expected = st_util.semantic_search(q, c, top_k=top_k, score_function=getattr(st_util, score))
    assert len(found) == queries
    for mine, theirs in zip(found, expected, strict=True):
        assert [hit["corpus_id"] for hit in mine] == [hit["corpus_id"] for hit in theirs]
        assert [hit["score"] for hit in mine] == pytest.approx([hit["score"] for hit in theirs], abs=1e-5)


@pytest.mark.parametrize("score", ["cos_sim", "dot_score"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.bfloat16, torch.float64], ids=str)
def test_semantic_search_takes_every_dtype(score, dtype):
    rows = torch.eye(4).to(dtype)
    found = util.semantic_search(rows, rows, top_k=np.int64(1), score_function=getattr(util, score))
    assert found == [[{"corpus_id": row, "score": 1.0}] for row in range(4)]


def test_semantic_search_of_one_query_and_bad_sizes():
    corpus = np.eye(4, dtype=np.float32)
    [[hit]] = util.semantic_search(corpus[2], corpus, top_k=1)
    assert hit == {"corpus_id": 2, "score": 1.0}
    for name in ("query_chunk_size", "corpus_chunk_size", "top_k"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive int, got 0"):
            util.semantic_search(corpus, corpus, **{name: 0})
    with pytest.raises(ValueError, match=r"expected \[M, D\] and \[N, D\] with one D"):
        util.semantic_search(corpus, corpus[:, :3])
    with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
        util.semantic_search(corpus, corpus, top_k=1.5)
