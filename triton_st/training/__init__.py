"""The trainer: its loop in `trainer`, and one module for each thing that the loop leans on."""

from triton_st.training.checkpointing import CheckpointError
from triton_st.training.divergence import TrainingDiverged
from triton_st.training.trainer import SentenceTransformerTrainer, TrainOutput

__all__ = ["CheckpointError", "SentenceTransformerTrainer", "TrainOutput", "TrainingDiverged"]
