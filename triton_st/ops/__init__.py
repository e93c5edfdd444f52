"""Differentiable operators on embeddings: each a `torch.library` operator served by Triton, C++ or plain PyTorch."""

from triton_st.ops.cosine_similarity import cosine_similarity
from triton_st.ops.mean_pool import masked_mean_pool, packed_mean_pool
from triton_st.ops.mnrl_loss import mnrl_loss

__all__ = ["cosine_similarity", "masked_mean_pool", "mnrl_loss", "packed_mean_pool"]
