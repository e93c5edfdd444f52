"""DistilBERT under transformers' parameter names: BERT's layers, no token types, no pooler.

Nothing of attention's result is dropped, unlike BERT's.

Reference: Sanh et al., "DistilBERT", https://arxiv.org/abs/1910.01108.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from torch import nn
from transformers import DistilBertConfig, PretrainedConfig

from triton_st.models.architecture import Architecture
from triton_st.models.encoder import EncoderLayer, LayerWeights, PackedEncoder, weights_of


class DistilBertSelfAttention(nn.Module):
    """Query, key, value and output projections."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        hidden = architecture.hidden_size
        self.q_lin = nn.Linear(hidden, hidden)
        self.k_lin = nn.Linear(hidden, hidden)
        self.v_lin = nn.Linear(hidden, hidden)
        self.out_lin = nn.Linear(hidden, hidden)


class DistilBertFeedForward(nn.Module):
    """The feed-forward block's dense layers."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.lin1 = nn.Linear(architecture.hidden_size, architecture.intermediate_size)
        self.lin2 = nn.Linear(architecture.intermediate_size, architecture.hidden_size)


class DistilBertLayer(EncoderLayer):
    """One layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.attention = DistilBertSelfAttention(architecture)
        self.sa_layer_norm = nn.LayerNorm(architecture.hidden_size, eps=architecture.eps)
        self.ffn = DistilBertFeedForward(architecture)
        self.output_layer_norm = nn.LayerNorm(architecture.hidden_size, eps=architecture.eps)

    def weights(self) -> LayerWeights:
        """As `EncoderLayer`."""
        attention = self.attention
        return weights_of(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            self.sa_layer_norm,
            self.ffn.lin1,
            self.ffn.lin2,
            self.output_layer_norm,
        )


class DistilBertTransformer(nn.Module):
    """The stack of layers."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.layer = nn.ModuleList(DistilBertLayer(architecture) for _ in range(architecture.layers))


class DistilBertModel(PackedEncoder):
    """A DistilBERT encoder over packed batches, with the parameter names of transformers' `DistilBertModel`.

    Args:
        config: transformers' DistilBertConfig; see `PackedEncoder`.
    """

    config_class: ClassVar[type[PretrainedConfig]] = DistilBertConfig
    FIELDS: ClassVar[dict[str, str | None]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "hidden_act": "activation",
        "layer_norm_eps": None,
        "type_vocab_size": None,
        "projection_dropout_prob": None,
    }

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.transformer = DistilBertTransformer(self.architecture)
        self.initialise()

    def layers(self) -> Sequence[EncoderLayer]:
        """As `PackedEncoder`."""
        return cast("Sequence[EncoderLayer]", self.transformer.layer)
