"""Shared by the benchmarks of training: one step of either library, on the same weights and the same batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import Dataset

Step = Callable[[], float]
ST = "st"
"""What contenders of sentence-transformers are called, or begin with."""


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the functions taking turns; one call of each beforehand does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def triplets(train: Dataset, size: int) -> list[list[str]]:
    """The first batch of the reference recipe at this batch size, column by column."""
    from triton_st import recipes  # here: a process of sentence-transformers' does without
    from triton_st.data import NoDuplicatesBatchSampler

    rows = next(iter(NoDuplicatesBatchSampler(train, batch_size=size, seed=recipes.SEED)))
    return [[train[name][i] for i in rows] for name in train.column_names]


def load(name: str, folder: str, **config: Any) -> tuple[Any, nn.Module]:
    """The model in `folder` and its MultipleNegativesRankingLoss, of the library that `name` stands for.

    Only that library is imported. `config` holds fields of the encoder's config in place of those in the folder.
    """
    if name.startswith(ST):
        import sentence_transformers as st

        theirs = st.SentenceTransformer(folder, device="cpu", config_kwargs=config)
        return theirs, st.sentence_transformer.losses.MultipleNegativesRankingLoss(theirs)
    from triton_st import SentenceTransformer, losses

    ours = SentenceTransformer(folder, device="cpu", config_kwargs=config)
    return ours, losses.MultipleNegativesRankingLoss(ours)


def features(model: Any, columns: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Columns of texts as the model's own library tokenises them."""
    return [(model.tokenize if is_ours(model) else model.preprocess)(list(texts)) for texts in columns]


def is_ours(model: Any) -> bool:
    """Whether the model is triton_st's."""
    return type(model).__module__.startswith("triton_st.")


def training_step(
    model: Any, loss: nn.Module, features: list[Any], precision: torch.dtype, learning_rate: float = 5e-5
) -> Step:
    """A function that makes one whole training step (forward, backward, clipping, AdamW) and returns its loss.

    `precision` is that of our activations, or sentence-transformers' autocast. At a learning rate of 0 the same is
    computed and the weights stay what they are.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)

    def step() -> float:
        model.train()
        value = forward(model, loss, features, precision)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value.item()

    return step


def forward(model: Any, loss: nn.Module, features: list[Any], precision: torch.dtype) -> torch.Tensor:
    """The loss of a batch in the mode that the model is in."""
    autocast = contextlib.nullcontext() if precision == torch.float32 else torch.autocast("cpu", precision)
    with model.activations_in(precision) if is_ours(model) else autocast:
        # sentence-transformers adds its results to the features it is given
        return loss([dict(column) for column in features], None)
