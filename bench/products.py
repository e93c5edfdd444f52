"""The fastest matrix product that this machine has: the limit for whatever is made of products."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.conftest import Run


def onednn_product(a: Tensor, b: Tensor, times: int) -> tuple[str, Run] | None:
    """oneDNN's a · bᵀ with b packed ahead, `times` over.

    fp16 runs in fp32, which oneDNN multiplies faster on a CPU, and so does bf16 where the processor has nothing for it.
    """
    if a.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    halves = [torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    dtype = a.dtype if a.dtype in (torch.float32, *halves) else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(b, len(a))

    def run() -> None:
        for _ in range(times):
            torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")

    return f"{times} product{'s' * (times > 1)} by oneDNN, operands packed", run
