"""Products done and bytes moved by the GPU form of the contrastive loss, kernel by kernel, without a GPU.

The launchers run with launching recorded, as in the ahead-of-time check, and each launch is counted: the products it
does and what it reads from and writes to device memory, every operand once (what a panel's tiles read again comes from
the L2 cache). sentence-transformers' loss runs on tensors without memory, and what each of its operations reads and
writes is counted the same way. The workspace is the peak of what the launcher allocates beyond what it returns.

    python -m bench.mnrl_traffic        # writes bench/results/mnrl_traffic.md
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.report import table
from triton_st import kernels
from triton_st.kernels.common import Launch, meta, recording

PAGE = Path(__file__).parent / "results" / "mnrl_traffic.md"
BATCHES = (128, 1024, 4096, 16384, 65536)
WIDTHS = (50, 384, 768)
DTYPE = torch.float16
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "symmetric": {"directions": 5, "joint": False},
    "every direction": {"directions": 15},
    "four prefixes (D, D/2, D/4, D/8)": {"prefixes": (1, 2, 4, 8)},
    "ids, margin, hardness": {"ids": True, "margin": 0.1, "hardness_mode": 1, "hardness_strength": 5.0},
}


def arguments(b: int, m: int, d: int, dtype: torch.dtype, device: str = "meta", **form: Any) -> dict[str, Any]:
    """Arguments of `mnrl_rows` for uninitialised tensors."""
    dims = sorted(d // part for part in form.pop("prefixes", ()))
    ids = form.pop("ids", False)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return {
        "queries": empty(b, d, dtype=dtype), "documents": empty(m, d, dtype=dtype), "all_queries": None,
        "targets": None, "offset": 0, "scale": empty(dtype=torch.float32), "row_weights": None, "normalized": True,
        "directions": 1, "joint": True, "hardness_mode": 0, "hardness_strength": 0.0,
        "query_ids": empty(b) if ids else None, "document_ids": empty(m) if ids else None,
        "owner_ids": empty(m) if ids else None, "margin": None, "relative_margin": False,
        "dims": dims, "dim_weights": [1.0] * len(dims), "gradients": True, "diagnostics": False,
    } | form  # fmt: skip


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _of_copies(a: dict[str, Any]) -> tuple[int, int]:
    rows = a["a_count"] + a["b_count"]
    item = a["a"].element_size()
    return 0, rows * (a["D"] + a["WIDTH"]) * item + (8 * rows if a["a_power"] is not None else 0)


def _of_positives(a: dict[str, Any]) -> tuple[int, int]:
    return 0, a["row_count"] * (2 * a["D"] * a["queries"].element_size() + 16)


def _of_logits(a: dict[str, Any]) -> int:
    rows, columns, prefixes = a["left_count"], a["right_count"], a.get("PREFIXES", 1)
    moved = prefixes * 4 * ((rows + columns) * (1 + (prefixes > 1)) + rows * (1 + (a["bounds"] is not None)))
    return moved + 4 * rows + (16 * (rows + columns) if a["left_ids"] is not None else 0)


def _of_dots(a: dict[str, Any]) -> tuple[int, int]:
    rows, columns, width = a["left_count"], a["right_count"], a["D"]
    return 2 * rows * columns * width, (rows + columns) * width * a["left"].element_size()


def _of_sums(a: dict[str, Any]) -> tuple[int, int]:
    work, moved = _of_dots(a)
    parts = math.ceil(a["right_count"] / a["part_columns"])
    stripes = parts * a["left_count"] * (8 * a.get("PREFIXES", 1) + (0 if a["hardest"] is None else 8))
    return work, moved + _of_logits(a) + stripes * (1 if a["fresh"] else 2)


def _of_weights(a: dict[str, Any]) -> tuple[int, int]:
    work, moved = _of_dots(a)
    parts = math.ceil(a["right_count"] / a["part_columns"])
    stored = a["left_count"] * a["right_count"] * a["weights"].element_size()
    return work, moved + _of_logits(a) + stored + a["left_count"] * (8 + 16 * parts)


def _of_prefix_products(a: dict[str, Any]) -> tuple[int, int]:
    work, moved = _of_dots(a)
    rows, columns = a["left_count"], a["right_count"]
    return work, moved + 4 * a["PREFIXES"] * (rows * columns + rows + columns)


def _of_prefix_weights(a: dict[str, Any]) -> tuple[int, int]:
    rows, columns, prefixes = a["left_count"], a["right_count"], a["PREFIXES"]
    moved = prefixes * rows * columns * (4 + a["weights"].element_size())
    row_blocks, column_blocks = math.ceil(rows / a["BLOCK_Q"]), math.ceil(columns / a["BLOCK_M"])
    row_sums = column_blocks * rows * (8 + 8 * prefixes * (1 + (a["left_along"] is not None)))
    column_sums = 4 * prefixes * columns * (row_blocks if a["right_along"] is not None else 0)
    return 0, moved + _of_logits(a) + 8 * prefixes * rows + row_sums + column_sums


def _of_weighted_sum(a: dict[str, Any]) -> tuple[int, int]:
    rows, terms, width, item = a["rows"], a["terms"], a["D"], a["x"].element_size()
    panels = a["SEGMENTS"]
    sums = 4 * a["out"].shape[0] * rows * a["WIDTH"] * (2 if a["accumulate"] else 1)
    return 2 * rows * terms * width, panels * rows * terms * item + terms * width * item + sums


def _of_projection(a: dict[str, Any]) -> tuple[int, int]:
    count, width, item = a["count"], a["WIDTH"], a["x"].element_size()
    read = 4 * a["parts"] * width + a["D"] * item + 8
    partners = a["pairs"] * (a["D"] * item + 4 * a["share_parts"] + 8)
    return 0, count * (read + 4 * a["D"]) + partners


def _of_prefix_copies(a: dict[str, Any]) -> tuple[int, int]:
    """A segment is read for the norm of each prefix that it is part of, and once more to be copied."""
    read = a["EDGES"][-1] + (sum(a["EDGES"]) if a["power_out"] is not None else 0)
    facts = 12 * a["PREFIXES"] if a["power_out"] is not None else 0
    return 0, a["count"] * ((read + a["STARTS"][-1]) * a["x"].element_size() + facts)


def _of_pairs(a: dict[str, Any]) -> tuple[int, int]:
    return 0, a["pairs"] * a["PREFIXES"] * (8 + (16 if a["q_norm"] is not None else 0))


def _of_prefix_projection(a: dict[str, Any]) -> tuple[int, int]:
    count, width, prefixes, item = a["count"], a["EDGES"][-1], a["PREFIXES"], a["x"].element_size()
    facts = 16 * prefixes if a["norm"] is not None else 0
    partners = a["pairs"] * (width * item + 12 * prefixes) if a["other"] is not None else 0
    return 0, count * (4 * a["parts"] * a["WIDTH"] + width * (item + 4) + facts) + partners


def _of_losses(a: dict[str, Any]) -> tuple[int, int]:
    return 0, a["row_count"] * (8 * a["slots"] + 20)


COUNTS: dict[str, Callable[[dict[str, Any]], tuple[int, int]]] = {
    "_copy_kernel": _of_copies,
    "_positives_kernel": _of_positives,
    "_sums_kernel": _of_sums,
    "_losses_kernel": _of_losses,
    "_weights_kernel": _of_weights,
    "_weighted_sum_kernel": _of_weighted_sum,
    "_project_kernel": _of_projection,
    "_prefix_copy_kernel": _of_prefix_copies,
    "_prefix_sums_kernel": _of_sums,
    "_prefix_products_kernel": _of_prefix_products,
    "_prefix_weights_kernel": _of_prefix_weights,
    "_pairs_kernel": _of_pairs,
    "_prefix_project_kernel": _of_prefix_projection,
}
"""Of each kernel: floating-point operations in products, and bytes read and written, for the arguments of a launch."""


def launches(b: int, m: int, d: int, dtype: torch.dtype = DTYPE, **form: Any) -> list[Launch]:
    """What `mnrl_rows` with gradients would launch."""
    with recording("cuda") as recorded:
        kernels.mnrl_rows(**arguments(b, m, d, dtype, **form))
    return list(recorded)


def by_kernel(recorded: list[Launch]) -> dict[str, tuple[int, int, int]]:
    """Launches, operations and bytes of each kernel."""
    totals: dict[str, tuple[int, int, int]] = defaultdict(lambda: (0, 0, 0))
    for kernel, _, given in recorded:
        name = kernel.fn.__name__
        done = (1, *COUNTS[name](given))
        totals[name] = tuple(map(sum, zip(totals[name], done, strict=True)))  # type: ignore[assignment]
    return dict(totals)


def least_bytes(b: int, m: int, d: int, dtype: torch.dtype = DTYPE) -> int:
    """Every input read once, every gradient written once in float32, one loss a row."""
    return (b + m) * d * (dtype.itemsize + 4) + 4 * b


class _Moved(TorchDispatchMode):
    """Counts what operations read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                self.bytes += _bytes(x) if isinstance(x, Tensor) else 0
        return result


def sentence_transformers_bytes(b: int, m: int, d: int, dtype: torch.dtype = DTYPE) -> int:
    """What the operations of sentence-transformers' loss, forward and backward, read and write."""
    loss = MultipleNegativesRankingLoss(None)
    columns = [meta(b, d, dtype=dtype).requires_grad_() for _ in range(1 + m // b)]
    with _Moved() as moved:
        value = loss.compute_loss_from_embeddings(columns, None)
        torch.autograd.grad(value, columns)
    return moved.bytes


def workspace(b: int, m: int, d: int, dtype: torch.dtype = DTYPE, **form: Any) -> int:
    """Peak of what the launcher allocates, less what it returns; nothing is launched, and memory is not touched."""
    given = arguments(b, m, d, dtype, "cpu", **form)
    with (
        recording("cuda", most=0),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        results = kernels.mnrl_rows(**given)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak - sum(map(_bytes, results))


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def page() -> str:
    """The tables."""
    parts = [
        "# Contrastive loss on a GPU: products and bytes",
        "Written by `python -m bench.mnrl_traffic` from the launches that the Triton launcher records; nothing here is "
        "a measurement of time. Triplets (M = 2 · B) in float16, loss and gradients. Products are in units of one "
        "[B, M, D] product (2 · B · M · D operations; the least is 3, padding of D included in ours); bytes are to and "
        "from device memory, each launch's operands once. The least is reading the inputs and writing float32 "
        "gradients. Workspace is what is allocated beyond the results.",
        "## Against the minimum and sentence-transformers",
    ]
    rows = []
    for d in WIDTHS:
        for b in BATCHES:
            m, least = 2 * b, least_bytes(b, 2 * b, d)
            counted = by_kernel(launches(b, m, d))
            work, moved = (sum(each[i] for each in counted.values()) for i in (1, 2))
            theirs = sentence_transformers_bytes(b, m, d)
            rows.append([
                f"{d}", f"{b:,}", f"{work / (2 * b * m * d):.2f}", _mebibytes(moved), _mebibytes(least),
                f"{moved / least:.1f}", _mebibytes(theirs), f"{theirs / moved:.1f}", _mebibytes(workspace(b, m, d)),
            ])  # fmt: skip
    header = ["D", "B", "products", "MiB moved", "least MiB", "moved / least", "sentence-transformers, MiB",
              "theirs / ours", "workspace, MiB"]  # fmt: skip
    parts.append(table(header, rows))
    parts.append("## Kernel by kernel, D = 384")
    rows = [
        [f"{b:,}", f"`{name}`", f"{count:,}", f"{work / (4 * b * b * 384):.2f}", _mebibytes(moved)]
        for b in (128, 4096, 65536)
        for name, (count, work, moved) in by_kernel(launches(b, 2 * b, 384)).items()
    ]
    parts.append(table(["B", "kernel", "launches", "products", "MiB moved"], rows))
    parts.append("## What options cost, B = 4,096, D = 384")
    parts.append(
        "A direction is one more block of similarities (documents against queries [B, B], against documents [B, M], "
        "queries against queries [B, B]). Prefixes share the sweeps over D: their products are those of D, each "
        "segment padded to whole blocks of 64 columns. What they cost besides is bytes: products of each prefix in "
        "float32, and one panel of weights for each segment, which stay in the L2 cache as far as it goes."
    )
    plain = sum(work for _, work, _ in by_kernel(launches(4096, 8192, 384)).values())
    rows = []
    for name, form in FORMS.items():
        counted = by_kernel(launches(4096, 8192, 384, **form))
        work, moved = (sum(each[i] for each in counted.values()) for i in (1, 2))
        rows.append([
            name, f"{work / (4 * 4096**2 * 384):.2f}", f"{work / plain:.2f}", _mebibytes(moved),
            _mebibytes(workspace(4096, 8192, 384, **form)),
        ])  # fmt: skip
    parts.append(table(["form", "products", "of the plain loss", "MiB moved", "workspace, MiB"], rows))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
