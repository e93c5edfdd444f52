"""How exact the loss's gradient is: its error against float64 over the level of the loss, the dtype and the method.

A batch of triplets is drawn at each level of the loss. Inputs are rounded to the dtype first, and the gradient of the
result is 2^16, as a loss scaler has it, which is divided out again in float64: what is measured is the method, not the
storage of small numbers. Prints a table and writes bench/results/mnrl_accuracy.json.

    python -m bench.mnrl_accuracy
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.bench_mnrl_loss import SCALE, in_chunks, sentence_transformers
from bench.conftest import DTYPES, dtype_name
from bench.report import table
from triton_st import ops, reference

RESULT = Path(__file__).parent / "results" / "mnrl_accuracy.json"
LEVELS = (5.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
BATCH, DIM = 128, 384
GRAD = 2.0**16


class SoftmaxCastFirst(torch.autograd.Function):
    """The usual fused loss: probabilities in the inputs' dtype, 1 subtracted at the positive, then the products."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, q: Tensor, d: Tensor) -> Tensor:
        """The loss, in float32."""
        logits = (q.float() @ d.float().T) * SCALE
        ctx.save_for_backward(q, d, logits)
        return F.cross_entropy(logits, torch.arange(len(q)))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients, in the inputs' dtype."""
        q, d, logits = ctx.saved_tensors  # type: ignore[attr-defined]
        p = logits.softmax(1).to(q.dtype)
        p.diagonal().sub_(1)
        factor = grads[0] * (SCALE / len(q))
        return ((p.float() @ d.float()) * factor).to(q.dtype), ((p.T.float() @ q.float()) * factor).to(d.dtype)


def cast_first(queries: Tensor, documents: Tensor) -> Tensor:
    """`SoftmaxCastFirst` on cosines."""
    loss: Tensor = SoftmaxCastFirst.apply(F.normalize(queries), F.normalize(documents))
    return loss


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "triton_st": lambda q, d: ops.mnrl_loss(q, d, SCALE),
    "sentence-transformers MNRL": sentence_transformers(),
    "F.linear_cross_entropy, chunked": in_chunks,
    "p cast before 1 is subtracted": cast_first,
}


def batch_at(level: float) -> tuple[Tensor, Tensor, float]:
    """Queries and documents whose loss is about `level`, and that loss: positives lie between noise and the query."""
    generator = torch.Generator().manual_seed(0)
    q, noise, negatives = (torch.randn(BATCH, DIM, generator=generator) for _ in range(3))
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        documents = torch.cat([share * q + (1 - share) * noise, negatives])
        loss = reference.mnrl_loss(q.double(), documents.double(), SCALE).item()
        low, high = (share, high) if loss > level else (low, share)
    return q, documents, loss


def error(method: Callable[[Tensor, Tensor], Tensor], q: Tensor, d: Tensor) -> float:
    """‖gradient − exact‖ / ‖exact‖ over both inputs."""
    exact_leaves = [x.double().requires_grad_() for x in (q, d)]
    exact = torch.autograd.grad(reference.mnrl_loss(exact_leaves[0], exact_leaves[1], SCALE), exact_leaves)
    leaves = [x.clone().requires_grad_() for x in (q, d)]
    loss = method(leaves[0], leaves[1])
    factor = GRAD if loss.dtype == torch.float32 else 1.0  # a half-precision loss cannot be scaled so far
    grads = torch.autograd.grad(loss, leaves, torch.full_like(loss, factor))
    difference = torch.cat([a.double() / factor - e for a, e in zip(grads, exact, strict=True)])
    return (difference.norm() / torch.cat(exact).norm()).item()


def main() -> None:
    """Measure, print, write."""
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        q, d, loss = batch_at(level)
        for dtype in DTYPES:
            errors = {name: error(method, q.to(dtype), d.to(dtype)) for name, method in METHODS.items()}
            rows.append({"loss": loss, "dtype": dtype_name(dtype), "errors": errors})
    cells = [[f"{r['loss']:.3g}", r["dtype"], *(f"{e:.2g}" for e in r["errors"].values())] for r in rows]
    print(table(["loss", "dtype", *METHODS], cells))
    RESULT.write_text(json.dumps({"batch": BATCH, "width": DIM, "grad_output": GRAD, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
