"""Our kernels inside other libraries' objects."""

from triton_st.integrations.sentence_transformers import Accelerated, accelerate

__all__ = ["Accelerated", "accelerate"]
