"""mnrl_loss against the same loss of sentence-transformers and of PyTorch; the limit is oneDNN's products.

Peers, each on the same embeddings: sentence-transformers' MultipleNegativesRankingLoss and the loss stage of its cached
form, torch.compile of three lines, and F.linear_cross_entropy of normalised rows, plain and in chunks.

`pytest bench/bench_mnrl_loss.py --benchmark-only`; `python -m bench.mnrl_large` for batches too large to repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn

from bench.conftest import DTYPES, Interleaved, Run, assert_close, dtype_name, training
from bench.products import onednn_product
from triton_st import ops, reference

# queries, documents (a positive and a hard negative each), width
SHAPES = [
    (8, 16, 384), (128, 256, 50), (128, 256, 384), (128, 256, 768), (1024, 2048, 50), (1024, 2048, 384),
    (1024, 2048, 768), (4096, 8192, 50), (4096, 8192, 384), (4096, 8192, 768),
]  # fmt: skip
SCALE = 20.0
Loss = Callable[[Tensor, Tensor], Tensor]
MODEL: Any = nn.Sequential(nn.Identity())  # the losses are given embeddings and never call it
LABELS = torch.zeros(0)  # unused, as in sentence-transformers


def by_hand(queries: Tensor, documents: Tensor) -> Tensor:
    """The loss in three lines, for torch.compile."""
    scores = util.cos_sim(queries, documents) * SCALE
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=scores.device))


compiled = torch.compile(by_hand, dynamic=True)


def linear_cross_entropy(queries: Tensor, documents: Tensor, **options: Any) -> Tensor:
    """Documents as the weights of a linear layer; every row normalised before, the scale in the queries."""
    targets = torch.arange(len(queries), device=queries.device)
    q, d = F.normalize(queries) * SCALE, F.normalize(documents)
    return F.linear_cross_entropy(q, d, targets, **options)


def in_chunks(queries: Tensor, documents: Tensor) -> Tensor:
    """`linear_cross_entropy` that never holds all logits."""
    return linear_cross_entropy(queries, documents, options=nn.LinearCrossEntropyOptions())


def sentence_transformers(**options: Any) -> Loss:
    """MultipleNegativesRankingLoss on embeddings."""
    loss = MultipleNegativesRankingLoss(MODEL, scale=SCALE, **options)

    def of_embeddings(queries: Tensor, documents: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([queries, *documents.split(len(queries))], LABELS)

    return of_embeddings


def cached_loss_stage(queries: Tensor, documents: Tensor, rows: int = 256) -> Run:
    """The loss stage of CachedMultipleNegativesRankingLoss: `rows` of similarities at a time, forward and backward."""
    loss = CachedMultipleNegativesRankingLoss(MODEL, scale=SCALE, mini_batch_size=rows)

    def run() -> Tensor:
        leaves = [x.detach().requires_grad_() for x in (queries, *documents.split(len(queries)))]
        return loss.calculate_loss([[x] for x in leaves], with_backward=True)

    return run


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mnrl_loss(
    interleaved: Interleaved, shape: tuple[int, int, int], dtype: torch.dtype, direction: str, device: torch.device
) -> None:
    batch, documents, dim = shape
    if dtype == torch.float16 and batch > 1024 and device.type == "cpu":
        pytest.skip("PyTorch's fp16 products take seconds here")
    torch.manual_seed(0)
    q, d = (torch.randn(rows, dim).to(dtype).to(device) for rows in (batch, documents))
    train = direction != "forward"
    functions: dict[str, Loss] = {
        "sentence-transformers MNRL": sentence_transformers(),
        "F.linear_cross_entropy": linear_cross_entropy,
        "F.linear_cross_entropy, chunked": in_chunks,
        "torch.compile": compiled,
    }

    def run(function: Loss) -> Run:
        return training(function, q, d) if train else lambda: function(q, d)

    peers = {name: run(function) for name, function in functions.items()}
    if train:
        peers["sentence-transformers cached, loss stage"] = cached_loss_stage(q, d)
    with torch.set_grad_enabled(train):
        expected = reference.mnrl_loss(q.float(), d.float(), SCALE).detach()
        assert_close(ops.mnrl_loss(q, d, SCALE).detach(), expected)
        # A half-precision peer rounds its logits: of 4,096 bfloat16 rows of width 50 one makes 11.25, not 12.74.
        tolerance = 0.02 if dtype == torch.float32 else 0.15
        for function in functions.values():
            torch.testing.assert_close(function(q, d).detach().float(), expected, rtol=tolerance, atol=tolerance)
        interleaved(
            run(ops.mnrl_loss),
            peers,
            limit=onednn_product(q, d, times=3 if train else 1),
            operator="mnrl_loss",
            shape={"queries": batch, "documents": documents, "width": dim},
            dtype=dtype_name(dtype),
            direction=direction,
            gflop=2e-9 * batch * documents * dim * (3 if train else 1),
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "both ways": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "four directions": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    "hardness": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "ids": {},  # drawn for each batch
    "margin": {"margin": 0.1},
    "four prefixes": {"matryoshka_dims": (64, 128, 256, 384)},
    "diagnostics": {"diagnostics": True},
}
OF_ST = ("both ways", "four directions", "hardness")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("batch", [128, 1024, 4096])
def test_options(interleaved: Interleaved, batch: int, option: str, device: torch.device) -> None:
    """What an option costs: the limit is the plain loss, 100 % a free option. float32, forward and backward."""
    torch.manual_seed(0)
    q, d = (torch.randn(rows, 384, device=device) for rows in (batch, 2 * batch))
    ids = [torch.randint(10 * batch, (rows,), device=device) for rows in (batch, 2 * batch)]

    def ours(queries: Tensor, documents: Tensor) -> Tensor:
        rows, how = len(queries), OPTIONS[option]
        if option == "ids":  # a few texts stand in the batch twice
            how = {"query_ids": ids[0][:rows], "document_ids": torch.cat([x[:rows] for x in ids[1].split(batch)])}
        loss: Any = ops.mnrl_loss(queries, documents, SCALE, **how)
        return loss[0] if isinstance(loss, tuple) else loss

    some_q, some_d = q[:512], torch.cat([x[:512] for x in d.split(batch)])
    assert_close(ours(some_q, some_d), ours(some_q.double(), some_d.double()))  # float64 is the reference's
    peers: dict[str, Run] = {}
    if option in OF_ST:
        peer = sentence_transformers(**OPTIONS[option])
        assert_close(ours(q, d), peer(q, d))
        peers = {"sentence-transformers MNRL": training(peer, q, d)}
    interleaved(
        training(ours, q, d),
        peers,
        limit=("the plain loss", training(ops.mnrl_loss, q, d)),
        operator="mnrl_loss, what options cost",
        shape={"queries": batch, "documents": 2 * batch, "width": 384},
        dtype=option,
        direction="forward and backward",
    )
