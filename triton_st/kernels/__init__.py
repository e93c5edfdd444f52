"""Triton kernels: one launcher for each operator, by the operator's name."""

from triton_st.kernels.bias_gelu import bias_gelu, bias_gelu_backward
from triton_st.kernels.cosine_similarity import cosine_similarity, cosine_similarity_backward
from triton_st.kernels.cosine_topk import cosine_topk
from triton_st.kernels.dropout_add_layer_norm import dropout_add_layer_norm_backward, dropout_add_layer_norm_forward
from triton_st.kernels.embedding_layer_norm import embedding_layer_norm_backward, embedding_layer_norm_forward
from triton_st.kernels.layer_norm_mean_pool import layer_norm_mean_pool_backward, layer_norm_mean_pool_forward
from triton_st.kernels.mean_pool import (
    masked_mean_pool,
    masked_mean_pool_backward,
    packed_mean_pool,
    packed_mean_pool_backward,
)
from triton_st.kernels.mnrl_rows import mnrl_rows
from triton_st.kernels.packed_attention import packed_attention_backward, packed_attention_forward

__all__ = [
    "bias_gelu",
    "bias_gelu_backward",
    "cosine_similarity",
    "cosine_similarity_backward",
    "cosine_topk",
    "dropout_add_layer_norm_backward",
    "dropout_add_layer_norm_forward",
    "embedding_layer_norm_backward",
    "embedding_layer_norm_forward",
    "layer_norm_mean_pool_backward",
    "layer_norm_mean_pool_forward",
    "masked_mean_pool",
    "masked_mean_pool_backward",
    "mnrl_rows",
    "packed_attention_backward",
    "packed_attention_forward",
    "packed_mean_pool",
    "packed_mean_pool_backward",
]
