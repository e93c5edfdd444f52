"""The packed encoder, its families, and what reads and writes their checkpoints."""

from triton_st.models.bert import BertModel, RobertaModel, XLMRobertaModel
from triton_st.models.checkpoint import load_encoder, save_encoder
from triton_st.models.distilbert import DistilBertModel
from triton_st.models.encoder import PackedEncoder
from triton_st.models.mpnet import MPNetModel
from triton_st.models.packing import concatenate, pack, to_device

__all__ = [
    "BertModel",
    "DistilBertModel",
    "MPNetModel",
    "PackedEncoder",
    "RobertaModel",
    "XLMRobertaModel",
    "concatenate",
    "load_encoder",
    "pack",
    "save_encoder",
    "to_device",
]
