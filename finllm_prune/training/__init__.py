"""Training: a transformers Trainer that prunes and distils."""

from finllm_prune.training.distillation import Distillation, Teacher
from finllm_prune.training.oneshot import calibration_batches, prune_once, refuse_no_chain
from finllm_prune.training.trainer import PruningTrainer

__all__ = ["Distillation", "PruningTrainer", "Teacher", "calibration_batches", "prune_once", "refuse_no_chain"]
