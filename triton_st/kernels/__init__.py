"""Triton kernels: one launcher for each operator, by the operator's name."""

from triton_st.kernels.cosine_similarity import cosine_similarity, cosine_similarity_backward
from triton_st.kernels.mean_pool import (
    masked_mean_pool,
    masked_mean_pool_backward,
    packed_mean_pool,
    packed_mean_pool_backward,
)
from triton_st.kernels.mnrl_loss import mnrl_loss_backward, mnrl_loss_forward

__all__ = [
    "cosine_similarity",
    "cosine_similarity_backward",
    "masked_mean_pool",
    "masked_mean_pool_backward",
    "mnrl_loss_backward",
    "mnrl_loss_forward",
    "packed_mean_pool",
    "packed_mean_pool_backward",
]
