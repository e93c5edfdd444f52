"""What the encoder's operators ask of the arguments that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_st.ops._library import DTYPES, require_device, require_dims


def check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> None:
    """`dropout_p` is a probability, and where it is not 0 there is a seed: int64, one element, on `device`."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be a probability, 0 to 1, got {dropout_p}")
    if seed is None:
        if dropout_p > 0:
            raise ValueError(f"seed must be given where dropout_p is not 0, got None with dropout_p {dropout_p}")
        return
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be a tensor, got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be int64, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must have one element, got shape {list(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed must be on the device of the activations, {device}, got {seed.device}")


def check_max_seqlen(max_seqlen: int) -> None:
    """`max_seqlen` is an int; that no sequence is longer is for those to check who may look at cu_seqlens."""
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")


def check_parameters(first_name: str, first: Tensor, size: int, **parameters: Tensor | None) -> None:
    """Every given parameter is a vector of `size`: float32, or float64 where `first` is."""
    dtype = torch.promote_types(first.dtype, torch.float32)
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(parameter).__name__}")
        if parameter.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} with {first_name} in {first.dtype}, got {parameter.dtype}")
        if parameter.dim() != 1 or parameter.shape[0] != size:
            raise ValueError(f"{name} must be [{size}], got shape {list(parameter.shape)}")
        require_device(first_name, first, **{name: parameter})


def check_eps(eps: float) -> None:
    """`eps` is not negative (NaN is refused too)."""
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def check_sum(x: Tensor, residual: Tensor) -> None:
    """x and residual are [T, D], residual in x's dtype or, where x is float32, in any narrower one."""
    for name, tensor in (("x", x), ("residual", residual)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}, {tensor.layout}"
            )
        require_dims(tensor, name, "[T, D]")
    if residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)} as x, got shape {list(residual.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"x must have rows of at least one element, got shape {list(x.shape)}")
    if x.dtype not in (residual.dtype, torch.promote_types(residual.dtype, torch.float32)):
        raise TypeError(f"x must have residual's dtype {residual.dtype} or float32, got {x.dtype}")
    require_device("x", x, residual=residual)
