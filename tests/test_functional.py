"""How parameters are handed to operators: joined without a copy, and with a row that is not trained."""

from __future__ import annotations

import pytest
import torch

from triton_st.models.functional import fixed_row, joined


def test_fixed_row_gets_no_gradient():
    table = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([1, 2, 2])
    (gradient,) = torch.autograd.grad(fixed_row(table, 2, ids).sum(), table)
    assert torch.equal(gradient, torch.ones(5, 3).index_fill(0, torch.tensor(2), 0))
    assert fixed_row(table, None, ids) is table
    assert fixed_row(table, 3, ids) is table  # never looked up


def test_joined_parameters_lie_side_by_side():
    """Once laid out, parameters are joined without a copy, through an optimizer's steps and until they are moved."""
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(n, 40)) for n in (300, 300, 300)]
    values = torch.cat([part.detach().clone() for part in parts])
    with torch.inference_mode():
        assert torch.equal(joined(*parts), values)
    assert all(not part.is_inference() for part in parts)
    first = joined(*parts)
    assert first.data_ptr() == parts[0].data_ptr() == joined(*parts).data_ptr()
    weight = torch.randn(900, 40)
    (first * weight).sum().backward()
    assert torch.equal(torch.cat([part.grad for part in parts]), weight)
    torch.optim.SGD(parts, lr=0.5).step()
    torch.testing.assert_close(joined(*parts), values - 0.5 * weight, rtol=0, atol=0)
    assert joined(*parts).data_ptr() == parts[0].data_ptr()
    parts[1].data = parts[1].data.clone()
    torch.testing.assert_close(joined(*parts), values - 0.5 * weight, rtol=0, atol=0)
    assert joined(*parts).data_ptr() == parts[0].data_ptr()


def test_a_second_derivative_is_an_error_and_not_zero():
    x = torch.randn(5, 6, requires_grad=True)
    large = torch.randn(300, 128, requires_grad=True)
    functions = [(lambda x: fixed_row(x, 1, torch.tensor([1])), x), (lambda x: joined(x, x.detach()), large)]
    for function, x in functions:
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
