"""Batches without duplicates: our sampler on 1,000,000 rows, and beside that of sentence-transformers on fewer.

Every case checks the batches before it times them. `pytest bench/bench_no_duplicates.py --benchmark-only`
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from datasets import Dataset
from pytest_benchmark.fixture import BenchmarkFixture
from sentence_transformers.base.sampler import NoDuplicatesBatchSampler as ReferenceSampler

from triton_st.sampler import NoDuplicatesBatchSampler

BATCH_SIZE = 128
MILLION = 1_000_000


def unique(rows: int) -> dict[str, list[str]]:
    """Every text once: nothing ever clashes."""
    return {
        name: [f"the {name} of row number {row}" for row in range(rows)] for name in ("anchor", "positive", "negative")
    }


def nli(rows: int) -> dict[str, list[str]]:
    """As in SNLI: a premise in three rows, and short hypotheses that come up again."""
    rng = random.Random(0)
    return {
        "anchor": [f"a premise that {row // 3} rows begin with" for row in range(rows)],
        "positive": [f"hypothesis {int(rows * rng.random() ** 2)}" for _ in range(rows)],
        "negative": [f"contradiction {int(rows * rng.random() ** 2)}" for _ in range(rows)],
    }


def few_anchors(rows: int) -> dict[str, list[str]]:
    """Ten anchors for all rows: no batch has more than ten rows, and almost every row is put off."""
    return {
        "anchor": [f"anchor {row % 10}" for row in range(rows)],
        "positive": [f"positive {row}" for row in range(rows)],
    }


def class_labels(rows: int) -> dict[str, list[str]]:
    """Positive and negative are names of ten classes: every row clashes with a third of all others."""
    rng = random.Random(0)
    pairs = [rng.sample(range(10), 2) for _ in range(rows)]
    return {
        "anchor": [f"text {row}" for row in range(rows)],
        "positive": [f"class {positive}" for positive, _ in pairs],
        "negative": [f"class {negative}" for _, negative in pairs],
    }


CASES: list[Callable[[int], dict[str, list[str]]]] = [unique, nli, few_anchors, class_labels]


def ours(dataset: Dataset) -> list[list[int]]:
    return list(NoDuplicatesBatchSampler(dataset, BATCH_SIZE, seed=42))


def reference(dataset: Dataset) -> list[list[int]]:
    """sentence-transformers' sampler at its fastest: texts hashed ahead, in this process."""
    sampler = ReferenceSampler(
        dataset, BATCH_SIZE, drop_last=False, generator=torch.Generator(), seed=42, precompute_hashes=True,
        precompute_num_proc=1,
    )  # fmt: skip
    return list(sampler)


def assert_no_duplicates(dataset: Dataset, batches: list[list[int]]) -> None:
    columns = [dataset.data.column(name).to_pylist() for name in dataset.column_names]
    assert sorted(row for batch in batches for row in batch) == list(range(len(dataset)))
    for batch in batches:
        texts = [column[row] for column in columns for row in batch]
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_million_rows(benchmark: BenchmarkFixture, case: Callable[[int], dict[str, list[str]]]) -> None:
    dataset = Dataset.from_dict(case(MILLION))
    assert_no_duplicates(dataset, ours(dataset))
    benchmark.group = f"1,000,000 rows, {case.__name__}"
    benchmark.extra_info |= {"rows": MILLION, "batch_size": BATCH_SIZE}
    benchmark.pedantic(ours, (dataset,), rounds=1)


@pytest.mark.parametrize("sampler", [ours, reference], ids=["triton_st", "sentence_transformers"])
@pytest.mark.parametrize(
    ("case", "rows"),
    [(unique, 50_000), (nli, 50_000), (few_anchors, 2_000), (class_labels, 2_000)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_beside_sentence_transformers(
    benchmark: BenchmarkFixture,
    case: Callable[[int], dict[str, list[str]]],
    rows: int,
    sampler: Callable[[Dataset], list[list[int]]],
) -> None:
    dataset = Dataset.from_dict(case(rows))
    assert sampler(dataset) == reference(dataset)
    benchmark.group = f"{rows:,} rows, {case.__name__}"
    benchmark.extra_info |= {"rows": rows, "batch_size": BATCH_SIZE}
    benchmark.pedantic(sampler, (dataset,), rounds=3)
