"""In-batch contrastive loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triton_st import ops, util
from triton_st.losses.columns import batch_size, check_columns, embed, text_ids
from triton_st.losses.gathering import gather, is_distributed
from triton_st.models.packing import Features
from triton_st.ops.mnrl_loss import RankingDiagnostics, direction_mask, hardness_number, require_scale
from triton_st.reference import normalize

if TYPE_CHECKING:
    from triton_st.sentence_transformer import SentenceTransformer

logger = logging.getLogger(__name__)

FALSE_NEGATIVES = (None, "mask_duplicates")
_FUSED = {"cos_sim": "cos_sim", "pytorch_cos_sim": "cos_sim", "dot_score": "dot"}
_ALL_DIRECTIONS = {"query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"}

Prefixes = tuple[Sequence[int], Sequence[float]]
"""Lengths of the embeddings' prefixes, ascending, and the weight of the loss of each."""


class MultipleNegativesRankingLoss(nn.Module):
    """In-batch contrastive loss: each anchor should be nearer to its positive than to every other document.

    All columns ride in one packed forward. The documents are the positives, then each column of hard negatives; with
    cosine or dot product the loss streams over them, holding blocks of bounded size, and forms gradients on the way.

    Args:
        model: a `triton_st.SentenceTransformer`, or a `sentence_transformers.SentenceTransformer`.
        scale: what similarities are multiplied by, the inverse temperature; positive.
        similarity_fct: [B, D], [M, D] -> [B, M]. `cos_sim` and `dot_score`, ours or sentence-transformers', are fused;
            any other callable runs in plain PyTorch.
        gather_across_devices: contrast with the documents of all processes of torch.distributed, which may have batches
            of different sizes. The value is this process' sum of losses · processes / rows of all, and the mean of the
            gradients over processes, as DistributedDataParallel takes it, is that of the joined batch.
        directions, partition_mode, hardness_mode, hardness_strength: as `ops.mnrl_loss` says.
        margin, margin_strategy: leave out negatives that are more similar than the positive − margin ("absolute") or −
            margin · |positive| ("relative").
        false_negatives: "mask_duplicates" leaves out what has the same text as the anchor or the positive, or is the
            positive of the same anchor in another row.
        diagnostics: keep `last_diagnostics` of every batch, which `SentenceTransformerTrainer` logs.

    Attributes:
        last_diagnostics: name -> 0-d tensor, of the last batch: `in_batch_accuracy` (how often the positive is the most
            similar document), `in_batch_mrr` (mean reciprocal rank of the positive), `positive_similarity` and
            `hardest_negative_similarity` (means). Empty without `diagnostics`.

    Raises:
        ValueError: `scale` is not positive and finite, or settings are unknown or do not go together. TypeError:
            `similarity_fct` is not callable.

    Reference: https://sbert.net/docs/package_reference/sentence_transformer/losses.html#multiplenegativesrankingloss;
    van den Oord et al., https://arxiv.org/abs/1807.03748; Henderson et al., https://arxiv.org/abs/1705.00652; for the
    options, see `ops.mnrl_loss`.
    """

    def __init__(
        self,
        model: SentenceTransformer | nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = util.cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        margin: float | None = None,
        margin_strategy: str = "absolute",
        false_negatives: str | None = None,
        diagnostics: bool = False,
    ) -> None:
        super().__init__()
        require_scale(scale)
        if not callable(similarity_fct):
            raise TypeError(f"similarity_fct: expected a callable, got {type(similarity_fct).__name__}")
        direction_mask(directions, partition_mode)
        hardness_number(hardness_mode, hardness_strength)
        if hardness_mode is not None and not hardness_strength:
            logger.warning("hardness_mode=%r has no effect with hardness_strength=0", hardness_mode)
        if margin_strategy not in ("absolute", "relative"):
            raise ValueError(f"margin_strategy: expected 'absolute' or 'relative', got {margin_strategy!r}")
        if false_negatives not in FALSE_NEGATIVES:
            raise ValueError(f"false_negatives: expected None or 'mask_duplicates', got {false_negatives!r}")
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        self.margin = margin
        self.margin_strategy = margin_strategy
        self.false_negatives = false_negatives
        self.diagnostics = diagnostics
        self.last_diagnostics: dict[str, Tensor] = {}

    @property
    def wants_text_ids(self) -> bool:
        """Whether the features should carry the ids of their texts; without, the loss hashes their tokens."""
        return self.false_negatives is not None

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None, prefixes: Prefixes | None = None
    ) -> Tensor:
        """Embed the columns and compute the loss.

        Args:
            sentence_features: features of the columns: anchors, positives, then any columns of hard negatives, each of
                B texts; packed, or sentence-transformers' for its model.
            labels: taken for sentence-transformers' sake, and not used: the positive of anchor i is document i.
            prefixes: sum the losses of these prefixes of the embeddings, as `MatryoshkaLoss` does.

        Returns:
            The mean loss, 0-d; float32 for half-precision embeddings.

        Raises:
            ValueError: fewer than two columns, or columns of different batch sizes.
        """
        columns = list(sentence_features)
        sizes = [batch_size(column) for column in columns]
        check_columns(sizes)
        return self.loss_of(embed(self.model, columns), sizes[0], self.ids_of(columns), prefixes)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of embeddings already computed: one [B, D] per column. Returns and raises as `forward`.

        Raises:
            ValueError: also with `false_negatives`, since embeddings do not say what is a duplicate.
        """
        if self.false_negatives is not None:
            raise ValueError("false_negatives: embeddings do not say which texts are equal; pass features to forward")
        check_columns([len(column) for column in embeddings])
        return self.loss_of(torch.cat(list(embeddings)), len(embeddings[0]))

    def ids_of(self, columns: Sequence[Features]) -> Tensor | None:
        """Ids of the columns' texts, one column after another, if the loss needs them. int64 [columns * B]."""
        return torch.cat([text_ids(column) for column in columns]) if self.wants_text_ids else None

    def loss_of(
        self, embeddings: Tensor, batch: int, ids: Tensor | None = None, prefixes: Prefixes | None = None
    ) -> Tensor:
        """The loss of columns of `batch` embeddings, one below the other [columns * B, D], with their texts' ids."""
        queries, documents = embeddings[:batch], embeddings[batch:]
        options: dict[str, Any] = {}
        if ids is not None:
            options |= {"query_ids": ids[:batch], "document_ids": ids[batch:]}
        factor = 1.0
        if self.gather_across_devices and is_distributed():
            everyone, offset = gather(embeddings.unflatten(0, (-1, batch)).transpose(0, 1))  # [W, columns, D]
            documents = everyone[:, 1:].transpose(0, 1).flatten(0, 1)
            options |= {"targets": offset, "all_queries": everyone[:, 0], "reduction": "sum"}
            if ids is not None:
                all_ids = gather(ids.unflatten(0, (-1, batch)).T).rows
                options |= {"document_ids": all_ids[:, 1:].T.flatten(), "all_query_ids": all_ids[:, 0].contiguous()}
            factor = torch.distributed.get_world_size() / len(everyone)
        if prefixes is not None:
            options |= {"matryoshka_dims": prefixes[0], "matryoshka_weights": prefixes[1]}
        options |= {
            "similarity": self._similarity(normalized=prefixes is not None),
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            "margin": self.margin,
            "margin_strategy": self.margin_strategy,
        }
        if self.diagnostics:
            loss, facts = ops.mnrl_loss(queries, documents, self.scale, diagnostics=True, **options)
            self.last_diagnostics = _means(facts)
        else:
            loss = ops.mnrl_loss(queries, documents, self.scale, **options)
        return loss if factor == 1 else loss * factor

    def _similarity(self, *, normalized: bool) -> str | Callable[[Tensor, Tensor], Tensor]:
        """What `ops.mnrl_loss` takes. Prefixes are normalised first, so that their dot product is their cosine."""
        fct = self.similarity_fct
        module = str(getattr(fct, "__module__", "")).partition(".")[0]
        if module in ("triton_st", "sentence_transformers") and getattr(fct, "__name__", "") in _FUSED:
            return "cos_sim" if normalized else _FUSED[fct.__name__]
        return (lambda a, b: fct(normalize(a), normalize(b))) if normalized else fct

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, as a model card states them: sentence-transformers', and those of ours that are in use."""
        ours: dict[str, Any] = {}
        if self.margin is not None:
            ours |= {"margin": self.margin, "margin_strategy": self.margin_strategy}
        if self.false_negatives is not None:
            ours["false_negatives"] = self.false_negatives
        return {
            "scale": self.scale,
            "similarity_fct": getattr(self.similarity_fct, "__name__", type(self.similarity_fct).__name__),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
            **ours,
        }

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1.0 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper that the loss, with its directions, comes from."""
        if set(self.directions) == _ALL_DIRECTIONS and self.partition_mode == "joint":
            return _LI_2023
        if set(self.directions) == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction":
            return _GUENTHER_2024
        return _OORD_2019


def _means(facts: RankingDiagnostics) -> dict[str, Tensor]:
    hardest = facts.hardest_negative_similarity
    found = hardest.isfinite()  # a query may have no negative left
    return {
        "in_batch_accuracy": facts.correct.mean(),
        "in_batch_mrr": facts.reciprocal_rank.mean(),
        "positive_similarity": facts.positive_similarity.mean(),
        "hardest_negative_similarity": hardest.where(found, 0).sum() / found.sum().clamp_min(1),
    }


_OORD_2019 = """
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

_GUENTHER_2024 = """
@misc{günther2024jinaembeddings28192token,
    title={Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents},
    author={Michael Günther and Jackmin Ong and Isabelle Mohr and Alaeddine Abdessalem and Tanguy Abel and
        Mohammad Kalim Akram and Susana Guzman and Georgios Mastrapas and Saba Sturua and Bo Wang and
        Maximilian Werk and Nan Wang and Han Xiao},
    year={2024},
    eprint={2310.19923},
    archivePrefix={arXiv},
    primaryClass={cs.CL},
    url={https://arxiv.org/abs/2310.19923},
}
"""

_LI_2023 = """
@misc{li2023generaltextembeddingsmultistage,
    title={Towards General Text Embeddings with Multi-stage Contrastive Learning},
    author={Zehan Li and Xin Zhang and Yanzhao Zhang and Dingkun Long and Pengjun Xie and Meishan Zhang},
    year={2023},
    eprint={2308.03281},
    archivePrefix={arXiv},
    primaryClass={cs.CL},
    url={https://arxiv.org/abs/2308.03281},
}
"""
