"""Fused kernels for sentence-embedding models: a drop-in for sentence-transformers that trains and encodes.

Names are loaded when first used, so that importing the package, or one kernel of it, costs only what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton_st import backend, data, evaluation, losses, ops, recipes, synthetic, training_args, util
    from triton_st.integrations.sentence_transformers import accelerate
    from triton_st.sentence_transformer import SentenceTransformer
    from triton_st.training import SentenceTransformerTrainer
    from triton_st.training_args import BatchSamplers, SentenceTransformerTrainingArguments

__version__ = "0.1.0"

_HOME = {
    "SentenceTransformer": "sentence_transformer",
    "SentenceTransformerTrainer": "training",
    "SentenceTransformerTrainingArguments": "training_args",
    "BatchSamplers": "training_args",
    "accelerate": "integrations.sentence_transformers",
}
_MODULES = ("backend", "data", "evaluation", "losses", "ops", "recipes", "synthetic", "training_args", "util")

__all__ = [
    "BatchSamplers",
    "SentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "accelerate",
    "backend",
    "data",
    "evaluation",
    "losses",
    "ops",
    "recipes",
    "synthetic",
    "training_args",
    "util",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
