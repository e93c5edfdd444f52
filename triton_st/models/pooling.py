"""What follows the encoder: pooling of token states into embeddings, then dense layers and normalisation.

The modules are sentence-transformers' own, by name, setting and parameter, over packed batches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_st import ops
from triton_st.reference.normalize import widen
from triton_st.util import normalize_embeddings

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class Pooling(nn.Module):
    """Token states to one embedding for each sequence; several modes are concatenated.

    Args:
        pooling_mode: one of `POOLING_MODES`, or several.
        include_prompt: whether a prompt's tokens take part; False is what INSTRUCTOR models want.

    Raises:
        ValueError: an unknown mode, or none.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/modules.html#pooling.
    """

    def __init__(self, pooling_mode: str | Sequence[str] = "mean", include_prompt: bool = True) -> None:
        super().__init__()
        self.modes = (pooling_mode,) if isinstance(pooling_mode, str) else tuple(pooling_mode)
        if not self.modes or not set(self.modes) <= set(POOLING_MODES):
            raise ValueError(f"pooling_mode: expected one or more of {', '.join(POOLING_MODES)}, got {pooling_mode!r}")
        self.include_prompt = include_prompt

    def is_mean_of_all(self, prompt_length: int = 0) -> bool:
        """Whether the embedding is the mean of all tokens, so that the encoder can pool by itself."""
        return self.modes == ("mean",) and (self.include_prompt or prompt_length == 0)

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, prompt_length: int = 0) -> Tensor:
        """hidden [T, D], cu_seqlens [B + 1] -> [B, modes · D] in hidden's dtype; sums run in float32.

        With `include_prompt=False`, the first `prompt_length` tokens of every sequence are left out. A sequence of
        which nothing is left has the mean 0 and, as in sentence-transformers, the maximum −inf.
        """
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        first = torch.zeros_like(starts)
        if prompt_length and not self.include_prompt:
            first = torch.minimum(first + prompt_length, ends - starts)
        pooled = [self._pool(mode, hidden, cu_seqlens, starts, ends, first) for mode in self.modes]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)

    def _pool(
        self, mode: str, hidden: Tensor, cu_seqlens: Tensor, starts: Tensor, ends: Tensor, first: Tensor
    ) -> Tensor:
        if mode == "cls":
            return _rows(hidden, torch.where(starts + first < ends, starts + first, starts), starts < ends)
        if mode == "lasttoken":
            return _rows(hidden, ends - 1, starts < ends)
        offsets = cu_seqlens
        positions = None
        if mode == "weightedmean":
            positions = torch.arange(1, len(hidden) + 1, device=hidden.device) - starts.repeat_interleave(ends - starts)
        if not self.include_prompt:
            lengths = ends - starts
            kept = torch.arange(len(hidden), device=hidden.device) >= (starts + first).repeat_interleave(lengths)
            hidden = hidden[kept]
            positions = None if positions is None else positions[kept]
            offsets = F.pad((lengths - first).cumsum(0), (1, 0)).to(cu_seqlens.dtype)
        if mode == "mean":
            return ops.packed_mean_pool(hidden, offsets)
        counts = offsets.diff().unsqueeze(1)
        if mode == "mean_sqrt_len_tokens":
            mean = ops.packed_mean_pool(widen(hidden), offsets)
            return (mean * counts.sqrt()).to(hidden.dtype)
        if mode == "max":
            if len(hidden) == 0:
                return hidden.new_full((len(counts), hidden.shape[1]), float("-inf"))
            return torch.segment_reduce(hidden, "max", lengths=counts.squeeze(1).long(), unsafe=True)
        assert positions is not None
        weights = positions.to(torch.promote_types(hidden.dtype, torch.float32)).unsqueeze(1)
        weighted = ops.packed_mean_pool(widen(hidden) * weights, offsets)
        mean_weight = ops.packed_mean_pool(weights.contiguous(), offsets)
        return (weighted / mean_weight.clamp_min(1e-9)).to(hidden.dtype)

    def output_dimension(self, dimension: int) -> int:
        """Dimension of what comes out of token states of `dimension`."""
        return len(self.modes) * dimension

    def extra_repr(self) -> str:
        """The settings, for `print(model)` and the model card."""
        modes = repr(self.modes[0]) if len(self.modes) == 1 else repr(self.modes)
        return f"pooling_mode={modes}" + ("" if self.include_prompt else ", include_prompt=False")


def _rows(hidden: Tensor, index: Tensor, exists: Tensor) -> Tensor:
    """hidden[index], and 0 for a sequence without tokens."""
    if len(hidden) == 0:
        return hidden.new_zeros(len(index), hidden.shape[1])
    return hidden[index.clamp_min(0)].masked_fill(~exists.unsqueeze(1), 0)


class Dense(nn.Module):
    """activation(x W^T + b), with x added if `use_residual`; in at least float32.

    Args:
        in_features: dimension of what comes in. out_features: of what goes out.
        bias: whether there is a b.
        activation_function: the full name of a class in `torch.nn`; Tanh by default.
        use_residual: add the input, through a matrix of its own where the dimensions differ.

    Raises:
        ValueError: the activation is no module of torch.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/modules.html#dense.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation_function: str = "torch.nn.modules.activation.Tanh",
        use_residual: bool = False,
    ) -> None:
        super().__init__()
        self.activation_function = _activation(activation_function)
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.use_residual = use_residual
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] -> [B, out_features] in x's dtype."""
        wide = x.to(self.linear.weight.dtype)
        out = self.activation_function(self.linear(wide))
        if self.use_residual:
            out = out + (self.residual(wide) if hasattr(self, "residual") else wide)
        return out.to(x.dtype)

    def row_by_row(self, x: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """As `forward` in float32, with the bits that each row has alone.

        Args:
            x: [B, in_features].
            product: from x, weight and bias to x W^T + b, every row's bits its own.
        """
        out = product(x, self.linear.weight.detach(), None if self.linear.bias is None else self.linear.bias.detach())
        if isinstance(self.activation_function, (nn.Identity, nn.Tanh)):
            out = self.activation_function(out)
        else:  # torch may compute the last elements of a piece of memory in another way than those before them
            for i in range(len(out)):
                out[i : i + 1] = self.activation_function(out[i : i + 1])
        if self.use_residual:
            out = out + (product(x, self.residual.weight.detach(), None) if hasattr(self, "residual") else x)
        return out

    def config(self) -> dict[str, Any]:
        """The settings, as the module's config.json holds them."""
        activation = type(self.activation_function)
        settings = {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        return settings | ({"use_residual": True} if self.use_residual else {})

    def output_dimension(self, dimension: int) -> int:
        """Dimension of what comes out."""
        return self.linear.out_features


def _activation(name: str) -> nn.Module:
    module, _, attribute = name.rpartition(".")
    if module == "torch.nn" or module.startswith("torch.nn.modules."):
        found = getattr(importlib.import_module(module), attribute, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found()
    raise ValueError(f"activation_function: expected the full name of a module in torch.nn, got {name!r}")


class Normalize(nn.Module):
    """Embeddings of length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]; a zero row stays zero."""
        return normalize_embeddings(x)

    def output_dimension(self, dimension: int) -> int:
        """Dimension of what comes out: that of what came in."""
        return dimension
