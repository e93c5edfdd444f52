"""Runs an operator test once per backend and dtype, skipping what cannot be served here and saying why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from triton_st import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

every_backend = pytest.mark.parametrize("name", backend.BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def interpreted(name: str, device: torch.device) -> bool:
    """Whether `name` is Triton under its interpreter: exact, but slow, so that tests give it small shapes."""
    return name == "triton" and device.type == "cpu"


@contextlib.contextmanager
def serving(
    name: str, operator: str, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Iterator[None]:
    """Serve `operator` by backend `name` inside the block; skip the test where that cannot be."""
    device = device or torch.device("cpu")
    if name == "cpp" and device.type != "cpu":
        pytest.skip("the C++ kernels serve CPU tensors")
    if name == "triton":
        if problem := backend.triton_problem(device):
            pytest.skip(problem)
        from triton_st import kernels

        if not hasattr(kernels, operator):
            pytest.skip(f"no Triton kernel for {operator}")
        if dtype == torch.bfloat16 and device.type == "cpu":
            pytest.skip("Triton's interpreter has no trustworthy bfloat16")
    with backend.use(name):
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block on `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
