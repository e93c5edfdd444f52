"""Bytes that one encoder layer moves through a GPU's memory, counted and not timed: bench/results/encoder_traffic.md.

python -m bench.encoder_traffic

Everything runs on meta tensors. PyTorch's operators are counted as they are dispatched, forward and backward: what an
operator takes and what it returns is read and written once each. Our kernels are counted as they are launched, by the
same rule. Attention is given to every competitor as one fused kernel that stores no scores (the best there is), so
what differs is padding, the number of passes over the activations, and the masks that dropout stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.report import RESULTS, table
from triton_st import kernels
from triton_st.kernels.common import Launch, recording

DTYPE = torch.bfloat16
DROPOUT = 0.1
SHARES = {("_query_grad_kernel", "grad_qkv"): 1 / 3, ("_key_grad_kernel", "grad_qkv"): 2 / 3}
"""What kernels touch of an argument that they share with others."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's layer and a batch: `batch` texts, `tokens` of them real, padded to `length`."""

    name: str
    width: int
    heads: int
    inner: int
    batch: int
    tokens: int
    length: int


SHAPES = (
    Shape("reference recipe, 384 texts of 23 tokens", 50, 5, 200, 384, 9_000, 72),
    Shape("MiniLM, 192 texts of 23 tokens", 384, 12, 1536, 192, 4_500, 72),
    Shape("BERT base, 192 texts of 23 tokens", 768, 12, 3072, 192, 4_500, 72),
    Shape("BERT base, 32 texts of 512 tokens", 768, 12, 3072, 32, 16_384, 512),
)


class Count(TorchDispatchMode):
    """Adds up the bytes of what real operators take and return; views and bare allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (aliases or name.startswith(("empty", "new_empty", "_unsafe_view", "detach"))):
            taken = (
                []
                if name in ("zero_", "fill_", "zeros_like", "ones_like", "new_zeros")
                else tree_leaves((args, kwargs))
            )
            self.add(*taken, *tree_leaves(result))
        return result

    def add(self, *values: Any) -> None:
        """Each tensor among the values once."""
        tensors = {id(x): x for x in values if isinstance(x, Tensor)}
        self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())

    def launches(self, recorded: list[Launch]) -> None:
        """What our kernels move."""
        for launch in recorded:
            for name, value in launch.arguments.items():
                if isinstance(value, Tensor):
                    share = SHARES.get((launch.kernel.fn.__name__, name), 1)
                    self.bytes += share * value.numel() * value.element_size()
        recorded.clear()


class _FusedAttention(torch.autograd.Function):
    """q, k, v [B, H, L, d] in one kernel each way; the count is the least that such kernels move."""

    @staticmethod
    def forward(ctx: Any, count: Count, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ctx.count, ctx.saved = count, (q, k, v, mask)
        out = torch.empty_like(q)
        ctx.rows = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        count.add(q, k, v, mask, out, ctx.rows)
        ctx.out = out
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved
        results = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        ctx.count.add(grads[0], q, k, v, mask, ctx.out, ctx.rows, *results)
        return None, *results, None


def _parameters(shape: Shape) -> dict[str, Tensor]:
    d, i = shape.width, shape.inner
    sizes: dict[str, tuple[int, ...]] = {
        "wqkv": (3 * d, d), "bqkv": (3 * d,), "wo": (d, d), "bo": (d,), "w1": (i, d), "b1": (i,), "w2": (d, i),
        "b2": (d,), "g1": (d,), "h1": (d,), "g2": (d,), "h2": (d,),
    }  # fmt: skip
    return {name: torch.empty(size, dtype=DTYPE, device="meta", requires_grad=True) for name, size in sizes.items()}


def pytorch(shape: Shape, padded: bool) -> tuple[float, float]:
    """Bytes of a layer forward and backward in plain PyTorch with fused attention, on padded or on packed tokens."""
    rows, heads, d = shape.batch * shape.length if padded else shape.tokens, shape.heads, shape.width
    p = _parameters(shape)
    hidden = torch.empty(rows, d, dtype=DTYPE, device="meta", requires_grad=True)
    mask = torch.empty(shape.batch, shape.length, dtype=DTYPE, device="meta") if padded else None
    count = Count()
    with count:
        qkv = F.linear(hidden, p["wqkv"], p["bqkv"])
        q, k, v = qkv.view(rows, 3, heads, d // heads).unbind(1)
        attended = _FusedAttention.apply(count, q, k, v, mask).view(rows, d)
        attended = F.dropout(F.linear(attended, p["wo"], p["bo"]), DROPOUT)
        middle = F.layer_norm(attended + hidden, [d], p["g1"], p["h1"])
        inner = F.gelu(F.linear(middle, p["w1"], p["b1"]))
        out = F.layer_norm(F.dropout(F.linear(inner, p["w2"], p["b2"]), DROPOUT) + middle, [d], p["g2"], p["h2"])
        forward = count.bytes
        grad = torch.empty_like(out)
        torch.autograd.grad(out, [hidden, *p.values()], grad)
    return forward, count.bytes - forward


def ours(shape: Shape) -> tuple[float, float]:
    """The same layer by our kernels; the products are PyTorch's, their biases ride with what follows them."""
    rows, heads, d = shape.tokens, shape.heads, shape.width
    p = {name: x.detach() for name, x in _parameters(shape).items()}
    f = {name: x.float() for name, x in p.items() if x.dim() == 1}
    hidden = torch.empty(rows, d, dtype=DTYPE, device="meta")
    seed = torch.empty((), dtype=torch.int64, device="meta")
    cu_seqlens = torch.empty(shape.batch + 1, dtype=torch.int32, device="meta")
    attention = cu_seqlens, seed, shape.length, DROPOUT, 0
    count = Count()

    def run(launcher: Callable[..., Any], *arguments: Any) -> Any:
        with recording("cuda") as recorded:
            result = launcher(*arguments)
        count.launches(recorded)
        return result

    def linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        with count:
            torch.mm(grad.t(), x)
            return torch.mm(grad, weight)

    with count:
        qkv = F.linear(hidden, p["wqkv"], p["bqkv"]).view(rows, 3, heads, d // heads)
    attended, logsumexp = run(kernels.packed_attention_forward, qkv, *attention)
    with count:
        projected = F.linear(attended, p["wo"])
    norm = run(
        kernels.dropout_add_layer_norm_forward,
        projected, hidden, f["g1"], f["h1"], f["bo"], seed, 1e-12, DROPOUT, 1,
    )  # fmt: skip
    with count:
        pre = F.linear(norm[0], p["w1"])
    inner = run(kernels.bias_gelu, pre, f["b1"])
    with count:
        second = F.linear(inner, p["w2"])
    last = run(
        kernels.dropout_add_layer_norm_forward,
        second, norm[0], f["g2"], f["h2"], f["b2"], seed, 1e-12, DROPOUT, 2,
    )  # fmt: skip
    forward = count.bytes

    grad = torch.empty_like(hidden)
    grad_second, grad_middle, *_ = run(
        kernels.dropout_add_layer_norm_backward,
        grad, second, norm[0], f["g2"], last[1], last[2], f["b2"], seed, DROPOUT, 2,
    )  # fmt: skip
    grad_pre, _ = run(kernels.bias_gelu_backward, linear_backward(grad_second, inner, p["w2"]), pre, f["b1"])
    grad_first = linear_backward(grad_pre, norm[0], p["w1"])
    with count:
        grad_middle = grad_middle + grad_first
    grad_projected, grad_hidden, *_ = run(
        kernels.dropout_add_layer_norm_backward,
        grad_middle, projected, hidden, f["g1"], norm[1], norm[2], f["bo"], seed, DROPOUT, 1,
    )  # fmt: skip
    grad_attended = linear_backward(grad_projected, attended, p["wo"])
    grad_qkv, _ = run(kernels.packed_attention_backward, grad_attended, qkv, attended, logsumexp, *attention)
    grad_input = linear_backward(grad_qkv.view(rows, 3 * d), hidden, p["wqkv"])
    with count:
        grad_qkv.view(rows, 3 * d).sum(0)
        torch.add(grad_input, grad_hidden)
    return forward, count.bytes - forward


def page() -> str:
    """The table, and what it says and does not say."""
    rows = []
    for shape in SHAPES:
        counts = {
            "padded PyTorch": pytorch(shape, True),
            "unpadded PyTorch": pytorch(shape, False),
            "ours": ours(shape),
        }
        best = counts["ours"]
        for name, (forward, backward) in counts.items():
            megabytes = [f"{x / 1e6:,.1f}" for x in (forward, backward, forward + backward)]
            times = f"{(forward + backward) / sum(best):.2f}×"
            rows.append([shape.name, f"{shape.width}", name, *megabytes, times])
    header = ["batch", "hidden", "by", "forward, MB", "backward, MB", "both, MB", "both, in ours"]
    parts = [
        "# Bytes moved by one encoder layer on a GPU",
        "Written by `python -m bench.encoder_traffic`: counted on meta tensors, nothing is timed. bfloat16, dropout "
        f"{DROPOUT}, one layer with its four products. An operator or kernel reads each argument and writes each "
        "result once; what a fused attention reads more than once comes from the cache and is not counted.",
        "*Padded PyTorch* is eager PyTorch on [texts, longest] tokens; *unpadded PyTorch* the same on the real tokens "
        "only, with variable-length attention, as FlashAttention's unpadding does it. Both are given an attention that "
        "stores no scores and no mask; their other dropouts store one byte for each element. What ours saves in "
        "backward by storing no sums and no masks it reads again as the sums' terms: less is held between the passes, "
        "while the traffic is about the same.",
        table(header, rows),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    (RESULTS / "encoder_traffic.md").write_text(page())


if __name__ == "__main__":
    main()
