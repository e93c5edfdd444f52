"""What the model card's tests share: a small model, a training run as the card sees it, and readers of a card."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData

from triton_st import backend, recipes
from triton_st.evaluation import EmbeddingSimilarityEvaluator
from triton_st.losses import MultipleNegativesRankingLoss
from triton_st.model_card import SentenceTransformerModelCardData
from triton_st.sentence_transformer import SentenceTransformer

TEXTS = [f"A {colour} {animal} {verb}." for colour in ("red", "blue", "green") for animal in ("cat", "dog")
         for verb in ("sleeps", "runs", "eats", "sings quietly in the old garden")]  # fmt: skip


def new_model() -> SentenceTransformer:
    """A small model whose vocabulary is that of TEXTS."""
    with backend.use("reference"):
        return recipes.new_model(TEXTS, vocab_size=200, max_seq_length=32, num_hidden_layers=1)


def triplets(texts: list[str] = TEXTS) -> Dataset:
    return Dataset.from_dict({"anchor": texts, "positive": texts[1:] + texts[:1], "negative": texts[::-1]})


def evaluator(name: str, metrics: dict[str, float], **attributes: Any) -> tuple[Any, dict[str, float]]:
    prefix = f"{name}_" if name else ""
    prefixed = {prefix + key: value for key, value in metrics.items()}
    made = EmbeddingSimilarityEvaluator(["a", "b"], ["c", "d"], [1, 2], name=name, **attributes)
    made.primary_metric = list(prefixed)[-1]
    return made, prefixed


LOG = [
    {"eval_sts-dev_spearman_max": 0.25, "eval_sts-dev_pearson_max": 0.2, "epoch": 0.0, "step": 0},
    {"loss": 5.266599, "learning_rate": 1e-5, "grad_norm": 1.5, "epoch": 0.012658227848, "step": 1},
    {"loss": 5.1, "learning_rate": 5e-5, "grad_norm": 1.5, "epoch": 0.5, "step": 40},
    {"eval_loss": 4.98765, "eval_runtime": 2.5, "eval_sts-dev_spearman_max": 0.5, "epoch": 0.5, "step": 40},
    {"train_runtime": 90.0, "train_loss": 5.0, "epoch": 1.0, "step": 79},
]


def train(model: SentenceTransformer, **changes: Any) -> SentenceTransformerModelCardData:
    """Card data as the trainer leaves it after a run."""
    data = model.model_card_data
    for step, value in ((0, 0.25), (40, 0.5), (79, 0.612345)):
        for name in ("sts-dev", "sts-test"):
            if name == "sts-dev" or step == 79:
                made, metrics = evaluator(name, {"pearson_cosine": value / 2, "spearman_max": value})
                data.set_evaluation_metrics(made, metrics, step / 79, step)
    arguments = {
        "args": recipes.arguments("/secret/place", fp16=True, learning_rate=1e-3),
        "train_dataset": triplets(),
        "eval_dataset": triplets().select(range(5)),
        "loss": MultipleNegativesRankingLoss(model, scale=30.0),
        "log_history": LOG,
    }
    data.set_training_run(**arguments | changes)
    return data


def section(card: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above. Code is no heading."""
    level = len(heading) - len(heading.lstrip("#"))
    kept: list[str] = []
    fenced = inside = False
    for line in card.splitlines():
        fenced ^= line.strip().startswith("```")
        depth = 0 if fenced else len(line) - len(line.lstrip("#"))
        if depth and depth <= level:
            inside = line == heading
        elif inside:
            kept.append(line)
    assert kept, f"no {heading!r}"
    return "\n".join(kept)


def tables(text: str) -> list[list[list[str]]]:
    """Tables as a Markdown reader sees them: rows of cells' HTML."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")
    html = markdown.render(text)
    return [
        [
            re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    ]


def metadata(card: str) -> dict[str, Any]:
    """The metadata block, read in the three ways that matter and found the same."""
    data = ModelCard(card).data
    block = card.split("---\n")[1]
    loaded = yaml.safe_load(block)
    assert ModelCardData(**dict(loaded)).to_dict() == data.to_dict()
    return loaded


class Mode(Enum):
    FAST = "fast"
    SLOW = "slow"


@dataclass
class OtherArguments:
    output_dir: str
    mode: Mode = Mode.FAST
    rate: float = 0.5
    names: list[str] = field(default_factory=lambda: ["x"])
    limit: float = math.inf

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))
