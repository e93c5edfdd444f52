"""MPNet under transformers' parameter names: BERT's layers with a bias by relative position, and no token types.

Reference: Song et al., "MPNet", https://arxiv.org/abs/2004.09297; the bias is that of Raffel et al., "T5",
https://arxiv.org/abs/1910.10683, one table for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import MPNetConfig, PretrainedConfig

from triton_st.models.architecture import Architecture
from triton_st.models.bert import BertIntermediate, BertOutput
from triton_st.models.encoder import EncoderLayer, LayerWeights, PackedEncoder, Pooler, weights_of

_PADDING_ID = 1
"""transformers' MPNet has it whatever the config says; positions count from the next."""
_BUCKETS = 32
_MAX_DISTANCE = 128


class MPNetSelfAttention(nn.Module):
    """Query, key, value and output projections."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        hidden = architecture.hidden_size
        self.q = nn.Linear(hidden, hidden)
        self.k = nn.Linear(hidden, hidden)
        self.v = nn.Linear(hidden, hidden)
        self.o = nn.Linear(hidden, hidden)


class MPNetAttention(nn.Module):
    """Self-attention and the LayerNorm after its residual."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.attn = MPNetSelfAttention(architecture)
        self.LayerNorm = nn.LayerNorm(architecture.hidden_size, eps=architecture.eps)


class MPNetLayer(EncoderLayer):
    """One layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.attention = MPNetAttention(architecture)
        self.intermediate = BertIntermediate(architecture)
        self.output = BertOutput(architecture, architecture.intermediate_size)

    def weights(self) -> LayerWeights:
        """As `EncoderLayer`."""
        projections = self.attention.attn
        return weights_of(
            projections.q,
            projections.k,
            projections.v,
            projections.o,
            self.attention.LayerNorm,
            self.intermediate.dense,
            self.output.dense,
            self.output.LayerNorm,
        )


class MPNetEncoder(nn.Module):
    """The stack of layers and their one table of relative biases."""

    def __init__(self, architecture: Architecture, buckets: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(MPNetLayer(architecture) for _ in range(architecture.layers))
        self.relative_attention_bias = nn.Embedding(buckets, architecture.heads)


class MPNetModel(PackedEncoder):
    """An MPNet encoder over packed batches, with the parameter names of transformers' `MPNetModel`.

    Args:
        config: transformers' MPNetConfig; see `PackedEncoder`.
        add_pooling_layer: hold the parameters of transformers' pooler (its `MPNetModel` does by default).
    """

    config_class: ClassVar[type[PretrainedConfig]] = MPNetConfig
    FIELDS: ClassVar[dict[str, str | None]] = {"type_vocab_size": None}

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True) -> None:
        buckets = config.relative_attention_num_buckets
        if buckets < _BUCKETS:
            raise ValueError(f"config.relative_attention_num_buckets: expected at least {_BUCKETS}, got {buckets}")
        super().__init__(config, position_offset=_PADDING_ID + 1)
        self.encoder = MPNetEncoder(self.architecture, buckets)
        self.pooler = Pooler(self.architecture.hidden_size) if add_pooling_layer else None
        self.initialise()

    def layers(self) -> Sequence[EncoderLayer]:
        """As `PackedEncoder`."""
        return cast("Sequence[EncoderLayer]", self.encoder.layer)

    def relative_bias(self, reach: int) -> Tensor:
        """As `PackedEncoder`."""
        weight = self.encoder.relative_attention_bias.weight
        distances = torch.arange(1 - reach, reach, device=weight.device)
        return nn.functional.embedding(_bucket(distances), weight).t()


def _bucket(distance: Tensor) -> Tensor:
    """T5's buckets: half for each direction, of which half are single distances and half grow as the logarithm."""
    half = _BUCKETS // 2
    exact = half // 2
    steps = distance.abs()
    far = (steps.clamp(min=1).float() / exact).log() / math.log(_MAX_DISTANCE / exact) * (half - exact)
    far = (exact + far.long()).clamp(max=half - 1)
    return torch.where(steps < exact, steps, far) + half * (distance > 0)
