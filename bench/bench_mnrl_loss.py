"""mnrl_loss against sentence-transformers' loss on the same embeddings and torch.compile of it; the limit is oneDNN's.

`pytest bench/bench_mnrl_loss.py --benchmark-only`
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import util
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor, nn

from bench.conftest import DTYPES, Interleaved, assert_close, dtype_name, training
from bench.products import onednn_product
from triton_st import ops, reference

# queries, documents (a positive and a hard negative each), width
SHAPES = [(8, 16, 384), (128, 256, 50), (128, 256, 384), (1024, 2048, 50), (1024, 2048, 384), (4096, 8192, 384)]
SCALE = 20.0


def by_hand(queries: Tensor, documents: Tensor) -> Tensor:
    """The loss in three lines, for torch.compile."""
    scores = util.cos_sim(queries, documents) * SCALE
    return F.cross_entropy(scores.float(), torch.arange(len(queries), device=scores.device))


compiled = torch.compile(by_hand, dynamic=True)


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
    model: Any = nn.Identity()  # the loss is given embeddings and never calls it
    loss = MultipleNegativesRankingLoss(model, scale=SCALE)

    labels = torch.zeros(0)  # unused, as in sentence-transformers

    def sentence_transformers(queries: Tensor, documents: Tensor) -> Tensor:
        return loss.compute_loss_from_embeddings([queries, *documents.split(batch)], labels)

    functions = {"sentence-transformers MNRL": sentence_transformers, "torch.compile": compiled}

    def run(function: object) -> object:
        assert callable(function)
        return training(function, q, d) if train else lambda: function(q, d)

    with torch.set_grad_enabled(train):
        assert_close(ops.mnrl_loss(q, d, SCALE).detach(), reference.mnrl_loss(q.float(), d.float(), SCALE))
        interleaved(
            run(ops.mnrl_loss),  # type: ignore[arg-type]
            {name: run(function) for name, function in functions.items()},  # type: ignore[misc]
            limit=onednn_product(q, d, times=3 if train else 1),
            operator="mnrl_loss",
            shape={"queries": batch, "documents": documents, "width": dim},
            dtype=dtype_name(dtype),
            direction=direction,
            gflop=2e-9 * batch * documents * dim * (3 if train else 1),
        )
