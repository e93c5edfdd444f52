"""Registers operators in the namespace `triton_st`: schema, checks, fake kernel, and one dispatch to the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_st import backend

LIBRARY = torch.library.Library("triton_st", "DEF")


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    check_values: Callable[..., None] | None = None,
) -> None:
    """Register one operator.

    Args:
        schema: e.g. `packed_mean_pool(Tensor hidden, Tensor cu_seqlens) -> Tensor`.
        check: raises on wrong shapes, dtypes or devices; reads no values, so it also runs on fake tensors.
        fake: the results' shapes and dtypes, for tracing.
        check_values: raises on wrong values; runs on CPU tensors only, where it costs no synchronisation.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def implementation(*args: Any) -> Any:
        check(*args)
        first: Tensor = args[0]
        if check_values is not None and first.device.type == "cpu":
            check_values(*args)
        return backend.kernel(name, first)(*args)

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    # One kernel for all devices: a key holds one kernel, and which backend runs is a matter of the tensor, not the key.
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triton_st::{name}", checked_fake, lib=LIBRARY)


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give operator `name` its gradient."""
    torch.library.register_autograd(f"triton_st::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def require_floating(**tensors: Tensor) -> None:
    """All named tensors hold floating-point numbers of one dtype on one device."""
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise TypeError(f"{first_name} must be a floating-point tensor, got {first.dtype}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have {first_name}'s dtype {first.dtype}, got {tensor.dtype}")
        require_device(first_name, first, **{name: tensor})


def require_device(first_name: str, first: Tensor, **tensors: Tensor) -> None:
    """All named tensors lie on the device of `first`."""
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on {first_name}'s device {first.device}, got {tensor.device}")


def require_dims(tensor: Tensor, name: str, layout: str) -> None:
    """`tensor` has as many dimensions as `layout`, e.g. "[B, D]", names."""
    if tensor.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got shape {list(tensor.shape)}")
