"""Training: a transformers Trainer that prunes and distils."""

from finllm_prune.training.distillation import Distillation, Teacher
from finllm_prune.training.recorder import RECORD_FILE, Recorder, Recording
from finllm_prune.training.trainer import PruningTrainer

__all__ = ["RECORD_FILE", "Distillation", "PruningTrainer", "Recorder", "Recording", "Teacher"]
