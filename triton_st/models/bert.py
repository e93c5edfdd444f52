"""BERT as an encoder of packed batches: transformers' parameters and numbers, no padding.

Reference: Devlin et al., "BERT", https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig

from triton_st.models.attention import AttentionPlan, packed_attention
from triton_st.models.functional import dropout, dropout_add_layer_norm, feed_forward, linear, store, widen
from triton_st.models.packing import check_packed

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class BertEmbeddings(nn.Module):
    """Word, position and token-type embeddings, summed, normalised and dropped out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, hidden, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, positions: Tensor, token_type_ids: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """input_ids, positions, token_type_ids [T] -> [T, D] in `dtype`; summed and normalised in float32."""
        embedded = self.word_embeddings(input_ids) + self.position_embeddings(positions)
        if token_type_ids is None:
            embedded = embedded + self.token_type_embeddings.weight[0]
        else:
            embedded = embedded + self.token_type_embeddings(token_type_ids)
        hidden = self.LayerNorm(widen(embedded))
        return store(dropout(hidden, self.dropout_p if self.training else 0.0), dtype)


class BertSelfAttention(nn.Module):
    """Query, key and value projections; one product over the three weights, then packed attention."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        """hidden [T, D] -> attended values [T, D]."""
        weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
        bias = torch.cat([self.query.bias, self.key.bias, self.value.bias])
        qkv = linear(hidden, weight, bias).view(hidden.shape[0], 3, self.heads, self.head_size)
        return packed_attention(qkv, plan, self.dropout_p if self.training else 0.0)


class BertOutput(nn.Module):
    """A dense layer's parameters and the LayerNorm after its residual: BERT's `output` blocks."""

    def __init__(self, config: BertConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def add_norm(self, x: Tensor, residual: Tensor) -> Tensor:
        """LayerNorm(dropout(x) + residual), [T, D]."""
        norm = self.LayerNorm
        dropout_p = self.dropout_p if self.training else 0.0
        return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p)


class BertAttention(nn.Module):
    """Self-attention with its output projection, residual and LayerNorm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        """Hidden [T, D] -> [T, D]."""
        dense = self.output.dense
        attended = linear(self.self(hidden, plan), dense.weight, dense.bias, _sum_dtype(hidden))
        return self.output.add_norm(attended, hidden)


class BertIntermediate(nn.Module):
    """The feed-forward block's first dense layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    """One post-LayerNorm transformer layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, hidden: Tensor, plan: AttentionPlan) -> Tensor:
        """Hidden [T, D] -> [T, D]."""
        hidden = self.attention(hidden, plan)
        up, down = self.intermediate.dense, self.output.dense
        fed = feed_forward(hidden, up.weight, up.bias, down.weight, down.bias, _sum_dtype(hidden))
        return self.output.add_norm(fed, hidden)


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """The next-sentence head's dense layer: never computed here, kept so that a checkpoint is written back whole."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)


class BertModel(nn.Module):
    """A BERT encoder over packed batches, with the parameter names of transformers' `BertModel`.

    Args:
        config: transformers' BertConfig. Served: `hidden_act="gelu"` (erf), absolute positions, no decoder.
        add_pooling_layer: hold the parameters of transformers' pooler (its `BertModel` does by default).

    Attributes:
        activation_dtype: dtype in which activations are stored (float32 by default, float16, bfloat16; float64 for a
            float64 model). Parameters stay as they are, float32 normally; sums, LayerNorm and softmax run in float32.

    Raises:
        ValueError: the config asks for what is not served.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        _check_config(config)
        self.config = config
        self.activation_dtype = torch.float32
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """transformers' initial values: normal weights, zero biases, a zero row for the padding token."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def forward(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Encode a packed batch.

        Args:
            input_ids: [T], int64.
            cu_seqlens: [B + 1], int32: 0, then the running total of sequence lengths, ending at T.
            max_seqlen: at least the longest sequence's length.
            token_type_ids: [T], int64; all 0 by default.

        Returns:
            Last hidden states [T, D] in `activation_dtype`.

        Raises:
            TypeError, ValueError: the batch is not packed as above, a sequence is longer than the position table, or
                (CPU) an id is outside the vocabulary.
        """
        plan, positions = self._prepare(input_ids, cu_seqlens, max_seqlen, token_type_ids)
        hidden = self.embeddings(input_ids, positions, token_type_ids, self.activation_dtype)
        for layer in self.encoder.layer:
            hidden = layer(hidden, plan)
        return hidden

    @torch.compiler.disable
    def _prepare(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int, token_type_ids: Tensor | None
    ) -> tuple[AttentionPlan, Tensor]:
        """Check the batch, and plan what depends on its lengths alone: attention, and positions [T]."""
        if self.activation_dtype not in ACTIVATION_DTYPES:
            raise ValueError(f"activation_dtype: expected one of {ACTIVATION_DTYPES}, got {self.activation_dtype}")
        parameters = self.embeddings.word_embeddings.weight.dtype
        if parameters != torch.promote_types(self.activation_dtype, torch.float32):
            raise TypeError(
                f"parameters: expected float32 (float64 with activation_dtype float64), got {parameters} with "
                f"activation_dtype {self.activation_dtype}; half precision is chosen by activation_dtype alone"
            )
        lengths = check_packed(input_ids, cu_seqlens, max_seqlen)
        longest = max(lengths, default=0)
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"cu_seqlens: expected sequences of at most {self.config.max_position_embeddings} tokens "
                f"(max_position_embeddings), got one of {longest}"
            )
        _check_ids("input_ids", input_ids, self.config.vocab_size, "vocab_size")
        if token_type_ids is not None:
            if token_type_ids.shape != input_ids.shape:
                raise ValueError(
                    f"token_type_ids: expected shape {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}"
                )
            _check_ids("token_type_ids", token_type_ids, self.config.type_vocab_size, "type_vocab_size")
        device = input_ids.device
        starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=input_ids.numel())
        positions = torch.arange(input_ids.numel(), device=device) - starts
        return AttentionPlan.build(lengths, device), positions


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of what is about to be added to the residual: never half, so that the sum cannot overflow."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _check_ids(name: str, ids: Tensor, size: int, limit_name: str) -> None:
    if ids.device.type != "cpu" or ids.numel() == 0:  # elsewhere a check would wait for the device
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: expected ids from 0 to {size - 1} ({limit_name} {size}), got {wrong}")


def _check_config(config: BertConfig) -> None:
    least = {"num_hidden_layers": 0, "hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1}
    least |= {"vocab_size": 1, "max_position_embeddings": 1, "type_vocab_size": 1}
    for name, smallest in least.items():
        if getattr(config, name) < smallest:
            raise ValueError(f"config.{name}: expected at least {smallest}, got {getattr(config, name)}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"config.{name}: expected a probability, 0 to 1, got {getattr(config, name)}")
    if config.hidden_act != "gelu":
        raise ValueError(f"config.hidden_act: expected 'gelu' (erf), the one that is served, got {config.hidden_act!r}")
    position_type = getattr(config, "position_embedding_type", "absolute")
    if position_type != "absolute":
        raise ValueError(f"config.position_embedding_type: expected 'absolute', got {position_type!r}")
    if getattr(config, "is_decoder", False):
        raise ValueError("config.is_decoder: expected False, an encoder, got True")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config.hidden_size: expected a multiple of num_attention_heads = {config.num_attention_heads}, "
            f"got {config.hidden_size}"
        )
