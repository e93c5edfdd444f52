"""A tiny encoder and tiny data for tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from triton_st import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments, recipes
from triton_st.evaluation import EmbeddingSimilarityEvaluator
from triton_st.synthetic import synthetic_sts, synthetic_triplets

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def tiny_data(rows: int = 48) -> Dataset:
    return synthetic_triplets(rows, seed=1)


def tiny_model(**encoder: Any) -> SentenceTransformer:
    texts = [text for row in tiny_data(200) for text in row.values()]
    return recipes.new_model(texts, vocab_size=300, max_seq_length=32, seed=3, device="cpu", **{**ENCODER, **encoder})


def tiny_evaluator(rows: int = 40) -> EmbeddingSimilarityEvaluator:
    pairs = synthetic_sts(rows, split="dev")
    return EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"], name="dev")


def arguments(folder: Path, **changes: Any) -> SentenceTransformerTrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "batch_sampler": "no_duplicates",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SentenceTransformerTrainingArguments(str(folder), **{**settings, **changes})


def trainer(folder: Path, model: SentenceTransformer | None = None, **changes: Any) -> SentenceTransformerTrainer:
    """A trainer of the tiny model; `loss`, `evaluator`, `eval_dataset`, ... go to it, all else to its arguments."""
    parts = ("train_dataset", "eval_dataset", "loss", "evaluator", "callbacks")
    given = {name: changes.pop(name) for name in parts if name in changes}
    return SentenceTransformerTrainer(
        model=tiny_model() if model is None else model,
        args=arguments(folder, **changes),
        **{"train_dataset": tiny_data(), **given},
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def logged(run: SentenceTransformerTrainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]
