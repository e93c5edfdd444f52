"""BERT and RoBERTa under transformers' parameter names.

RoBERTa (and XLM-R, which is RoBERTa with another vocabulary) differs by one thing: positions count from
`pad_token_id + 1`.

Reference: Devlin et al., "BERT", https://arxiv.org/abs/1810.04805; Liu et al., "RoBERTa",
https://arxiv.org/abs/1907.11692; Conneau et al., "XLM-R", https://arxiv.org/abs/1911.02116.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import nn
from transformers import BertConfig, PretrainedConfig, RobertaConfig, XLMRobertaConfig

from triton_st.models.architecture import Architecture
from triton_st.models.encoder import EncoderLayer, LayerWeights, PackedEncoder, Pooler, weights_of


class BertSelfAttention(nn.Module):
    """Query, key and value projections."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        hidden = architecture.hidden_size
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)


class BertOutput(nn.Module):
    """A dense layer and the LayerNorm after its residual: BERT's `output` blocks."""

    def __init__(self, architecture: Architecture, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, architecture.hidden_size)
        self.LayerNorm = nn.LayerNorm(architecture.hidden_size, eps=architecture.eps)


class BertAttention(nn.Module):
    """Self-attention and its output block."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.self = BertSelfAttention(architecture)
        self.output = BertOutput(architecture, architecture.hidden_size)


class BertIntermediate(nn.Module):
    """The feed-forward block's first dense layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.dense = nn.Linear(architecture.hidden_size, architecture.intermediate_size)


class BertLayer(EncoderLayer):
    """One layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.attention = BertAttention(architecture)
        self.intermediate = BertIntermediate(architecture)
        self.output = BertOutput(architecture, architecture.intermediate_size)

    def weights(self) -> LayerWeights:
        """As `EncoderLayer`."""
        projections, attention_output = self.attention.self, self.attention.output
        return weights_of(
            projections.query,
            projections.key,
            projections.value,
            attention_output.dense,
            attention_output.LayerNorm,
            self.intermediate.dense,
            self.output.dense,
            self.output.LayerNorm,
        )


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(architecture) for _ in range(architecture.layers))


class BertModel(PackedEncoder):
    """A BERT encoder over packed batches, with the parameter names of transformers' `BertModel`.

    Args:
        config: transformers' BertConfig; see `PackedEncoder`.
        add_pooling_layer: hold the parameters of transformers' pooler (its `BertModel` does by default).
    """

    config_class: ClassVar[type[PretrainedConfig]] = BertConfig

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True, position_offset: int = 0) -> None:
        super().__init__(config, position_offset)
        self.encoder = BertEncoder(self.architecture)
        self.pooler = Pooler(self.architecture.hidden_size) if add_pooling_layer else None
        self.initialise()

    def layers(self) -> Sequence[EncoderLayer]:
        """As `PackedEncoder`."""
        return cast("Sequence[EncoderLayer]", self.encoder.layer)


class RobertaModel(BertModel):
    """RoBERTa, with the parameter names of transformers' `RobertaModel`; arguments as `BertModel`."""

    config_class: ClassVar[type[PretrainedConfig]] = RobertaConfig

    def __init__(self, config: PretrainedConfig, add_pooling_layer: bool = True) -> None:
        padding = config.pad_token_id
        if padding is None or padding < 0:
            raise ValueError(f"config.pad_token_id: expected an id, which positions count from, got {padding}")
        super().__init__(config, add_pooling_layer, position_offset=padding + 1)


class XLMRobertaModel(RobertaModel):
    """XLM-R, with the parameter names of transformers' `XLMRobertaModel`; arguments as `BertModel`."""

    config_class: ClassVar[type[PretrainedConfig]] = XLMRobertaConfig
