"""Training losses under sentence-transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_st import ops, util
from triton_st.models.packing import Features, concatenate

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer

__all__ = ["MultipleNegativesRankingLoss"]


class MultipleNegativesRankingLoss(nn.Module):
    """In-batch contrastive loss: each anchor should be nearer to its positive than to every other document.

    All columns ride in one packed forward. The documents are the positives, then each column of hard negatives; with
    the default similarity the loss streams over them, holding a tile of bounded size.

    Args:
        model: a `triton_st.SentenceTransformer`.
        scale: what similarities are multiplied by, the inverse temperature; positive.
        similarity_fct: [B, D], [M, D] -> [B, M]. `util.cos_sim` is fused; any other callable runs in plain PyTorch.

    Raises:
        ValueError: `scale` is not positive and finite. TypeError: `similarity_fct` is not callable.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/losses.html#multiplenegativesrankingloss;
    van den Oord et al., https://arxiv.org/abs/1807.03748; Henderson et al., https://arxiv.org/abs/1705.00652.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
    ) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale: expected a finite positive number, got {scale}")
        if not callable(similarity_fct):
            raise TypeError(f"similarity_fct: expected a callable, got {type(similarity_fct).__name__}")
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct

    def forward(self, sentence_features: Iterable[Features], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss.

        Args:
            sentence_features: packed features of the columns: anchors, positives, then any columns of hard negatives,
                each of B texts.
            labels: taken for sentence-transformers' sake, and not used: the positive of anchor i is document i.

        Returns:
            The mean loss, 0-d; float32 for half-precision embeddings.

        Raises:
            ValueError: fewer than two columns, or columns of different batch sizes.
        """
        columns = list(sentence_features)
        sizes = [column["cu_seqlens"].numel() - 1 for column in columns]
        _check_columns(sizes)
        embeddings = self.model(concatenate(columns))["sentence_embedding"]  # [columns * B, D]
        return self._loss(embeddings[: sizes[0]], embeddings[sizes[0] :])

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings already computed: one [B, D] per column. Returns and raises as `forward`."""
        _check_columns([len(column) for column in embeddings])
        return self._loss(embeddings[0], torch.cat(list(embeddings[1:])))

    def _loss(self, queries: Tensor, documents: Tensor) -> Tensor:
        if self.similarity_fct is util.cos_sim:
            return ops.mnrl_loss(queries, documents, self.scale)
        scores = self.similarity_fct(queries, documents) * self.scale  # [B, M]
        targets = torch.arange(len(queries), device=scores.device)
        return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), targets)

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card states them."""
        name = getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__)
        return {"scale": self.scale, "similarity_fct": name}

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper that the loss comes from."""
        return """
@misc{oord2019representationlearningcontrastivepredictive,
    title={Representation Learning with Contrastive Predictive Coding},
    author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
    year={2019},
    eprint={1807.03748},
    archivePrefix={arXiv},
    primaryClass={cs.LG},
    url={https://arxiv.org/abs/1807.03748},
}
"""


def _check_columns(sizes: list[int]) -> None:
    if len(sizes) < 2:
        raise ValueError(f"sentence_features: expected at least two columns, anchor and positive, got {len(sizes)}")
    if len(set(sizes)) > 1:
        raise ValueError(f"sentence_features: expected columns of one batch size, got sizes {sizes}")
