"""mnrl_loss as an operator: its gradient in every way it can be asked for, tracing, diagnostics, what it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score
from serving import every_backend, serving
from tolerance import value_and_gradients
from torch import Tensor

from triton_st import ops

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "dot": {"similarity": "dot", "scale": 0.5},
    "targets": {"targets": torch.tensor([3, 3, 0, 7])},
    "all directions": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 4.0},
    "ids": {"query_ids": torch.tensor([1, 2, 1, 3]), "document_ids": torch.tensor([5, 6, 7, 5, 2, 8, 9, 1])},
    "margin": {"margin": 0.1, "margin_strategy": "relative"},
    "prefixes": {"matryoshka_dims": [2, 6], "matryoshka_weights": [0.5, 2.0]},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 6, generator=generator)
    documents = torch.randn(8, 6, generator=generator)
    documents[:4] += queries
    return [queries.to(dtype), documents.to(dtype), 1 + torch.rand(4, generator=generator)]


def loss(options: dict[str, Any], *leaves: Tensor) -> Tensor:
    queries, documents, weights = leaves
    return ops.mnrl_loss(queries, documents, weights=weights, **options)


@every_option
@every_backend
def test_a_retained_graph_gives_the_same_gradients_again(name: str, options: dict[str, Any]) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    with serving(name, "mnrl_rows"):
        value = loss(options, *leaves).sum()
        first = torch.autograd.grad(3 * value, leaves, retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(3 * value, leaves)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(3 * value, leaves)
    for x, y, z in zip(first, second, kept, strict=True):
        assert torch.equal(x, z)  # nobody wrote over what was handed out
        torch.testing.assert_close(x, y)


@every_option
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_a_gradient_of_2_to_the_16_does_not_overflow_in_half(name: str, options: dict[str, Any]) -> None:
    large, half = 2.0**16, torch.float16
    with serving(name, "mnrl_rows", half):
        leaves = inputs(half)
        seed = torch.full(loss(options, *leaves).shape, large)
        _, scaled = value_and_gradients(lambda *x: loss(options, *x), leaves, seed)
        wide = [x.float() for x in leaves]
        _, exact = value_and_gradients(lambda *x: loss(options, *x), wide)
    for x, y in zip(scaled, exact, strict=True):
        expected = (y * large).to(x.dtype)
        assert torch.equal(x.isinf(), expected.isinf())
        error = (x.float() - expected.float())[expected.isfinite()].abs().max()
        assert error <= 4e-3 * expected[expected.isfinite()].float().abs().max()


@every_option
@every_backend
def test_traced_as_in_eager_mode(name: str, options: dict[str, Any]) -> None:
    def function(queries: Tensor, documents: Tensor, weights: Tensor) -> Tensor:
        return 3 * loss(options, queries + 1, documents.sin(), weights).sum()

    torch.compiler.reset()  # every option is another graph of one function, and torch compiles eight of these
    with serving(name, "mnrl_rows"):
        traced = torch.compile(function, fullgraph=True, backend="aot_eager")
        expected, expected_grads = value_and_gradients(function, inputs())
        value, grads = value_and_gradients(traced, inputs())
    torch.testing.assert_close(value, expected)
    for x, y in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x, y)


@every_backend
def test_opcheck(name: str) -> None:
    queries, documents, weights = (x.requires_grad_() for x in inputs())
    ids = (torch.arange(4), torch.arange(8), torch.arange(8))
    directions, dims = (1, [6]) if name == "triton" else (15, [3, 6])  # its interpreter is slow
    arguments = (
        queries, documents, None, None, 0, torch.tensor(20.0), weights, True, directions, True, 1, 2.0, *ids, 0.1, True,
        dims, [1.0] * len(dims),
    )  # fmt: skip
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    with serving(name, "mnrl_rows"):
        operators = torch.ops.triton_st
        for flags in [(True, True), (False, False)]:
            torch.library.opcheck(operators.mnrl_rows.default, (*plain, *flags))
            torch.library.opcheck(operators.mnrl_loss_forward.default, (*arguments, True, *flags))
        torch.library.opcheck(operators.mnrl_loss_forward.default, (*arguments, False, False, False))
        value, losses, *formed, _ = operators.mnrl_loss_forward(*plain, True, True, False)
        for already in (formed, []):
            torch.library.opcheck(operators.mnrl_loss_backward.default, (value, losses, already, *plain))


@every_option
def test_there_is_no_second_derivative(options: dict[str, Any]) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    for wanted in ({}, {"create_graph": True}):
        grads = torch.autograd.grad(loss(options, *leaves).sum(), leaves, **wanted)
        assert grads[0].requires_grad == bool(wanted)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        grads[0].square().sum().backward()


def test_only_what_wants_a_gradient_gets_one() -> None:
    queries, documents, _ = inputs()
    scale = torch.tensor(7.0, requires_grad=True)
    ops.mnrl_loss(queries, documents, scale).backward()
    assert scale.grad is not None
    assert queries.grad is None
    with torch.no_grad():
        assert not ops.mnrl_loss(queries.requires_grad_(), documents, scale).requires_grad


@every_backend
def test_diagnostics_rank_the_positive_among_the_candidates(name: str) -> None:
    queries, documents, _ = inputs()
    ids = {"query_ids": torch.arange(4), "document_ids": torch.tensor([10, 11, 12, 13, 10, 14, 15, 16])}
    with serving(name, "mnrl_rows"):
        for options in ({}, ids):
            value, facts = ops.mnrl_loss(queries, documents, diagnostics=True, **options)
            torch.testing.assert_close(value, ops.mnrl_loss(queries, documents, **options))
            similarities = cos_sim(queries, documents)
            for i in range(4):
                rivals = [j for j in range(8) if j != i and not (options and (i, j) in [(0, 4)])]
                row = similarities[i]
                rank = 1 + sum(bool(row[j] >= row[i]) for j in rivals)
                assert facts.correct[i] == (rank == 1)
                assert facts.reciprocal_rank[i].item() == pytest.approx(1 / rank)
                assert facts.positive_similarity[i].item() == pytest.approx(row[i].item(), abs=1e-6)
                hardest = max(row[j].item() for j in rivals)
                assert facts.hardest_negative_similarity[i].item() == pytest.approx(hardest, abs=1e-6)
        lonely = ops.mnrl_loss(queries[:1], documents[:1], diagnostics=True)[1]
        assert lonely.hardest_negative_similarity.item() == -torch.inf
        collapsed = ops.mnrl_loss(queries[:1].expand(4, -1), queries[:1].expand(8, -1), diagnostics=True)[1]
        assert not collapsed.correct.any()


def test_a_similarity_of_ones_own_goes_through_plain_pytorch() -> None:
    plain = {**OPTIONS, "euclid": {}}
    for options in plain.values():
        fused, fused_grads = value_and_gradients(lambda *x, o=options: loss(o, *x), inputs())
        fct = dot_score if options.get("similarity") == "dot" else cos_sim
        own = {**options, "similarity": lambda a, b, fct=fct: fct(a, b)}
        if "matryoshka_dims" in options:
            own["similarity"] = lambda a, b: cos_sim(a, b)
        value, grads = value_and_gradients(lambda *x, o=own: loss(o, *x), inputs())
        torch.testing.assert_close(value, fused, rtol=1e-5, atol=1e-6)
        for x, y in zip(grads, fused_grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def st_combinations() -> list[dict[str, Any]]:
    """Every legal combination of sentence-transformers' options."""
    found = []
    for chosen in itertools.product([False, True], repeat=3):
        others = [x for x, y in zip(("query_to_query", "doc_to_query", "doc_to_doc"), chosen, strict=True) if y]
        modes = ["joint", "per_direction"] if set(others) <= {"doc_to_query"} else ["joint"]
        for mode, hardness in itertools.product(modes, [None, "in_batch_negatives", "hard_negatives", "all_negatives"]):
            found.append({
                "directions": ("query_to_doc", *others), "partition_mode": mode, "hardness_mode": hardness,
                "hardness_strength": 0.0 if hardness is None else 3.0,
            })  # fmt: skip
    return found


@every_backend
@pytest.mark.parametrize("columns", [1, 3])
def test_equals_sentence_transformers_in_every_legal_combination(name: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    leaves = [torch.randn(5, 12, generator=generator) for _ in range(1 + columns)]
    cases = list(itertools.product(st_combinations(), [("cos_sim", cos_sim, 20.0), ("dot", dot_score, 0.5)]))
    for options, (similarity, fct, scale) in cases[:: 7 if name == "triton" else 1]:  # its interpreter is slow
        theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale, fct, **options)  # type: ignore[arg-type]
        expected, expected_grads = value_and_gradients(
            lambda *x, loss=theirs: loss.compute_loss_from_embeddings(list(x), None), leaves
        )
        with serving(name, "mnrl_rows"):
            value, grads = value_and_gradients(
                lambda q, *d, o=options, s=similarity, k=scale: ops.mnrl_loss(q, torch.cat(d), k, similarity=s, **o),
                leaves,
            )
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=str(options))
        for x, y in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6, msg=str(options))


@pytest.mark.parametrize(
    "options",
    [
        {"directions": ()},
        {"directions": ("doc_to_query",)},
        {"directions": ("query_to_doc", "sideways")},
        {"partition_mode": "split"},
        {"directions": ("query_to_doc", "query_to_query"), "partition_mode": "per_direction"},
        {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"},
        {"hardness_mode": "soft"},
        {"hardness_mode": "all_negatives", "hardness_strength": -1.0},
        {"scale": -1.0},
    ],
)
def test_what_sentence_transformers_refuses_is_refused(options: dict[str, Any]) -> None:
    queries, documents, _ = inputs()
    with pytest.raises(ValueError, match=r"\w"):
        MultipleNegativesRankingLoss(torch.nn.Identity(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=next(name for name in reversed(options))):
        ops.mnrl_loss(queries, documents, **options)


IDS = torch.arange(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"targets": torch.tensor([0, 1, 2, 8])}, ValueError, "targets must be rows of documents, 0 ... 7; got .* 8"),
        ({"targets": torch.tensor([0, -1, 2, 3])}, ValueError, "targets must be rows of documents.*got -1"),
        ({"targets": IDS.int()}, TypeError, "targets must be torch.int64, got torch.int32"),
        ({"targets": IDS[:3]}, ValueError, r"targets must have shape \[4\], got \[3\]"),
        ({"targets": [0, 1, 2, 3]}, TypeError, "targets must be a tensor, got list"),
        (
            {"targets": torch.tensor([0, 1, 2, 8]), "query_ids": IDS, "document_ids": torch.arange(8)},
            ValueError,
            "targets must be rows of documents, 0 ... 7; got .* 8",
        ),
        (
            {"targets": IDS, "query_ids": IDS[:3], "document_ids": torch.arange(8)},
            ValueError,
            r"query_ids must have shape \[4\], got \[3\]",
        ),
        ({"query_ids": [0, 1, 2, 3], "document_ids": torch.arange(8)}, TypeError, "query_ids must be a tensor, got li"),
        ({"targets": IDS, "directions": ("query_to_doc", "doc_to_query")}, ValueError, "targets go with directions="),
        (
            {"targets": IDS, "hardness_mode": "hard_negatives", "hardness_strength": 1.0},
            ValueError,
            "targets do not go with hardness_mode='hard_negatives'",
        ),
        ({"targets": 1}, ValueError, "offset must place 4 queries among 4, got 1"),
        ({"query_ids": IDS}, ValueError, "query_ids and document_ids go together"),
        ({"query_ids": IDS, "document_ids": IDS}, ValueError, r"document_ids must have shape \[8\], got \[4\]"),
        ({"query_ids": IDS[:2], "document_ids": torch.arange(8)}, ValueError, r"query_ids must have shape \[4\]"),
        ({"query_ids": IDS.float(), "document_ids": torch.arange(8)}, TypeError, "query_ids must be torch.int64"),
        ({"matryoshka_dims": [4, 2]}, ValueError, r"matryoshka_dims must ascend within 1 ... 6, got \[4, 2\]"),
        ({"matryoshka_dims": [4, 7]}, ValueError, "matryoshka_dims must ascend within 1 ... 6"),
        ({"matryoshka_dims": [4], "matryoshka_weights": [1, 2]}, ValueError, "matryoshka_weights must be 1 finite"),
        ({"weights": torch.ones(3)}, ValueError, r"weights must have shape \[4\]"),
        ({"weights": torch.zeros(4)}, ValueError, "weights must be finite, and their sum"),
        ({"scale": torch.tensor(0.0)}, ValueError, "scale must be finite and > 0, got 0.0"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must have shape \[4\]"),
        ({"scale": torch.tensor([1.0, 2.0, -3.0, 4.0])}, ValueError, "scale must be finite and > 0, got -3.0"),
        ({"margin": float("nan")}, ValueError, "margin must be a finite number"),
        ({"margin": 0.1, "margin_strategy": "loose"}, ValueError, "margin_strategy must be one of"),
        ({"similarity": "euclidean"}, ValueError, "similarity must be one of"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"all_queries": torch.zeros(3, 6)}, ValueError, "offset must place 4 queries among 3"),
        ({"all_queries": torch.zeros(8, 5)}, ValueError, "all_queries must have rows of length 6, got 5"),
        ({"all_queries": torch.zeros(8, 6).half()}, TypeError, "all_queries must have queries's dtype"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    queries, documents, _ = inputs()
    with pytest.raises(error, match=message):
        ops.mnrl_loss(queries, documents, **options)


def test_documents_that_are_no_tensor() -> None:
    queries, documents, _ = inputs()
    with pytest.raises(TypeError, match="documents must be a tensor, got list"):
        ops.mnrl_loss(queries, documents.tolist())  # type: ignore[arg-type]
