"""Training: a transformers Trainer that prunes and distils."""

from finllm_prune.training.distillation import Distillation, Teacher
from finllm_prune.training.layers import uniform_layers
from finllm_prune.training.recorder import RECORD_FILE, Recorder, Recording
from finllm_prune.training.sensitivity import measure_sensitivity
from finllm_prune.training.teacher_logits import with_teacher_logits
from finllm_prune.training.trainer import PruningTrainer

__all__ = [
    "RECORD_FILE", "Distillation", "PruningTrainer", "Recorder", "Recording", "Teacher", "measure_sensitivity",
    "uniform_layers", "with_teacher_logits",
]  # fmt: skip
