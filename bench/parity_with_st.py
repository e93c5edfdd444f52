"""Train the reference recipe with sentence-transformers and with triton_st and compare every step.

Same initial weights, tokenizer and batches, dropout 0, on real NLI triplets; float32 against float32, and our float16
against our float32. Writes bench/results/parity_with_st.json and exits with 1 where a bound does not hold.

    python -m bench.parity_with_st --data ../shared/data
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentence_transformers as st
import torch
from datasets import Dataset

from triton_st import SentenceTransformer, SentenceTransformerTrainer, losses, recipes
from triton_st.data import NoDuplicatesBatchSampler, load_sts_dataset, load_training_dataset
from triton_st.evaluation import EmbeddingSimilarityEvaluator

RESULT = Path(__file__).parent / "results" / "parity_with_st.json"
SAMPLES = 10_112
BOUNDS = {
    "loss_fp32_vs_st": 1e-5,  # relative, at every step
    "metrics_fp32_vs_st": 1e-4,  # absolute, every STS metric
    "loss_fp16_vs_fp32": 2e-3,  # relative, at every step
    "spearman_fp16_vs_fp32": 2e-3,  # absolute, every Spearman
}


def record_losses(loss: torch.nn.Module) -> list[float]:
    """The list that every value `loss` returns from now on is appended to."""
    values: list[float] = []
    loss.register_forward_hook(lambda module, inputs, output: values.append(float(output.detach())))
    return values


def evaluate(model: Any, sts: dict[str, Dataset]) -> dict[str, float]:
    """All ten STS metrics of both splits, by our evaluator, for either library's model."""
    metrics: dict[str, float] = {}
    for split, pairs in sts.items():
        evaluator = EmbeddingSimilarityEvaluator(
            pairs["sentence1"],
            pairs["sentence2"],
            pairs["score"],
            similarity_fn_names=["cosine", "manhattan", "euclidean", "dot"],
            name=split,
            write_csv=False,
        )
        metrics.update(evaluator(model))
    return metrics


def train_ours(folder: Path, train: Dataset, learning_rate: float, **precision: bool) -> tuple[Any, list[float]]:
    """Our trainer, from the weights in `folder`: the trained model and the loss of every step."""
    model = SentenceTransformer(str(folder))
    loss = losses.MultipleNegativesRankingLoss(model)
    values = record_losses(loss)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = recipes.arguments(
            scratch, learning_rate=learning_rate, eval_strategy="no", save_strategy="no", disable_tqdm=True, **precision
        )
        SentenceTransformerTrainer(model=model, args=arguments, train_dataset=train, loss=loss).train()
    return model, values


def train_st(folder: Path, train: Dataset, learning_rate: float) -> tuple[Any, list[float]]:
    """sentence-transformers' trainer on the same weights and the same batches."""
    model = st.SentenceTransformer(str(folder), device="cpu")
    loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    values = record_losses(loss)

    def batches(dataset: Dataset, batch_size: int, drop_last: bool, seed: int = 0, **ignored: Any) -> Any:
        return NoDuplicatesBatchSampler(dataset, batch_size=batch_size, drop_last=drop_last, seed=recipes.SEED)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = st.SentenceTransformerTrainingArguments(
            scratch,
            per_device_train_batch_size=recipes.REFERENCE.arguments["per_device_train_batch_size"],
            num_train_epochs=recipes.REFERENCE.arguments["num_train_epochs"],
            learning_rate=learning_rate,
            warmup_steps=recipes.REFERENCE.arguments["warmup_steps"],
            lr_scheduler_type=recipes.REFERENCE.arguments["lr_scheduler_type"],
            max_grad_norm=recipes.REFERENCE.arguments["max_grad_norm"],
            seed=recipes.SEED,
            batch_sampler=batches,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        st.SentenceTransformerTrainer(model=model, args=arguments, train_dataset=train, loss=loss).train()
    return model, values


def worst_relative(values: list[float], expected: list[float]) -> float:
    """Largest relative difference between two loss curves, which must be equally long."""
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True))


def worst_metric(metrics: dict[str, float], expected: dict[str, float], only: str = "") -> float:
    """Largest absolute difference between two sets of metrics."""
    return max(abs(metrics[name] - expected[name]) for name in expected if only in name)


def compare(folder: Path, train: Dataset, sts: dict[str, Dataset], learning_rate: float) -> dict[str, Any]:
    """All three runs at one learning rate, and how far they are apart."""
    st_model, st_losses = train_st(folder, train, learning_rate)
    model, fp32_losses = train_ours(folder, train, learning_rate)
    half_model, fp16_losses = train_ours(folder, train, learning_rate, fp16=True)
    st_metrics, fp32_metrics, fp16_metrics = (evaluate(m, sts) for m in (st_model, model, half_model))
    return {
        "learning_rate": learning_rate,
        "steps": len(st_losses),
        "first_loss": st_losses[0],
        "last_loss": st_losses[-1],
        "differences": {
            "loss_fp32_vs_st": worst_relative(fp32_losses, st_losses),
            "metrics_fp32_vs_st": worst_metric(fp32_metrics, st_metrics),
            "loss_fp16_vs_fp32": worst_relative(fp16_losses, fp32_losses),
            "spearman_fp16_vs_fp32": worst_metric(fp16_metrics, fp32_metrics, only="spearman"),
        },
        "metrics": {"st": st_metrics, "fp32": fp32_metrics, "fp16": fp16_metrics},
        "losses": {"st": st_losses, "fp32": fp32_losses, "fp16": fp16_losses},
    }


def main() -> int:
    """Run, print, write, and return 1 if a bound was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with nli_train.jsonl, stsb_dev.csv, stsb_test.csv"
    )
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[5e-5, 1e-3])
    args = parser.parse_args()
    train = load_training_dataset(args.data / "nli_train.jsonl", max_samples=SAMPLES)
    sts = {split: load_sts_dataset(args.data / f"stsb_{split}.csv") for split in ("dev", "test")}
    texts = (text for column in train.column_names for text in train[column])
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        model = recipes.new_model(texts, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.save_pretrained(folder, create_model_card=False)
        runs = [compare(Path(folder), train, sts, rate) for rate in args.learning_rates]
    failed = False
    for run in runs:
        print(f"\nlearning rate {run['learning_rate']:g}: loss {run['first_loss']:.4f} -> {run['last_loss']:.4f}")
        for name, difference in run["differences"].items():
            missed = not difference <= BOUNDS[name]
            failed |= missed
            print(f"  {name:<24}{difference:10.2e}   bound {BOUNDS[name]:.0e}{'   MISSED' if missed else ''}")
        for name in ("dev_spearman_cosine", "test_spearman_cosine"):
            print(f"  {name:<24}" + "  ".join(f"{who} {m[name]:.4f}" for who, m in run["metrics"].items()))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"bounds": BOUNDS, "runs": runs}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
