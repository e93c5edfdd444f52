"""What every served family shares: a padding-free encoder of post-LayerNorm layers.

A family (`bert`, `distilbert`, `mpnet`) is a thin module with the parameter names of transformers' own, so that
checkpoints load and save with no translation. It hands its parameters to the functions here, which know no names.

Reference: Vaswani et al., https://arxiv.org/abs/1706.03762; Devlin et al., "BERT", https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from triton_st import ops
from triton_st.models.architecture import Architecture
from triton_st.models.functional import fixed_row, joined
from triton_st.models.packing import check_packed, require_integers

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

STREAMS_PER_LAYER = 8
"""Streams of random numbers reserved for one layer: layer i counts from (i + 1) * 8, the embeddings have stream 0."""


class LayerWeights(NamedTuple):
    """Parameters of one layer: weights [out, in] and biases [out], float32 (float64 in a float64 model)."""

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    projection_weight: Tensor
    projection_bias: Tensor
    attention_norm_weight: Tensor
    attention_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    output_norm_weight: Tensor
    output_norm_bias: Tensor


_QKV = LayerWeights._fields.index("projection_weight")

_Module = TypeVar("_Module", nn.Linear, nn.LayerNorm, nn.Embedding)


def plain(module: nn.Module, kind: type[_Module]) -> _Module:
    """`module`, which must be a `kind` whose parameters say all that it does: they are all that is read of it.

    Raises:
        TypeError: it is something else, has a forward of its own or hooks (an adapter, for example), or no bias.
    """
    if torch.compiler.is_compiling():
        assert isinstance(module, kind)
        return module
    own = "forward" in module.__dict__ or getattr(type(module), "forward", None) is not kind.forward
    if not isinstance(module, kind) or own:
        what = f"a {type(module).__name__} with a forward of its own" if own else f"a {type(module).__name__}"
    elif module._forward_hooks or module._forward_pre_hooks:
        what = "one with forward hooks, which would not be called"
    elif getattr(module, "bias", module) is None:
        what = "one without a bias"
    else:
        return module
    raise TypeError(f"encoder: expected a torch.nn.{kind.__name__} with nothing about it, got {what}; merge adapters")


_KINDS = (*[nn.Linear] * 4, nn.LayerNorm, nn.Linear, nn.Linear, nn.LayerNorm)


def weights_of(*modules: nn.Linear | nn.LayerNorm) -> LayerWeights:
    """The parameters of a layer's modules: query, key, value, projection, LayerNorm, up, down, LayerNorm.

    Raises:
        TypeError: a module that `plain` refuses.
    """
    kept = [plain(module, kind) for module, kind in zip(modules, _KINDS, strict=True)]
    return LayerWeights(*(parameter for module in kept for parameter in (module.weight, module.bias)))


class EncoderLayer(nn.Module):
    """One layer's parameters under the names of its family."""

    def weights(self) -> LayerWeights:
        """The parameters in the one order that the computation knows."""
        raise NotImplementedError


@dataclass(frozen=True)
class PackedBatch:
    """What the layers know of a batch beside its hidden states."""

    cu_seqlens: Tensor  # [B + 1]
    max_seqlen: int
    relative_bias: Tensor | None = None  # [H, 2 P - 1], P >= max_seqlen, of a family that has one


def encoder_layer(
    hidden: Tensor,
    weights: LayerWeights,
    batch: PackedBatch,
    heads: int,
    eps: float,
    attention_dropout_p: float,
    projection_dropout_p: float,
    hidden_dropout_p: float,
    seed: Tensor | None,
    stream: int,
    pool: bool = False,
) -> Tensor:
    """One post-LayerNorm transformer layer over a packed batch.

    It is `ops.bert_layer`, which on CPU is one operator. Kept for backward are 7 D + I numbers a token in hidden's
    dtype: hidden, queries, keys and values, attention's result, both sums normalised, and the first feed-forward
    product, I wide, of which GELU is computed again; beside them a log-sum-exp a head and a number for each LayerNorm.
    Scores and dropout, which would grow with the length, are computed again. Gradient checkpointing keeps hidden alone,
    D numbers a token, for one more forward of the layer.

    Args:
        hidden: [T, D] in the activation dtype.
        weights: the layer's parameters.
        batch: the sequences.
        heads: attention heads H; D = H * d.
        eps: of both LayerNorms.
        attention_dropout_p, projection_dropout_p, hidden_dropout_p: probabilities of dropping an attention weight, an
            element of attention's result and one of the feed-forward block's; without effect if `seed` is None.
        seed: int64 scalar, or None for no dropout.
        stream: first of the layer's streams of random numbers: attention weights, then attention output (+ 1), then
            the feed-forward block's output (+ 2).
        pool: give the mean of each sequence instead of the hidden states.

    Returns:
        [T, D], with `pool` [B, D], in hidden's dtype.
    """
    if seed is None:
        attention_dropout_p = projection_dropout_p = hidden_dropout_p = 0.0
    w = weights
    qkv_weight = joined(w.query_weight, w.key_weight, w.value_weight)
    qkv_bias = joined(w.query_bias, w.key_bias, w.value_bias)
    return ops.bert_layer(
        hidden,
        batch.cu_seqlens,
        batch.max_seqlen,
        ops.BertLayerParameters(qkv_weight, qkv_bias, *w[_QKV:]),
        heads,
        eps,
        attention_dropout_p=attention_dropout_p,
        projection_dropout_p=projection_dropout_p,
        hidden_dropout_p=hidden_dropout_p,
        seed=seed,
        stream=stream,
        pool=pool,
        relative_bias=batch.relative_bias,
    )


class Embeddings(nn.Module):
    """Word, position and (where the family has them) token-type embeddings, summed, normalised and dropped out."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        self.word_embeddings = nn.Embedding(a.vocab_size, a.hidden_size, padding_idx=a.padding_id)
        padding_position = a.position_offset - 1 if a.position_offset else None
        self.position_embeddings = nn.Embedding(a.positions, a.hidden_size, padding_idx=padding_position)
        if a.token_types:
            self.token_type_embeddings = nn.Embedding(a.token_types, a.hidden_size)
        self.LayerNorm = nn.LayerNorm(a.hidden_size, eps=a.eps)
        self.architecture = architecture

    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Word, position and token-type embeddings, the last None for a family without.

        Raises:
            TypeError: a module that `plain` refuses.
        """
        types = plain(self.token_type_embeddings, nn.Embedding).weight if self.architecture.token_types else None
        word, position = self.word_embeddings, self.position_embeddings
        return plain(word, nn.Embedding).weight, plain(position, nn.Embedding).weight, types

    def norm(self) -> tuple[Tensor, Tensor]:
        """Gain and shift of the LayerNorm. Raises as `tables`."""
        norm = plain(self.LayerNorm, nn.LayerNorm)
        return norm.weight, norm.bias

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        token_type_ids: Tensor | None,
        dtype: torch.dtype,
        seed: Tensor | None,
    ) -> Tensor:
        """input_ids, token_type_ids [T], cu_seqlens [B + 1] -> [T, D] in `dtype`; summed, normalised in float32."""
        a = self.architecture
        word, position, types = self.tables()
        return ops.embedding_layer_norm(
            input_ids,
            cu_seqlens,
            fixed_row(word, a.padding_id, input_ids),
            position,
            types,
            *self.norm(),
            a.eps,
            token_type_ids=token_type_ids,
            position_offset=a.position_offset,
            dropout_p=0.0 if seed is None else a.hidden_dropout_p,
            seed=seed,
            dtype=dtype,
        )


class Pooler(nn.Module):
    """The next-sentence head's dense layer: never computed here, kept so that a checkpoint is written back whole."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)


class PackedEncoder(nn.Module):
    """An encoder over packed batches; the families are its subclasses.

    Args:
        config: transformers' config of the family. Served: erf-GELU, absolute positions, no decoder.
        position_offset: the first token's row of the position table.

    Attributes:
        config_class: transformers' config class. FIELDS: see `Architecture.read`.
        activation_dtype: dtype in which activations are stored (float32 by default, float16, bfloat16; float64 for a
            float64 model). Parameters stay as they are, float32 normally; sums, LayerNorm and softmax run in float32.
        gradient_checkpointing: whether backward recomputes each layer, see `gradient_checkpointing_enable`.

    Raises:
        ValueError: the config asks for what is not served.
    """

    config_class: ClassVar[type[PretrainedConfig]]
    FIELDS: ClassVar[dict[str, str | None]] = {}
    embeddings: Embeddings
    pooler: Pooler | None

    def __init__(self, config: PretrainedConfig, position_offset: int = 0) -> None:
        super().__init__()
        self.config = config
        self.architecture = Architecture.read(config, self.FIELDS, position_offset)
        self.activation_dtype = torch.float32
        self.gradient_checkpointing = False
        self.embeddings = Embeddings(self.architecture)
        self.pooler = None

    def layers(self) -> Sequence[EncoderLayer]:
        """The layers, first to last."""
        raise NotImplementedError

    def relative_bias(self, reach: int) -> Tensor | None:
        """`ops.packed_attention`'s relative_bias for sequences of at most `reach` tokens; None in most families."""
        return None

    def initialise(self) -> None:
        """Give the parameters transformers' initial values: normal weights, zero biases, zero rows for padding."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.architecture.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, special tokens included."""
        return self.architecture.longest

    def gradient_checkpointing_enable(self) -> None:
        """Keep only each layer's input for backward and compute the layer again there, with the same dropout bits."""
        self.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what backward needs, as by default."""
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        dropout: bool = True,
        pool: bool = False,
    ) -> Tensor:
        """Encode a packed batch.

        Args:
            input_ids: [T], int64.
            cu_seqlens: [B + 1], int32: 0, then the running total of sequence lengths, ending at T.
            max_seqlen: at least the longest sequence's length.
            token_type_ids: [T], int64; all 0 by default. Only for families that have token types.
            dropout: False for none in training mode either, so that a thread can encode while another trains.

            pool: give the mean of each sequence instead, so that the last hidden states need not be written.

        Returns:
            Last hidden states [T, D], with `pool` embeddings [B, D], in `activation_dtype`.

        Raises:
            TypeError, ValueError: the batch is not packed as above, a sequence is longer than the position table, or
                (CPU) an id is outside the vocabulary. TypeError also if a module of the encoder was wrapped.
        """
        if not torch.compiler.is_compiling():  # traced, the operators check what they are given when they run
            self.check_batch(input_ids, cu_seqlens, max_seqlen, token_type_ids)
        return self.states(input_ids, cu_seqlens, max_seqlen, token_type_ids, dropout, self.activation_dtype, pool)

    def states(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None,
        dropout: bool,
        dtype: torch.dtype,
        pool: bool = False,
    ) -> Tensor:
        """As `forward`, with activations in `dtype`, of a batch that is known to be packed right.

        No value of a tensor is read where Triton serves: nothing waits for the GPU, and a CUDA graph can hold it.
        """
        a = self.architecture
        if not torch.compiler.is_compiling():
            self._check_dtype(dtype)
        batch = PackedBatch(cu_seqlens, max_seqlen, self.relative_bias(max(max_seqlen, 1)))
        seed = self._draw_seed(input_ids.device) if self.training and dropout else None
        hidden = self.embeddings(input_ids, cu_seqlens, token_type_ids, dtype, seed)
        if pool and a.layers == 0:
            return ops.packed_mean_pool(hidden, cu_seqlens)
        for i, layer in enumerate(self.layers()):
            stream = (i + 1) * STREAMS_PER_LAYER
            dropouts = (a.attention_dropout_p, a.projection_dropout_p, a.hidden_dropout_p)
            arguments = (batch, a.heads, a.eps, *dropouts, seed, stream, pool and i == a.layers - 1)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # The seed is a tensor that is kept, so there is no generator state to save.
                hidden = checkpoint(_run_layer, hidden, layer, arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = _run_layer(hidden, layer, arguments)
        return hidden

    def _draw_seed(self, device: torch.device) -> Tensor | None:
        """One seed for all dropout of a forward, from torch's generator, so that its state alone fixes a step."""
        if self.architecture.hidden_dropout_p == self.architecture.attention_dropout_p == 0.0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in ACTIVATION_DTYPES:
            raise ValueError(f"activation_dtype: expected one of {ACTIVATION_DTYPES}, got {dtype}")
        parameters = self.embeddings.tables()[0].dtype
        if parameters != torch.promote_types(dtype, torch.float32):
            raise TypeError(
                f"parameters: expected float32 (float64 with activation_dtype float64), got {parameters} with "
                f"activation_dtype {dtype}; half precision is chosen by activation_dtype alone"
            )

    def check_batch(
        self, input_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, token_type_ids: Tensor | None
    ) -> None:
        """Check that a batch is what `forward` takes; max_seqlen None: not asked.

        Raises:
            TypeError, ValueError: it is not, naming the argument.
        """
        lengths = check_packed(input_ids, cu_seqlens, max_seqlen)
        longest = max(lengths, default=0)
        a = self.architecture
        if longest > a.longest:
            offset = f" - {a.position_offset}" if a.position_offset else ""
            raise ValueError(
                f"cu_seqlens: expected sequences of at most {a.longest} tokens (max_position_embeddings{offset}), "
                f"got one of {longest}"
            )
        _check_ids("input_ids", input_ids, a.vocab_size, "vocab_size")
        if token_type_ids is not None:
            if not a.token_types:
                raise ValueError(f"token_type_ids: expected None, {self.config.model_type} has no token types")
            require_integers("token_type_ids", token_type_ids, "int64")
            if token_type_ids.shape != input_ids.shape:
                raise ValueError(
                    f"token_type_ids: expected shape {tuple(input_ids.shape)}, got {tuple(token_type_ids.shape)}"
                )
            _check_ids("token_type_ids", token_type_ids, a.token_types, "type_vocab_size")


def _run_layer(hidden: Tensor, layer: EncoderLayer, arguments: tuple[Any, ...]) -> Tensor:
    return encoder_layer(hidden, layer.weights(), *arguments)


def _check_ids(name: str, ids: Tensor, size: int, limit_name: str) -> None:
    if ids.device.type != "cpu" or ids.numel() == 0:  # elsewhere a check would wait for the device
        return
    low, high = (int(value) for value in ids.aminmax())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: expected ids from 0 to {size - 1} ({limit_name} {size}), got {wrong}")
