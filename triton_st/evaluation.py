"""Evaluators: how well similarities of embeddings follow human scores. Names and numbers are sentence-transformers'.

Follows https://sbert.net/docs/package_reference/sentence_transformer/evaluation.html. An evaluator takes any model
with `encode`: ours or a `sentence_transformers.SentenceTransformer`.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from triton_st import util

try:
    import fcntl
except ImportError:  # Windows has no fcntl: there, rows are appended without a lock.
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Below this spread, relative to their size, fp32 similarities are told apart by rounding alone.
COLLAPSED_SPREAD = 1e-6


class SimilarityFunction(Enum):
    """Names of the similarity functions, as sentence-transformers' enum of this name."""

    COSINE = "cosine"
    DOT_PRODUCT = "dot"
    DOT = "dot"
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"


def pearson_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of two vectors [n], in fp64. NaN when n < 2, where a vector is constant or holds NaN or infinity."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(x) < 2 or not (np.isfinite(x).all() and np.isfinite(y).all()) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    x, y = _centred(x), _centred(y)
    return float(np.clip(x @ y, -1.0, 1.0))


def spearman_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho of two vectors [n]: Pearson's r of ranks, where ties share their mean rank. NaN as for Pearson."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    return pearson_correlation(_average_ranks(x), _average_ranks(y))


def _centred(values: np.ndarray) -> np.ndarray:
    """Values minus their mean, at length 1. Scaled to ±1 first, so that no square can overflow or vanish."""
    values = values / np.abs(values).max()
    values = values - values.mean()
    values = values / np.abs(values).max()
    return values / np.linalg.norm(values)


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, where equal values share the mean of the ranks that they span."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(values)])
    ends = np.append(starts[1:], len(values))
    ranks = np.empty(len(values), dtype=np.float64)
    ranks[order] = np.repeat((starts + 1 + ends) / 2, ends - starts)
    return ranks


class BaseEvaluator:
    """What every evaluator shares: a `primary_metric` among its metrics, and how it shows in logs and model cards."""

    def __init__(self) -> None:
        self.greater_is_better = True
        self.primary_metric: str | None = None

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate `model` and return its metrics by name. Subclasses implement it.

        `output_path` is a folder for files, or None; `epoch` and `steps` say where in training this is (-1: outside).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement __call__")

    def prefix_name_to_metrics(self, metrics: dict[str, float], name: str) -> dict[str, float]:
        """The metrics as floats under `{name}_{metric}`; `primary_metric` gets the same prefix. No name, no prefix."""
        prefix = f"{name}_" if name else ""
        if self.primary_metric is not None and not self.primary_metric.startswith(prefix):
            self.primary_metric = prefix + self.primary_metric
        return {prefix + key: float(value) for key, value in metrics.items()}

    def store_metrics_in_model_card_data(
        self, model: Any, metrics: dict[str, float], epoch: float = 0, step: int = 0
    ) -> None:
        """Hand the metrics to the model's card, where the model keeps one."""
        card_data = getattr(model, "model_card_data", None)
        if card_data is not None:
            card_data.set_evaluation_metrics(self, metrics, epoch, step)

    @property
    def description(self) -> str:
        """Readable name of the evaluation: `BinaryClassificationEvaluator` is "Binary Classification"."""
        return re.sub(r"([a-z])([A-Z])", r"\1 \2", type(self).__name__.partition("Evaluator")[0])

    def get_config_dict(self) -> dict[str, Any]:
        """Settings that the model card shows beside the metrics."""
        return {}


class EmbeddingSimilarityEvaluator(BaseEvaluator):
    """Pearson and Spearman correlation between gold scores and the similarities of two sentences' embeddings.

    Metrics, each prefixed with `{name}_` when there is a name: `pearson_{fn}` and `spearman_{fn}` for every similarity
    function, and, with more than one function, `pearson_max` and `spearman_max`. Distances count negated, so a higher
    similarity is always a closer pair. Every different sentence is encoded once, however often it occurs.

    A number that cannot be had is NaN, and a warning says why: fewer than two pairs, constant gold scores, constant
    similarities, or embeddings with NaN or infinity in them (the warning counts them). `*_max` is the maximum of the
    numbers that could be had.

    Args:
        sentences1: First sentence of each pair.
        sentences2: Second sentence of each pair.
        scores: Gold similarity of each pair, on any scale.
        batch_size: Sentences per batch of `encode`.
        main_similarity: The function whose Spearman is `primary_metric`; None: `spearman_max`, or the only function's.
        similarity_fn_names: Of "cosine", "manhattan", "euclidean", "dot". None: `main_similarity`, or the model's own.
        name: Prefix of the metrics, and part of the name of the CSV file.
        show_progress_bar: Progress bar of `encode`; None: when this module logs at INFO.
        write_csv: Append a row to `similarity_evaluation_{name}_results.csv` in the call's `output_path`.
        precision: None, or "float32", which also normalises the embeddings (as in sentence-transformers). The
            quantised precisions are not served.
        truncate_dim: Use the first so many dimensions only; None: what the model gives.

    Raises:
        ValueError: lists of different lengths, no pairs at all, a gold score that is not finite, an unknown similarity
            function or precision, `main_similarity` not among `similarity_fn_names`.
        TypeError: a sentence that is no string, a score that is no number, an argument that is no list.
    """

    def __init__(
        self,
        sentences1: Sequence[str],
        sentences2: Sequence[str],
        scores: Sequence[float],
        batch_size: int = 16,
        main_similarity: str | Enum | None = None,
        similarity_fn_names: Sequence[str] | None = None,
        name: str = "",
        show_progress_bar: bool | None = False,
        write_csv: bool = True,
        precision: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.sentences1 = _checked_sentences("sentences1", sentences1)
        self.sentences2 = _checked_sentences("sentences2", sentences2)
        self.scores = _checked_scores(scores)
        lengths = {"sentences1": len(self.sentences1), "sentences2": len(self.sentences2), "scores": len(self.scores)}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                "sentences1, sentences2 and scores must be of one length, got "
                + ", ".join(f"{length} {argument}" for argument, length in lengths.items())
            )
        if not self.scores:
            raise ValueError("sentences1, sentences2 and scores must hold at least one pair, got empty lists")
        if precision not in (None, "float32"):
            raise ValueError(
                f"precision must be None or 'float32' (quantised embeddings are not served), got {precision!r}"
            )
        if truncate_dim is not None and (not isinstance(truncate_dim, int) or truncate_dim < 1):
            raise ValueError(f"truncate_dim must be None or a positive integer, got {truncate_dim!r}")

        self.main_similarity = _similarity_name("main_similarity", main_similarity) if main_similarity else None
        self.similarity_fn_names = [_similarity_name("similarity_fn_names", fn) for fn in similarity_fn_names or []]
        if self.main_similarity and not self.similarity_fn_names:
            self.similarity_fn_names = [self.main_similarity]
        if self.main_similarity and self.main_similarity not in self.similarity_fn_names:
            raise ValueError(
                f"main_similarity must be one of similarity_fn_names {self.similarity_fn_names}, "
                f"got {self.main_similarity!r}"
            )
        self.name = name
        self.batch_size = batch_size
        if show_progress_bar is None:
            show_progress_bar = logger.getEffectiveLevel() <= logging.INFO
        self.show_progress_bar = show_progress_bar
        self.write_csv = write_csv
        self.precision = precision
        self.truncate_dim = truncate_dim
        parts = ["similarity_evaluation", name, precision, "results.csv"]
        self.csv_file = "_".join(part for part in parts if part)

    @classmethod
    def from_input_examples(cls, examples: Iterable[Any], **kwargs: Any) -> EmbeddingSimilarityEvaluator:
        """From objects with two `texts` and a `label`, the gold score: sentence-transformers' InputExample."""
        examples = list(examples)
        texts1, texts2 = [example.texts[0] for example in examples], [example.texts[1] for example in examples]
        return cls(texts1, texts2, [example.label for example in examples], **kwargs)

    @property
    def csv_headers(self) -> list[str]:
        """Column names of the CSV file."""
        return [
            "epoch",
            "steps",
            *(f"{fn}_{kind}" for fn in self.similarity_fn_names for kind in ("pearson", "spearman")),
        ]

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Encode the sentences with `model` and return the metrics by name; also logged, and kept for the model's card.

        Args:
            model: Anything with `encode(sentences, batch_size=, show_progress_bar=, convert_to_numpy=)`.
            output_path: Folder for the CSV file; None writes none.
            epoch: Where in training this is, for log and CSV; -1: outside of training.
            steps: Optimizer steps so far; -1: the end of the epoch.
        """
        when = (
            "" if epoch == -1 else f" after epoch {epoch}" if steps == -1 else f" in epoch {epoch} after {steps} steps"
        )
        if self.truncate_dim is not None:
            when += f" (truncated to {self.truncate_dim})"
        logger.info("%s: Evaluating the model on the %s dataset%s:", type(self).__name__, self.name, when)
        if not self.similarity_fn_names:
            # Kept from here on: the columns of one CSV file must not change.
            self.similarity_fn_names = [
                _similarity_name("model.similarity_fn_name", model.similarity_fn_name or "cosine")
            ]

        embeddings1, embeddings2 = self._embed(model)  # [n, D] each
        gold = np.asarray(self.scores, dtype=np.float64)
        undefined = self._warn_if_undefined(gold, embeddings1, embeddings2)
        metrics: dict[str, float] = {}
        for fn in self.similarity_fn_names:
            similarities = _similarities(fn, embeddings1, embeddings2)
            if not undefined:
                self._warn_if_constant(fn, similarities)
            pearson = pearson_correlation(gold, similarities)
            spearman = spearman_correlation(gold, similarities)
            metrics[f"pearson_{fn}"], metrics[f"spearman_{fn}"] = pearson, spearman
            logger.info("%s-Similarity:\tPearson: %.4f\tSpearman: %.4f", fn.capitalize(), pearson, spearman)

        if output_path is not None and self.write_csv:
            _append_csv(os.path.join(output_path, self.csv_file), self.csv_headers, [epoch, steps, *metrics.values()])
        if len(self.similarity_fn_names) > 1:
            for kind in ("pearson", "spearman"):
                values = [metrics[f"{kind}_{fn}"] for fn in self.similarity_fn_names]
                metrics[f"{kind}_max"] = max((value for value in values if not math.isnan(value)), default=math.nan)
        single = self.main_similarity or (self.similarity_fn_names[0] if len(self.similarity_fn_names) == 1 else None)
        self.primary_metric = f"spearman_{single or 'max'}"
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    def _embed(self, model: Any) -> tuple[Tensor, Tensor]:
        """fp32 embeddings on the CPU of both sides, each [n, D]."""
        unique = list(dict.fromkeys([*self.sentences1, *self.sentences2]))
        encoded = model.encode(
            unique, batch_size=self.batch_size, show_progress_bar=self.show_progress_bar, convert_to_numpy=True
        )
        embeddings = torch.from_numpy(np.array(encoded, dtype=np.float32))
        if embeddings.ndim != 2 or len(embeddings) != len(unique):
            raise ValueError(
                f"model.encode must give one vector per sentence, [{len(unique)}, D], got {list(embeddings.shape)}"
            )
        if self.truncate_dim is not None:
            embeddings = embeddings[:, : self.truncate_dim]
        if self.precision is not None:
            embeddings = util.normalize_embeddings(embeddings)
        row = {sentence: index for index, sentence in enumerate(unique)}
        rows1, rows2 = ([row[sentence] for sentence in side] for side in (self.sentences1, self.sentences2))
        return embeddings[rows1], embeddings[rows2]

    def _warn_if_undefined(self, gold: np.ndarray, embeddings1: Tensor, embeddings2: Tensor) -> bool:
        """Warn of what makes every metric NaN, and say whether something does."""
        if len(gold) < 2:
            self._warn("a correlation takes at least 2 pairs, and there is 1")
            return True
        if np.ptp(gold) == 0:
            self._warn(f"all {len(gold)} gold scores are {gold[0] + 0.0:g}: no correlation is defined")
            return True
        finite = torch.cat([embeddings1, embeddings2]).isfinite().all(dim=1)  # [2 n]
        if not finite.all():
            self._warn(
                f"{int((~finite).sum())} of {len(finite)} embeddings hold NaN or infinity: the model's weights or "
                "activations are not finite"
            )
            return True
        return False

    def _warn_if_constant(self, fn: str, similarities: np.ndarray) -> None:
        spread, size = np.ptp(similarities), np.abs(similarities).max()
        if spread == 0:
            self._warn(
                f"all {len(similarities)} {fn} similarities are {similarities[0] + 0.0:g}: "
                "the embeddings have collapsed, and no correlation is defined",
                what=f"the {fn} metrics are NaN",
            )
        elif spread <= COLLAPSED_SPREAD * size:
            self._warn(
                f"the {len(similarities)} {fn} similarities differ by {spread:.1e} at most, around "
                f"{similarities.mean():g}: the embeddings have collapsed",
                what=f"the {fn} metrics rest on rounding",
            )

    def _warn(self, why: str, what: str = "every metric is NaN") -> None:
        label = f" {self.name!r}" if self.name else ""
        warnings.warn(f"{type(self).__name__}{label}: {what}, since {why}.", RuntimeWarning, stacklevel=4)

    @property
    def description(self) -> str:
        """What the model card calls this evaluation."""
        return "Semantic Similarity"

    def get_config_dict(self) -> dict[str, Any]:
        """`truncate_dim` and `precision`, where set."""
        settings = {"truncate_dim": self.truncate_dim, "precision": self.precision}
        return {key: value for key, value in settings.items() if value is not None}


class SequentialEvaluator(BaseEvaluator):
    """Several evaluators as one, called in order; their metrics are merged and one score stands for all.

    The primary metric is `sequential_score`: `main_score_function` of the list of each evaluator's primary metric (of
    its first metric where it names none, of its value where it gives a bare number). By default the last one's.

    Raises:
        ValueError: no evaluators.
        TypeError: an evaluator that cannot be called.
    """

    def __init__(
        self,
        evaluators: Iterable[Callable[..., Any]],
        main_score_function: Callable[[list[float]], float] = lambda scores: scores[-1],
    ) -> None:
        super().__init__()
        self.evaluators = list(evaluators)
        if not self.evaluators:
            raise ValueError("evaluators must hold at least one evaluator, got none")
        for position, evaluator in enumerate(self.evaluators):
            if not callable(evaluator):
                raise TypeError(f"evaluators[{position}] must be an evaluator, got {type(evaluator).__name__}")
        self.main_score_function = main_score_function
        self.primary_metric = "sequential_score"

    def __call__(
        self, model: Any, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Call every evaluator; returns all metrics and `sequential_score`."""
        results: dict[str, float] = {}
        scores = []
        for position, evaluator in enumerate(self.evaluators):
            metrics = evaluator(model, output_path, epoch, steps)
            if not isinstance(metrics, dict):
                metrics = {f"evaluator_{position}": metrics}
            primary = getattr(evaluator, "primary_metric", None)
            scores.append(metrics[primary if primary is not None else next(iter(metrics))])
            results.update(metrics)
        return {**results, "sequential_score": self.main_score_function(scores)}


def _checked_sentences(argument: str, sentences: Sequence[str]) -> list[str]:
    # A string is a sequence of strings: without this check its letters would be the sentences.
    if isinstance(sentences, str) or not isinstance(sentences, Iterable):
        raise TypeError(f"{argument} must be a list of strings, got {type(sentences).__name__}")
    sentences = list(sentences)
    for position, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise TypeError(f"{argument}[{position}] must be a string, got {type(sentence).__name__}: {sentence!r:.80}")
    return sentences


def _checked_scores(scores: Sequence[float]) -> list[float]:
    if isinstance(scores, str) or not isinstance(scores, Iterable):
        raise TypeError(f"scores must be a list of numbers, got {type(scores).__name__}")
    checked: list[float] = []
    for position, score in enumerate(scores):
        if isinstance(score, (Tensor, np.ndarray)) and score.ndim == 0:
            score = score.item()
        if not isinstance(score, Real):
            raise TypeError(f"scores[{position}] must be a number, got {type(score).__name__}: {score!r:.80}")
        if not math.isfinite(score):
            raise ValueError(f"scores[{position}] must be finite, got {score!r}")
        checked.append(float(score))
    return checked


def _similarity_name(argument: str, value: Any) -> str:
    """The name of a similarity function, from itself or from an enum: ours or sentence-transformers'."""
    name = value.value if isinstance(value, Enum) else value
    if name not in util.SIMILARITIES:
        raise ValueError(f"{argument} must be one of {list(util.SIMILARITIES)}, got {value!r}")
    return name


def _similarities(fn: str, embeddings1: Tensor, embeddings2: Tensor) -> np.ndarray:
    """Similarity of each pair, [n]. In fp32 as sentence-transformers has it; in fp64 where squares could overflow."""
    size = max(embeddings1.abs().max().item(), embeddings2.abs().max().item())
    if 4 * embeddings1.shape[1] * size**2 > torch.finfo(torch.float32).max:
        embeddings1, embeddings2 = embeddings1.double(), embeddings2.double()
    return util.SIMILARITIES[fn][1](embeddings1, embeddings2).numpy().astype(np.float64)


def _append_csv(path: str, headers: list[str], row: list[Any]) -> None:
    """Append one row, in one write under a lock: neither two processes nor a kill can tear or mix lines."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a+b") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        existing = file.read()
        text = io.StringIO(newline="")
        if existing and not existing.endswith(b"\n"):
            text.write("\r\n")  # A line that something else cut off.
        writer = csv.writer(text)
        lines = existing.decode("utf-8", errors="replace").splitlines()
        written = [line for line in lines if line.startswith("epoch,steps")]
        if not written or written[-1] != ",".join(headers):
            if existing:
                logger.warning("%s holds other columns than these metrics: a second header is written", path)
            writer.writerow(headers)
        writer.writerow(row)
        file.write(text.getvalue().encode("utf-8"))
