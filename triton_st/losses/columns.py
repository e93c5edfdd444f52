"""The columns of a batch: their texts' ids and their embeddings, from packed features or sentence-transformers' own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from triton_st.models.packing import Features, concatenate

TEXT_IDS = "text_ids"
"""Key of the features under which a column's `text_ids` may ride along."""


def text_id(text: bytes) -> int:
    """A text's id: 64 bits of its hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def is_packed(column: Features) -> bool:
    """Whether these features are ours; sentence-transformers' are padded."""
    return "cu_seqlens" in column


def text_ids(column: Features) -> Tensor:
    """Ids of a column's texts, equal for equal texts: those that came along, else hashes of their tokens. int64 [B]."""
    if TEXT_IDS in column:
        return column[TEXT_IDS]
    tokens = column["input_ids"]
    ids = tokens.cpu().numpy().astype(np.int64)
    if is_packed(column):
        rows = np.split(ids, column["cu_seqlens"][1:-1].tolist())
    else:
        kept = column["attention_mask"].bool().cpu().numpy()
        rows = [row[mask] for row, mask in zip(ids, kept, strict=True)]
    return torch.tensor([text_id(row.tobytes()) for row in rows], dtype=torch.int64, device=tokens.device)


def embed(model: nn.Module, columns: Sequence[Features]) -> Tensor:
    """Embeddings of the columns, one below the other [columns * B, D]; packed ones ride in one forward."""
    if all(is_packed(column) for column in columns):
        return model(concatenate(columns), token_embeddings=False)["sentence_embedding"]
    return torch.cat([model(column)["sentence_embedding"] for column in columns])


def check_columns(sizes: Sequence[int]) -> None:
    """ValueError unless there are two columns or more, of one batch size."""
    if len(sizes) < 2:
        raise ValueError(f"sentence_features: expected at least two columns, anchor and positive, got {len(sizes)}")
    if len(set(sizes)) > 1:
        raise ValueError(f"sentence_features: expected columns of one batch size, got sizes {list(sizes)}")


def batch_size(column: Features) -> int:
    """Texts in a column."""
    return column["cu_seqlens"].numel() - 1 if is_packed(column) else len(column["input_ids"])


def slice_rows(column: Features, begin: int, end: int) -> Features:
    """The texts `begin` ... `end` of a column."""
    if is_packed(column):
        cu_seqlens = column["cu_seqlens"][begin : end + 1]
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        part: Features = {
            "input_ids": column["input_ids"][first:last],
            "cu_seqlens": cu_seqlens - first,
            "max_seqlen": column["max_seqlen"],
        }
        if column.get("token_type_ids") is not None:
            part["token_type_ids"] = column["token_type_ids"][first:last]
        return {**{name: x for name, x in column.items() if not isinstance(x, Tensor)}, **part}
    mask = column["attention_mask"][begin:end]
    width = int(mask.any(0).nonzero().max()) + 1 if mask.any() else mask.shape[1]
    whole = column["attention_mask"].shape
    return {
        name: x[begin:end, :width] if isinstance(x, Tensor) and x.shape[:2] == whole
        else x[begin:end] if isinstance(x, Tensor) and x.dim() and len(x) == whole[0]
        else x
        for name, x in column.items()
    }  # fmt: skip


def lengths(column: Features) -> list[int]:
    """Tokens of each text."""
    if is_packed(column):
        return column["cu_seqlens"].diff().tolist()
    return column["attention_mask"].sum(1).tolist()
