"""Every operator in plain PyTorch: the specification that each kernel is tested against.

Any device, any floating dtype. Values are widened to at least float32 (float64 stays float64), computed, and cast to
the result's dtype once at the end. The forward functions are differentiable by autograd; the `*_backward` functions are
the same gradients written out, for the operators, whose implementations run below autograd.
"""

from triton_st.reference.cosine_similarity import cosine_similarity, cosine_similarity_backward
from triton_st.reference.mean_pool import (
    masked_mean_pool,
    masked_mean_pool_backward,
    packed_mean_pool,
    packed_mean_pool_backward,
)
from triton_st.reference.mnrl_loss import mnrl_loss, mnrl_loss_backward, mnrl_loss_forward
from triton_st.reference.normalize import EPS, normalize

__all__ = [
    "EPS",
    "cosine_similarity",
    "cosine_similarity_backward",
    "masked_mean_pool",
    "masked_mean_pool_backward",
    "mnrl_loss",
    "mnrl_loss_backward",
    "mnrl_loss_forward",
    "normalize",
    "packed_mean_pool",
    "packed_mean_pool_backward",
]
