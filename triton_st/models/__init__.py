"""The packed BERT encoder and what reads and writes its checkpoints."""

from triton_st.models.bert import BertModel
from triton_st.models.checkpoint import load_encoder, save_encoder
from triton_st.models.packing import concatenate, pack, to_device

__all__ = ["BertModel", "concatenate", "load_encoder", "pack", "save_encoder", "to_device"]
