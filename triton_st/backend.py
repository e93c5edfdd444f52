"""Which implementation of an operator serves a tensor: Triton, C++ or the plain PyTorch reference.

CUDA and ROCm tensors go to Triton, CPU tensors to the compiled C++ of `csrc/`, and all else (another device, float64,
no compiler) to `triton_st.reference`. `TRITON_ST_BACKEND=triton|cpp|reference` or `use(...)` forces one: what it
cannot serve is then an error, never a silent fallback. `TRITON_ST_DISABLE=1` forces the reference above all.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from triton_st import extension, reference

BACKENDS = ("triton", "cpp", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for by name cannot run here, or cannot serve this tensor."""


def _named(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


DISABLED = os.environ.get("TRITON_ST_DISABLE") == "1"
"""The kill switch: everything then runs in plain PyTorch, whatever else is asked for."""

_forced = "reference" if DISABLED else _named(os.environ.get("TRITON_ST_BACKEND") or None, "TRITON_ST_BACKEND")


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Serve every operator by the backend `name` inside the block; None goes back to choosing by tensor.

    The setting is the process's, not the thread's: autograd runs backward passes on threads of its own.
    """
    global _forced
    previous, _forced = _forced, _named(name, "name")
    try:
        yield
    finally:
        _forced = previous


def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot serve tensors on `device`; None if it can."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if device.type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton takes CPU tensors only under its interpreter (set TRITON_INTERPRET=1 before importing triton_st)"
    if device.type not in ("cpu", "cuda"):
        return f"no Triton kernels for device type {device.type!r}"
    return None


def cpp_problem(device: torch.device) -> str | None:
    """Why the C++ kernels cannot serve tensors on `device`; None if they can (compiles them at the first call)."""
    return extension.problem() if device.type == "cpu" else f"the C++ kernels serve CPU tensors, not {device.type!r}"


def _problem(name: str, tensor: torch.Tensor) -> str | None:
    if name == "reference":
        return None
    if tensor.dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    return triton_problem(tensor.device) if name == "triton" else cpp_problem(tensor.device)


def select(tensor: torch.Tensor) -> str:
    """Name of the backend that serves `tensor`.

    Raises:
        BackendUnavailableError: a backend was forced that cannot serve it.
    """
    if _forced is not None:
        if problem := _problem(_forced, tensor):
            raise BackendUnavailableError(f"backend {_forced!r} was asked for, but {problem}")
        return _forced
    if tensor.dtype not in KERNEL_DTYPES:
        return "reference"
    if tensor.is_cpu:
        return "cpp" if extension.available() else "reference"
    return "triton" if triton_problem(tensor.device) is None else "reference"


@functools.cache
def _compiled(name: str) -> Callable[..., Any]:
    """The C++ operator `name`: its only overload, which need not be looked for among several at every call."""
    operator: Callable[..., Any] = getattr(torch.ops.triton_st_cpp, name).default
    return operator


def kernel(name: str, tensor: torch.Tensor) -> Callable[..., Any]:
    """The function that computes operator `name` for `tensor`: one name, one signature, in all three backends."""
    selected = select(tensor)
    if selected == "cpp":
        return _compiled(name)
    if selected == "triton":
        from triton_st import kernels

        return getattr(kernels, name)
    return getattr(reference, name)
