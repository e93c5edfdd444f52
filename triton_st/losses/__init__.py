"""Training losses under sentence-transformers' names, with its signatures, defaults, settings and citations.

They take a `triton_st.SentenceTransformer`, or a `sentence_transformers.SentenceTransformer` and its trainer.
"""

from triton_st.losses.cached_multiple_negatives_ranking import CachedMultipleNegativesRankingLoss
from triton_st.losses.matryoshka import MatryoshkaLoss
from triton_st.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from triton_st.losses.multiple_negatives_symmetric_ranking import MultipleNegativesSymmetricRankingLoss

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "MatryoshkaLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]
