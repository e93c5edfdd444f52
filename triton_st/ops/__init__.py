"""Operators on embeddings: each a `torch.library` operator served by Triton, C++ or plain PyTorch."""

from triton_st.ops.bert_layer import BertLayerParameters, bert_layer
from triton_st.ops.bias_gelu import bias_gelu
from triton_st.ops.cosine_similarity import cosine_similarity
from triton_st.ops.cosine_topk import cosine_topk
from triton_st.ops.dropout_add_layer_norm import dropout_add_layer_norm
from triton_st.ops.embedding_layer_norm import embedding_layer_norm
from triton_st.ops.layer_norm_mean_pool import layer_norm_mean_pool
from triton_st.ops.mean_pool import masked_mean_pool, packed_mean_pool
from triton_st.ops.mnrl_loss import mnrl_loss
from triton_st.ops.packed_attention import packed_attention

__all__ = [
    "BertLayerParameters",
    "bert_layer",
    "bias_gelu",
    "cosine_similarity",
    "cosine_topk",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "layer_norm_mean_pool",
    "masked_mean_pool",
    "mnrl_loss",
    "packed_attention",
    "packed_mean_pool",
]
