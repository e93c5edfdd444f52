"""Every operator in plain PyTorch: the specification that each kernel is tested against.

Any device, any floating dtype. Values are widened to at least float32 (float64 stays float64), computed, and cast to
the result's dtype once at the end. The forward functions are differentiable by autograd; the `*_backward` functions are
the same gradients written out, for the operators, whose implementations run below autograd.
"""

from triton_st.reference.bert_layer import (
    BertLayerParameters,
    bert_layer,
    bert_layer_backward,
    bert_layer_forward,
)
from triton_st.reference.bias_gelu import bias_gelu, bias_gelu_backward
from triton_st.reference.cosine_similarity import cosine_similarity, cosine_similarity_backward
from triton_st.reference.cosine_topk import cosine_topk
from triton_st.reference.dropout_add_layer_norm import (
    dropout_add_layer_norm,
    dropout_add_layer_norm_backward,
    dropout_add_layer_norm_forward,
)
from triton_st.reference.embedding_layer_norm import (
    embedding_layer_norm,
    embedding_layer_norm_backward,
    embedding_layer_norm_forward,
)
from triton_st.reference.layer_norm_mean_pool import (
    layer_norm_mean_pool,
    layer_norm_mean_pool_backward,
    layer_norm_mean_pool_forward,
)
from triton_st.reference.mean_pool import (
    masked_mean_pool,
    masked_mean_pool_backward,
    packed_mean_pool,
    packed_mean_pool_backward,
)
from triton_st.reference.mnrl_loss import mnrl_loss
from triton_st.reference.mnrl_rows import mnrl_rows
from triton_st.reference.normalize import EPS, normalize
from triton_st.reference.packed_attention import (
    packed_attention,
    packed_attention_backward,
    packed_attention_forward,
)

__all__ = [
    "EPS",
    "BertLayerParameters",
    "bert_layer",
    "bert_layer_backward",
    "bert_layer_forward",
    "bias_gelu",
    "bias_gelu_backward",
    "cosine_similarity",
    "cosine_similarity_backward",
    "cosine_topk",
    "dropout_add_layer_norm",
    "dropout_add_layer_norm_backward",
    "dropout_add_layer_norm_forward",
    "embedding_layer_norm",
    "embedding_layer_norm_backward",
    "embedding_layer_norm_forward",
    "layer_norm_mean_pool",
    "layer_norm_mean_pool_backward",
    "layer_norm_mean_pool_forward",
    "masked_mean_pool",
    "masked_mean_pool_backward",
    "mnrl_loss",
    "mnrl_rows",
    "normalize",
    "packed_attention",
    "packed_attention_backward",
    "packed_attention_forward",
    "packed_mean_pool",
    "packed_mean_pool_backward",
]
