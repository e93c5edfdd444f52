"""A ranking loss at several lengths of the embedding at once."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from triton_st.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss, Prefixes
from triton_st.models.packing import Features

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer

logger = logging.getLogger(__name__)


class MatryoshkaLoss(nn.Module):
    """The weighted sum of a ranking loss over prefixes of the embeddings, so that a cut embedding is still a good one.

    The prefixes are embedded once and, with cosine or dot product (of normalised prefixes, as in
    sentence-transformers), swept over once: dot products of prefixes are partial sums.

    Args:
        model: the model that `loss` holds.
        loss: a `MultipleNegativesRankingLoss` of this package, or one derived from it.
        matryoshka_dims: lengths of the prefixes, in any order.
        matryoshka_weights: their weights, 1 each by default.
        n_dims_per_step: how many of them, drawn by chance, count in a step; -1 for all.

    Attributes:
        matryoshka_dims, matryoshka_weights: as given, longest first.

    Raises:
        ValueError: no lengths, one that is not positive or longer than the embedding, or another number of weights.
        TypeError: `loss` is none of these.

    Reference: Kusupati et al., https://arxiv.org/abs/2205.13147;
    https://sbert.net/docs/package_reference/sentence_transformer/losses.html#matryoshkaloss
    """

    def __init__(
        self,
        model: SentenceTransformer | nn.Module,
        loss: MultipleNegativesRankingLoss,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__()
        if not isinstance(loss, MultipleNegativesRankingLoss):
            raise TypeError(
                f"loss: expected a triton_st.losses.MultipleNegativesRankingLoss, got {type(loss).__module__}."
                f"{type(loss).__name__}; sentence-transformers' MatryoshkaLoss takes other losses"
            )
        if not matryoshka_dims:
            raise ValueError("matryoshka_dims: expected at least one, got none")
        if min(matryoshka_dims) < 1:
            raise ValueError(f"matryoshka_dims: expected positive lengths, got {list(matryoshka_dims)}")
        weights = [1] * len(matryoshka_dims) if matryoshka_weights is None else list(matryoshka_weights)
        if len(weights) != len(matryoshka_dims):
            raise ValueError(f"matryoshka_weights: expected {len(matryoshka_dims)} of them, got {len(weights)}")
        whole: int | None = model.get_embedding_dimension()  # type: ignore[operator]
        if whole is not None and max(matryoshka_dims) > whole:
            raise ValueError(f"matryoshka_dims: expected at most {whole}, the embedding's, got {max(matryoshka_dims)}")
        if whole is not None and whole not in matryoshka_dims:
            logger.warning("matryoshka_dims: the whole embedding, %d, is not among %s", whole, list(matryoshka_dims))
        self.model = model
        self.loss = loss
        pairs = sorted(zip(matryoshka_dims, weights, strict=True), key=lambda pair: pair[0], reverse=True)
        self.matryoshka_dims = tuple(dim for dim, _ in pairs)
        self.matryoshka_weights = tuple(weight for _, weight in pairs)
        self.n_dims_per_step = n_dims_per_step

    @property
    def wants_text_ids(self) -> bool:
        """As the inner loss."""
        return self.loss.wants_text_ids

    @property
    def last_diagnostics(self) -> dict[str, Tensor]:
        """The inner loss' diagnostics, which are of the longest prefix."""
        return self.loss.last_diagnostics

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Embed the columns once and compute the sum; arguments, result and errors are the inner loss'."""
        return self.loss(sentence_features, labels, prefixes=self._prefixes())

    def _prefixes(self) -> Prefixes:
        count = len(self.matryoshka_dims)
        chosen: Sequence[int] = range(count)
        if 0 < self.n_dims_per_step < count:
            chosen = random.sample(chosen, self.n_dims_per_step)
        weights: dict[int, float] = {}
        for i in chosen:  # a length may have been given twice
            weights[self.matryoshka_dims[i]] = weights.get(self.matryoshka_dims[i], 0.0) + self.matryoshka_weights[i]
        dims = sorted(weights)
        return dims, [weights[dim] for dim in dims]

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card states them."""
        return {
            "loss": type(self.loss).__name__,
            "matryoshka_dims": self.matryoshka_dims,
            "matryoshka_weights": self.matryoshka_weights,
            "n_dims_per_step": self.n_dims_per_step,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the paper that the loss comes from."""
        return """
@misc{kusupati2024matryoshka,
    title={Matryoshka Representation Learning},
    author={Aditya Kusupati and Gantavya Bhatt and Aniket Rege and Matthew Wallingford and Aditya Sinha and
        Vivek Ramanujan and William Howard-Snyder and Kaifeng Chen and Sham Kakade and Prateek Jain and Ali Farhadi},
    year={2024},
    eprint={2205.13147},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""
