from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler as ReferenceSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from triton_st.data import load_training_dataset
from triton_st.sampler import DefaultBatchSampler, NoDuplicatesBatchSampler


def reference_batches(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of sentence-transformers' own sampler, seeded as its trainer seeds it."""
    sampler = ReferenceSampler(dataset, batch_size, drop_last=False, generator=torch.Generator(), seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def texts_of(dataset: Dataset, row: int) -> set[str]:
    return set(dataset[row].values())


@st.composite
def small_datasets(draw: st.DrawFn) -> Dataset:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    text = st.integers(0, draw(st.sampled_from([0, 1, 3, 8, 30, 1000]))).map(str)
    column = st.lists(text, min_size=rows, max_size=rows)
    return Dataset.from_dict({f"column {index}": draw(column) for index in range(columns)})


@settings(max_examples=150, deadline=None)
@given(small_datasets(), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
def test_no_duplicates_invariants_and_the_batches_of_sentence_transformers(
    dataset: Dataset, batch_size: int, seed: int, epoch: int
) -> None:
    sampler = NoDuplicatesBatchSampler(dataset, batch_size, seed=seed)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(sampler) == sampler.num_batches(epoch) == len(batches)
    assert sorted(chain(*batches)) == list(range(len(dataset)))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        texts = [text for row in batch for text in texts_of(dataset, row)]
        assert len(texts) == len(set(texts))
    # A row is put off only if it clashes: an incomplete batch clashes with every row that comes after it.
    for number, batch in enumerate(batches):
        if len(batch) < batch_size:
            held = set().union(*(texts_of(dataset, row) for row in batch))
            assert all(texts_of(dataset, row) & held for row in chain(*batches[number + 1 :]))
    assert batches == reference_batches(dataset, batch_size, seed, epoch)

    dropping = NoDuplicatesBatchSampler(dataset, batch_size, drop_last=True, seed=seed)
    dropping.set_epoch(epoch)
    assert list(dropping) == [batch for batch in batches if len(batch) == batch_size]
    assert len(dropping) == len(list(dropping))


@pytest.mark.parametrize("batch_size", [16, 128])
def test_real_data_gives_the_batches_of_sentence_transformers(shared_data: Path, batch_size: int) -> None:
    dataset = load_training_dataset(shared_data / "nli_train.jsonl", max_samples=10_112)
    sampler = NoDuplicatesBatchSampler(dataset, batch_size, seed=42)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == reference_batches(dataset, batch_size, 42, epoch)
    assert len(sampler) == 10_112 // batch_size  # the reference run's 79 steps


def test_few_texts_shared_by_all_rows_keep_the_order() -> None:
    """The case that is quadratic when each batch looks at all the rows left over: 5 anchors for 20,000 rows."""
    rows, anchors = 20_000, 5
    dataset = Dataset.from_dict(
        {"a": [f"anchor {row % anchors}" for row in range(rows)], "b": [str(r) for r in range(rows)]}
    )
    sampler = NoDuplicatesBatchSampler(dataset, batch_size=8)
    batches = list(sampler)
    assert len(batches) == rows // anchors
    order = DefaultBatchSampler(dataset, batch_size=rows)
    shuffled = next(iter(order))
    for anchor in range(anchors):  # the k-th row with an anchor is in the k-th batch
        expected = [row for row in shuffled if row % anchors == anchor]
        assert [row for batch in batches for row in batch if row % anchors == anchor] == expected


def test_a_text_twice_in_one_row_is_let_be() -> None:
    dataset = Dataset.from_dict({"a": ["x", "y", "z"], "b": ["x", "y", "w"]})
    assert [sorted(batch) for batch in NoDuplicatesBatchSampler(dataset, 3)] == [[0, 1, 2]]


def test_only_text_columns_are_compared() -> None:
    dataset = Dataset.from_dict({"a": ["x", "y"], "b": ["z", "w"], "label": [1, 1], "ids": [[1], [1]]})
    assert [sorted(batch) for batch in NoDuplicatesBatchSampler(dataset, 2)] == [[0, 1]]


def test_selected_rows_of_a_dataset_count_by_their_new_index() -> None:
    dataset = Dataset.from_dict({"a": list("xxyz"), "b": list("abcd")}).select([3, 1, 0, 2, 2])
    batches = list(NoDuplicatesBatchSampler(dataset, 5, seed=3))
    assert sorted(chain(*batches)) == [0, 1, 2, 3, 4]
    assert sorted(map(len, batches)) == [2, 3]
    assert batches == reference_batches(dataset, 5, 3, 0)


@pytest.mark.parametrize("sampler_class", [DefaultBatchSampler, NoDuplicatesBatchSampler])
def test_epochs_seeds_and_resuming(sampler_class: type[DefaultBatchSampler]) -> None:
    dataset = Dataset.from_dict({"a": [str(row // 2) for row in range(101)], "b": [f"b{row}" for row in range(101)]})
    sampler = sampler_class(dataset, 10, seed=1)
    first = list(sampler)
    assert list(sampler) == first  # an epoch can be drawn again
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    resumed = sampler_class(dataset, 10, seed=1)
    resumed.set_epoch(1)
    for batch in range(len(second) + 2):
        assert list(resumed.iterate_from(batch)) == second[batch:]
    assert list(sampler_class(dataset, 10, seed=2)) == second  # epoch 0 of seed 2 is epoch 1 of seed 1, as in ST
    assert list(sampler_class(dataset, 10, seed=4)) != first


def test_default_sampler_is_torchs_random_sampler() -> None:
    dataset = Dataset.from_dict({"a": [str(row) for row in range(25)]})
    for drop_last in (False, True):
        generator = torch.Generator().manual_seed(5)
        expected = list(BatchSampler(RandomSampler(dataset, generator=generator), 4, drop_last))
        sampler = DefaultBatchSampler(dataset, 4, drop_last, seed=5)
        assert list(sampler) == expected
        assert len(sampler) == len(expected)


def test_serves_a_data_loader() -> None:
    dataset = Dataset.from_dict({"a": list("xxyz"), "b": list("abcd")})
    loader = DataLoader(dataset, batch_sampler=NoDuplicatesBatchSampler(dataset, 2))
    assert sorted(chain(*(batch["b"] for batch in loader))) == list("abcd")


@pytest.mark.parametrize("sampler_class", [DefaultBatchSampler, NoDuplicatesBatchSampler])
def test_bad_arguments(sampler_class: type[DefaultBatchSampler]) -> None:
    dataset = Dataset.from_dict({"a": ["x"], "b": ["y"]})
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        sampler_class(dataset, 0)
    with pytest.raises(TypeError, match="batch_size: expected an int, got float"):
        sampler_class(dataset, 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dataset: has no rows"):
        sampler_class(dataset.select([]), 2)
    with pytest.raises(ValueError, match="first_batch: expected at least 0, got -1"):
        next(sampler_class(dataset, 2).iterate_from(-1))


def test_no_duplicates_needs_texts() -> None:
    with pytest.raises(ValueError, match="expected text columns, got label"):
        NoDuplicatesBatchSampler(Dataset.from_dict({"label": [1]}), 2)
    with pytest.raises(ValueError, match="column 'b': expected strings, got null"):
        NoDuplicatesBatchSampler(Dataset.from_dict({"a": ["x", "y"], "b": ["z", None]}), 2)
