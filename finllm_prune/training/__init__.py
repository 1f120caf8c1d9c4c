"""Training: a transformers Trainer that prunes and distils."""

from finllm_prune.training.batches import sample_batches
from finllm_prune.training.cosines import COSINES, Cosines, sentence_transformers
from finllm_prune.training.distillation import Distillation, Teacher, drop_out, refuse_unless_part
from finllm_prune.training.layers import uniform_layers
from finllm_prune.training.lora import Lora, adapt, merge, refuse_beside_lora
from finllm_prune.training.oneshot import Pass, lies_in, prune_block, prune_once, record, refuse_no_chain
from finllm_prune.training.recorder import RECORD_FILE, Recorder, Recording
from finllm_prune.training.recovery import Recovery, Seam, SmallerCallback, hand_over, refuse_unrecoverable
from finllm_prune.training.sensitivity import measure_sensitivity
from finllm_prune.training.teacher_logits import with_kept_logits, with_teacher_logits
from finllm_prune.training.teacher_states import refuse_no_room
from finllm_prune.training.trainer import PruningTrainer, smoothed

__all__ = [
    "COSINES", "RECORD_FILE", "Cosines", "Distillation", "Lora", "Pass", "PruningTrainer", "Recorder", "Recording", "Recovery",
    "Seam", "SmallerCallback", "Teacher",
    "adapt", "drop_out", "hand_over", "lies_in", "measure_sensitivity", "merge", "prune_block", "prune_once", "record",
    "refuse_beside_lora", "refuse_no_chain", "refuse_no_room",
    "refuse_unless_part", "refuse_unrecoverable", "sample_batches", "sentence_transformers", "smoothed", "uniform_layers",
    "with_kept_logits", "with_teacher_logits",
]  # fmt: skip
