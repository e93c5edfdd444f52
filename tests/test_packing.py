"""Packed batches: laying texts end to end, joining columns, refusing what is not packed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_st.models.packing import check_packed, concatenate, pack, to_device

token_lists = st.lists(st.lists(st.integers(0, 30_000), max_size=7), max_size=6)


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def test_pack_lays_texts_end_to_end():
    features = pack([[5, 6, 7], [], [8]])
    assert features["input_ids"].tolist() == [5, 6, 7, 8]
    assert features["cu_seqlens"].tolist() == [0, 3, 3, 4]
    assert features["max_seqlen"] == 3
    assert features["input_ids"].dtype == torch.int64
    assert features["cu_seqlens"].dtype == torch.int32


def test_pack_of_nothing_is_an_empty_batch():
    features = pack([])
    assert features["input_ids"].shape == (0,)
    assert features["cu_seqlens"].tolist() == [0]
    assert features["max_seqlen"] == 0


@given(st.lists(token_lists, min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_joined_columns_equal_one_packed_batch(columns):
    joined = concatenate([pack(column) for column in columns])
    assert _equal(joined, pack([ids for column in columns for ids in column]))


def test_token_types_of_columns_that_lack_them_are_zero():
    typed = pack([[1, 2]]) | {"token_type_ids": torch.tensor([0, 1])}
    joined = concatenate([pack([[3]]), typed, pack([[4]])])
    assert joined["token_type_ids"].tolist() == [0, 0, 1, 0]


def test_joining_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one packed batch, got none"):
        concatenate([])


def test_to_device_moves_tensors_and_keeps_the_rest():
    moved = to_device(pack([[1, 2]]), "meta")
    assert moved["input_ids"].is_meta
    assert moved["cu_seqlens"].is_meta
    assert moved["max_seqlen"] == 2


@given(token_lists)
@settings(max_examples=50, deadline=None)
def test_a_packed_batch_passes_the_check(token_ids):
    features = pack(token_ids)
    assert check_packed(**features) == [len(ids) for ids in token_ids]


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "message"),
    [
        ([1, 4], 4, "cu_seqlens: expected to start at 0, got 1"),
        ([0, 3], 4, "cu_seqlens: expected to end at T = 4, the number of tokens, got 3"),
        ([0, 9], 9, "cu_seqlens: expected to end at T = 4, the number of tokens, got 9"),
        ([0, 3, 2, 4], 4, "cu_seqlens: expected ascending offsets, got 3 before 2"),
        ([0, 1, 4], 2, "max_seqlen: expected at least 3, the longest sequence, got 2"),
        ([], 4, r"cu_seqlens: expected shape \[B\+1\], got \(0,\)"),
        ([[0, 4]], 4, r"cu_seqlens: expected shape \[B\+1\], got \(1, 2\)"),
    ],
)
def test_wrong_offsets_are_named(cu_seqlens, max_seqlen, message):
    with pytest.raises(ValueError, match=message):
        check_packed(torch.arange(4), torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen)


def test_wrong_types_are_named():
    ids, bounds = torch.arange(4), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(TypeError, match=r"input_ids: expected int64, got torch.float32"):
        check_packed(ids.float(), bounds, 4)
    with pytest.raises(TypeError, match=r"cu_seqlens: expected int32, got torch.float32"):
        check_packed(ids, bounds.float(), 4)
    with pytest.raises(TypeError, match="max_seqlen: expected an int, got Tensor"):
        check_packed(ids, bounds, torch.tensor(4))
    with pytest.raises(ValueError, match=r"input_ids: expected a flat run of tokens \[T\], got shape \(2, 2\)"):
        check_packed(ids.view(2, 2), bounds, 4)
