"""What a config says of an encoder, whatever its family calls it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from triton_st.ops.packed_attention import MAX_HEAD_SIZE


@dataclass(frozen=True)
class Architecture:
    """A config's sizes and probabilities in one spelling.

    Raises:
        ValueError: a size or probability that is impossible, or an activation that is not served.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int
    positions: int  # rows of the position table
    token_types: int  # 0: the family has none
    padding_id: int | None
    eps: float
    attention_dropout_p: float  # of attention weights
    projection_dropout_p: float  # of attention's result
    hidden_dropout_p: float  # of the embeddings and of the feed-forward block's result
    initializer_range: float
    position_offset: int = 0

    @property
    def longest(self) -> int:
        """Longest sequence in tokens that the position table serves."""
        return self.positions - self.position_offset

    @staticmethod
    def read(config: PretrainedConfig, names: Mapping[str, str | None], position_offset: int = 0) -> Architecture:
        """Read and check `config`.

        `names` maps BERT's field names to the family's, None where it has no such field; "projection_dropout_prob", for
        which BERT has no field of its own, to None where the family drops nothing of attention's result.
        """

        def field(name: str) -> Any:
            return getattr(config, names.get(name) or name)

        def label(name: str) -> str:
            return f"config.{names.get(name) or name}"

        typed = names.get("type_vocab_size", "") is not None
        least = {"num_hidden_layers": 0, "hidden_size": 1, "num_attention_heads": 1, "intermediate_size": 1}
        least |= {"vocab_size": 1, "max_position_embeddings": 1 + position_offset}
        least |= {"type_vocab_size": 1} if typed else {}
        for name, smallest in least.items():
            if field(name) < smallest:
                raise ValueError(f"{label(name)}: expected at least {smallest}, got {field(name)}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= field(name) <= 1:
                raise ValueError(f"{label(name)}: expected a probability, 0 to 1, got {field(name)}")
        if field("hidden_act") != "gelu":
            raise ValueError(
                f"{label('hidden_act')}: expected 'gelu' (erf), the one that is served, got {field('hidden_act')!r}"
            )
        position_type = getattr(config, "position_embedding_type", "absolute")
        if position_type != "absolute":
            raise ValueError(f"config.position_embedding_type: expected 'absolute', got {position_type!r}")
        if getattr(config, "is_decoder", False):
            raise ValueError("config.is_decoder: expected False, an encoder, got True")
        if field("hidden_size") % field("num_attention_heads"):
            raise ValueError(
                f"{label('hidden_size')}: expected a multiple of num_attention_heads = "
                f"{field('num_attention_heads')}, got {field('hidden_size')}"
            )
        if field("hidden_size") > MAX_HEAD_SIZE * field("num_attention_heads"):
            raise ValueError(
                f"{label('num_attention_heads')}: expected heads of at most {MAX_HEAD_SIZE} elements, "
                f"got {field('hidden_size') // field('num_attention_heads')}"
            )
        return Architecture(
            hidden_size=field("hidden_size"),
            layers=field("num_hidden_layers"),
            heads=field("num_attention_heads"),
            intermediate_size=field("intermediate_size"),
            vocab_size=field("vocab_size"),
            positions=field("max_position_embeddings"),
            token_types=config.type_vocab_size if typed else 0,
            padding_id=position_offset - 1 if position_offset else config.pad_token_id,
            eps=field("layer_norm_eps") if names.get("layer_norm_eps", "") is not None else 1e-12,
            attention_dropout_p=field("attention_probs_dropout_prob"),
            projection_dropout_p=field("hidden_dropout_prob") if "projection_dropout_prob" not in names else 0.0,
            hidden_dropout_p=field("hidden_dropout_prob"),
            initializer_range=config.initializer_range,
            position_offset=position_offset,
        )
