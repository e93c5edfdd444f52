"""The one tolerance rule that every kernel is held to.

The error against the float64 reference may be at most twice the error of the reference run at the tensor's own dtype
(widened to float32, cast once at the end), plus a floor of 4·eps(dtype)·max|reference|. Where one of the two is
non-finite and the other is not, the check fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_within_tolerance(actual: Tensor, exact: Tensor, at_dtype: Tensor, what: str, magnitude: float = 0.0) -> None:
    """`actual` is what is tested, `exact` the float64 reference, `at_dtype` the reference at actual's dtype.

    `magnitude` replaces max|reference| in the floor where it is larger: for a lone number that is the small difference
    of large ones, where the error of the reference is a matter of luck.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == at_dtype.dtype, f"{what}: dtype {actual.dtype}, expected {at_dtype.dtype}"
    if actual.numel() == 0:
        return
    actual, exact, plain = (t.detach().cpu().double() for t in (actual, exact, at_dtype))
    # A finite float64 value may overflow when it is stored in half: the reference at that dtype says what is expected.
    finite = plain.isfinite()
    assert torch.equal(actual.isfinite(), finite), (
        f"{what}: {int((actual.isfinite() != finite).sum())} of {actual.numel()} entries are finite where the "
        f"reference is not, or the other way round; first actual {actual[actual.isfinite() != finite][0]}"
    )
    if not finite.any():
        return
    error = (actual - exact)[finite].abs().max().item()
    allowed = 2 * (plain - exact)[finite].abs().max().item()
    allowed += 4 * torch.finfo(at_dtype.dtype).eps * max(magnitude, exact[finite].abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3e} against float64 exceeds {allowed:.3e}"


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[object], grad_output: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Result of `function(*inputs)` and the gradient of each floating-point tensor among the inputs."""
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]
    result = function(*leaves)
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    seed = torch.ones_like(result) if grad_output is None else grad_output.to(result.dtype)
    return result.detach(), list(torch.autograd.grad(result, wanted, seed))


def assert_matches_reference(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[object],
    *,
    seed: int = 0,
    grad_scale: float = 1.0,
    magnitude: float = 0.0,
) -> None:
    """Value and every gradient of `function` obey the rule against `reference`, for a random gradient of the result.

    `magnitude` is that of `assert_within_tolerance`, for the value.
    """
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    shape = reference(*inputs).shape
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * grad_scale
    first = next(x for x in inputs if isinstance(x, Tensor))
    grad_output = grad_output.to(function(*inputs).dtype).to(first.device)
    actual, actual_grads = value_and_gradients(function, inputs, grad_output)
    exact, exact_grads = value_and_gradients(reference, wide, grad_output)
    plain, plain_grads = value_and_gradients(reference, inputs, grad_output)
    assert_within_tolerance(actual, exact, plain, "result", magnitude)
    for i, grads in enumerate(zip(actual_grads, exact_grads, plain_grads, strict=True)):
        assert_within_tolerance(*grads, f"gradient of input {i}")
