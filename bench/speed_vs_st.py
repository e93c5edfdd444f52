"""Seconds per training step and texts per second against sentence-transformers, on real NLI texts.

One training step (forward, backward, clipping, AdamW) of the reference recipe, batch 128 triplets, dropout 0.1; one of
fine-tuning all-MiniLM-L6-v2, batch 64 triplets; and `encode` of all-MiniLM-L6-v2 in float32. Both libraries run in one
process on the same weights, texts and threads and take turns; medians are compared, after parity was asserted.
sentence-transformers' `encode` runs at the best of several batch sizes. Writes bench/results/speed_vs_st.json.

    python -m bench.speed_vs_st --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers as st
import torch
from datasets import Dataset

from bench import steps
from bench.resources import minilm_folder, processor
from triton_st import SentenceTransformer, recipes
from triton_st.data import load_training_dataset

RESULT = Path(__file__).parent / "results" / "speed_vs_st.json"
TEXTS = 1_000


def compare_training(
    folder: str, train: Dataset, batch_size: int, precisions: dict[str, torch.dtype], rounds: int
) -> dict[str, Any]:
    """Seconds per step of the model in `folder`; `precisions` by name, sentence-transformers' beginning with "st"."""
    batch = steps.triplets(train, batch_size)
    runs, tokens = {}, 0
    for name, precision in precisions.items():
        model, loss = steps.load(name, folder)
        columns = steps.features(model, batch)
        runs[name] = steps.training_step(model, loss, columns, precision)
        if steps.is_ours(model):
            tokens = sum(column["input_ids"].numel() for column in columns)
    first = {name: run() for name, run in runs.items()}  # dropout draws differ: the losses agree roughly
    assert max(first.values()) - min(first.values()) < 0.2, first
    medians = {name: statistics.median(values) for name, values in steps.take_turns(runs, rounds).items()}
    return {"tokens": tokens, "seconds": medians, "times_faster": {n: medians["st"] / s for n, s in medians.items()}}


def compare_reference_recipe(train: Dataset, rounds: int) -> dict[str, Any]:
    """A step of the reference recipe, from scratch."""
    with tempfile.TemporaryDirectory() as folder:
        texts = (text for name in train.column_names for text in train[name])
        recipes.new_model(texts).save_pretrained(folder, create_model_card=False)
        precisions = {"fp32": torch.float32, "fp16": torch.float16, "st": torch.float32}
        return compare_training(folder, train, 128, precisions, rounds)


def compare_fine_tuning(train: Dataset, rounds: int) -> dict[str, Any]:
    """A step of fine-tuning all-MiniLM-L6-v2."""
    precisions = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "st": torch.float32,
        "st, bf16 autocast": torch.bfloat16,
    }
    return compare_training(str(minilm_folder()), train, 64, precisions, rounds)


def compare_encoding(train: Dataset, rounds: int) -> dict[str, Any]:
    """Texts per second of all-MiniLM-L6-v2."""
    folder = minilm_folder()
    texts = list(train["anchor"][:TEXTS])
    ours, theirs = SentenceTransformer(folder, device="cpu"), st.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: ours.encode(texts)}
    for size in (8, 32, 128):
        runs[f"st, batch {size}"] = lambda size=size: theirs.encode(texts, batch_size=size)  # type: ignore[misc]
    medians = {name: statistics.median(values) for name, values in steps.take_turns(runs, rounds).items()}
    best = min(seconds for name, seconds in medians.items() if name != "ours")
    per_second = {name: len(texts) / seconds for name, seconds in medians.items()}
    return {"texts": len(texts), "texts_per_second": per_second, "times_faster_than_best": best / medians["ours"]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with nli_train.jsonl")
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each function")
    args = parser.parse_args()
    train = load_training_dataset(args.data / "nli_train.jsonl", max_samples=10_112)
    result = {
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "training": compare_reference_recipe(train, args.rounds),
        "fine_tuning": compare_fine_tuning(train, max(args.rounds // 3, 3)),
        "encoding": compare_encoding(train, max(args.rounds // 3, 3)),
    }
    print(json.dumps(result, indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
