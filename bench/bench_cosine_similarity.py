"""cosine_similarity against sentence-transformers' util.cos_sim and torch.compile of it; the limit is oneDNN's product.

`pytest bench/bench_cosine_similarity.py --benchmark-only`
"""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import util
from torch import Tensor

from bench.conftest import DTYPES, Interleaved, assert_close, dtype_name, training
from bench.products import onednn_product
from triton_st import ops, reference

# rows of a, rows of b, width
SHAPES = [
    (8, 8, 384),
    (64, 64, 384),
    (128, 256, 50),
    (512, 512, 384),
    (2048, 2048, 384),
    (1024, 1024, 1024),
    (4096, 1024, 50),
    (8, 65536, 384),
]
compiled = torch.compile(util.cos_sim, dynamic=True)


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_similarity(
    interleaved: Interleaved, shape: tuple[int, int, int], dtype: torch.dtype, direction: str, device: torch.device
) -> None:
    m, n, d = shape
    torch.manual_seed(0)
    a, b = (torch.randn(rows, d).to(dtype).to(device) for rows in (m, n))
    train = direction != "forward"
    functions = {
        "sentence-transformers cos_sim": util.cos_sim,
        "torch.compile": compiled,
    }

    def run(function: object) -> object:
        assert callable(function)
        return training(function, a, b) if train else lambda: function(a, b)

    with torch.set_grad_enabled(train):
        result: Tensor = ops.cosine_similarity(a, b)
        assert_close(result.detach(), reference.cosine_similarity(a.float(), b.float()))
        interleaved(
            run(ops.cosine_similarity),  # type: ignore[arg-type]
            {name: run(function) for name, function in functions.items()},  # type: ignore[misc]
            limit=onednn_product(a, b, times=3 if train else 1),
            operator="cosine_similarity",
            shape={"rows of a": m, "rows of b": n, "width": d},
            dtype=dtype_name(dtype),
            direction=direction,
            gflop=2e-9 * m * n * d * (3 if train else 1),
        )
