"""Registers operators in the namespace `triton_st`: schema, checks, fake kernel, and one dispatch to the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triton_st import backend

LIBRARY = torch.library.Library("triton_st", "DEF")

_implementations: dict[str, Callable[..., Any]] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}


def call(name: str, *args: Any, checked: bool = False) -> Any:
    """Operator `name` on `args`, past the dispatcher where that only costs time.

    `checked` says that the arguments need no second look: a gradient's are those of the forward pass.

    The dispatcher's way through rules written in Python takes 50 µs forward and backward, which is most of the time of
    a small batch. It is needed where someone listens in (torch.compile, functorch, fake or other special tensors).
    """
    if observed():
        return getattr(torch.ops.triton_st, name)(*args)
    wants_grad = False
    for x in args:
        if type(x) in _TENSORS:
            wants_grad = wants_grad or x.requires_grad
        elif type(x) not in _PLAIN:
            return getattr(torch.ops.triton_st, name)(*args)
    if wants_grad and torch.is_grad_enabled():
        function = _functions.get(name)
        return function.apply(*args) if function else getattr(torch.ops.triton_st, name)(*args)
    return backend.kernel(name, args[0])(*args) if checked else _implementations[name](*args)


_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN = (int, float, bool, type(None), torch.dtype)


# Private to torch: a release that lacks one of them gets the dispatcher always.
_dispatch_modes, _function_modes, _transforms = (
    getattr(torch._C, name, lambda: True)
    for name in ("_len_torch_dispatch_stack", "_len_torch_function_stack", "_are_functorch_transforms_active")
)


def observed() -> bool:
    """Whether someone listens to what the dispatcher is asked for."""
    return bool(torch.compiler.is_compiling() or _dispatch_modes() or _function_modes() or _transforms())


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    check_values: Callable[..., object] | None = None,
    compute: Callable[..., Any] | None = None,
    kernel_checks: bool = False,
) -> Callable[..., Any]:
    """Register one operator, and return what computes it once its arguments are checked.

    Args:
        schema: e.g. `packed_mean_pool(Tensor hidden, Tensor cu_seqlens) -> Tensor`.
        check: raises on wrong shapes, dtypes or devices; reads no values, so it also runs on fake tensors.
        fake: the results' shapes and dtypes, for tracing.
        check_values: raises on wrong values; runs on CPU tensors only, where it costs no synchronisation.
        compute: what computes it, for an operator made of other operators; else the backend's function of its name.
        kernel_checks: the C++ kernel itself refuses all that the checks refuse, which then only run to say why: checks
            in Python take microseconds, and tens of them where a large batch has just gone through the caches.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def check_all(*args: Any) -> None:
        check(*args)
        if check_values is not None and args[0].device.type == "cpu":
            check_values(*args)

    def implementation(*args: Any) -> Any:
        first: Tensor = args[0]
        if kernel_checks and isinstance(first, Tensor) and first.dtype in backend.KERNEL_DTYPES:
            try:
                if backend.select(first) == "cpp":
                    return backend.kernel(name, first)(*args)
            except (RuntimeError, TypeError):
                check_all(*args)
                raise
        check_all(*args)
        return (compute or backend.kernel(name, first))(*args)

    _implementations[name] = implementation

    def checked_fake(*args: Any) -> Any:
        check(*args)
        return fake(*args)

    # One kernel for all devices: a key holds one kernel, and which backend runs is a matter of the tensor, not the key.
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"triton_st::{name}", checked_fake, lib=LIBRARY)
    return implementation


def differentiable(name: str, backward: Callable[..., Any], setup_context: Callable[..., None], *, by: str) -> None:
    """Give operator `name` its gradient, which `backward` computes with operator `by`; there is no second derivative.

    Without a rule of its own, autograd would take `by` for a constant: a gradient penalty would train on zeros.
    """

    def refuse(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"triton_st::{name} has no second derivative; triton_st.reference has all of them")

    implementation, rule = _implementations[name], staticmethod(backward)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:  # with a setup_context of its own, apply() inspects signatures
            result = implementation(*args)
            setup_context(ctx, args, result)
            return result

        backward = rule

    _functions[name] = Function

    torch.library.register_autograd(f"triton_st::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"triton_st::{by}", refuse, lib=LIBRARY)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require_floating(**tensors: Tensor) -> None:
    """All named tensors are dense, of one dtype among `DTYPES`, on one device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name} must be a floating-point tensor of 16, 32 or 64 bits, got {first.dtype}")
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
