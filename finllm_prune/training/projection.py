"""From the width of a student's hidden states to that of a wider or narrower teacher."""

from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.training.beside import load_beside, save_beside

PROJECTION_FILE = "projection.safetensors"


class Projection(nn.Module):
    """``W_layer`` of CoFi (Xia et al. 2022, https://arxiv.org/abs/2204.00408): a student's width -> its teacher's.

    One matrix for all layers, trained with the student and thrown away with the teacher. It starts orthogonal and drawn
    from a seed of its own, so that it is the same on all ranks and nothing else is drawn otherwise because of it. The
    gradients of all ranks are averaged.
    """

    def __init__(self, width: int, teacher_width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(teacher_width, width))
        nn.init.orthogonal_(self.weight, generator=torch.Generator().manual_seed(0))
        # In the backward, as DDP does it: a loss scaler looks for overflow before any callback, and all ranks must find it.
        self.weight.register_hook(lambda gradient: reduce(gradient, "mean"))

    def forward(self, states: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, the teacher's width)."""
        return F.linear(states.float(), self.weight)


class ProjectionCallback(TrainerCallback):
    """What the Trainer does for the parameters of its model and not for others, and their place beside each checkpoint."""

    def __init__(self, projection: Projection):
        self.projection = projection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            self.projection.load_state_dict(load_beside(args, state, PROJECTION_FILE))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.projection.zero_grad()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_beside(args, state, PROJECTION_FILE, self.projection.state_dict)
