"""Time and memory of the loss's forward and backward pass on batches of triplets too large to repeat often.

Each case runs in a process of its own, once to warm up (but for the largest) and then timed; memory is the largest
resident set above what the inputs and their gradients take. The share is that of three products at the rate of oneDNN,
measured in the same process. Prints tables and writes bench/results/mnrl_large.json.

    python -m bench.mnrl_large                          # up to 16,384 queries, with peers where they fit
    python -m bench.mnrl_large --batches 65536 --methods triton_st "triton_st, all options"
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_mnrl_loss import SCALE, cached_loss_stage, in_chunks, sentence_transformers
from bench.conftest import Run, training
from bench.products import onednn_product
from bench.report import duration, table
from bench.resources import forget_peak, resident
from triton_st import ops

RESULT = Path(__file__).parent / "results" / "mnrl_large.json"
ONCE_FROM = 60_000  # queries; a pass takes most of a minute
ALL_OPTIONS: dict[str, Any] = {
    "directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"),
    "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0, "margin": 0.1,
}  # fmt: skip


def everything(queries: Tensor, documents: Tensor) -> Tensor:
    """The loss with all options on at once."""
    rows, width = queries.shape
    ids = torch.arange(rows + len(documents))
    dims = [width // 6, width // 3, 2 * width // 3, width]
    return ops.mnrl_loss(
        queries, documents, SCALE, query_ids=ids[:rows], document_ids=ids[rows:], matryoshka_dims=dims, **ALL_OPTIONS
    )


METHODS: dict[str, Callable[[Tensor, Tensor], Run]] = {
    "triton_st": lambda q, d: training(lambda q, d: ops.mnrl_loss(q, d, SCALE), q, d),
    "triton_st, all options": lambda q, d: training(everything, q, d),
    "sentence-transformers MNRL": lambda q, d: training(sentence_transformers(), q, d),
    "sentence-transformers cached, loss stage": cached_loss_stage,
    "F.linear_cross_entropy, chunked": lambda q, d: training(in_chunks, q, d),
}


def measure(method: str, batch: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds, bytes beyond inputs and gradients, and the share of three products' time, of one case."""
    torch.manual_seed(0)
    small = torch.randn(64, width).to(dtype)
    METHODS[method](small, torch.cat([small, small]))()  # loads and compiles what there is
    q, d = (torch.randn(rows, width, dtype=dtype) for rows in (batch, 2 * batch))
    run = METHODS[method](q, d)
    if batch < ONCE_FROM:
        run()
    forget_peak()
    before = resident("VmRSS")
    started = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - started
    beyond = resident("VmHWM") - before - (q.numel() + d.numel()) * q.element_size()
    del kept
    a, b = (torch.randn(rows, width, dtype=dtype) for rows in (1024, 2048))
    result = {"method": method, "batch": batch, "width": width, "seconds": seconds, "bytes": beyond}
    if product := onednn_product(a, b, times=1):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            product[1]()
            times.append(time.perf_counter() - started)
        limit = sorted(times)[10] * 3 * (batch * 2 * batch) / (1024 * 2048)
        result |= {"share": limit / seconds, "threads": torch.get_num_threads()}
    return result


def main() -> None:
    """Run the cases, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--most-scores", type=float, default=2e9, help="bytes of [B, M] that a peer may hold")
    parser.add_argument("--case", nargs=2, metavar=("METHOD", "BATCH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        method, batch = arguments.case
        print(json.dumps(measure(method, int(batch), arguments.width, getattr(torch, arguments.dtype))))
        return
    results = {(r["method"], r["batch"], r["width"], r["dtype"]): r for r in _kept()}
    for batch in arguments.batches:
        for method in arguments.methods:
            if method == "sentence-transformers MNRL" and 8.0 * batch * batch > arguments.most_scores:
                print(f"{method} at {batch:,}: its similarities alone would take {8 * batch * batch / 2**30:.0f} GiB")
                continue
            command = [sys.executable, "-m", "bench.mnrl_large", "--case", method, str(batch)]
            command += ["--width", str(arguments.width), "--dtype", arguments.dtype]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result = {**json.loads(done.stdout.splitlines()[-1]), "dtype": arguments.dtype}
            results[(method, batch, arguments.width, arguments.dtype)] = result
    ordered = sorted(results.values(), key=lambda r: (r["dtype"], r["width"], r["batch"]))
    cells = [
        [
            f"{r['batch']:,}", str(r["width"]), r["dtype"], r["method"], duration(r["seconds"]),
            f"{r['share']:.0%}" if "share" in r else "–", f"{r['bytes'] / 2**20:,.0f} MiB",
        ]
        for r in ordered
    ]  # fmt: skip
    header = ["queries", "width", "dtype", "method", "time", "share of three products", "memory beyond results"]
    print(table(header, cells))
    RESULT.write_text(json.dumps(ordered, indent=1) + "\n")


def _kept() -> list[dict[str, Any]]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else []


if __name__ == "__main__":
    main()
