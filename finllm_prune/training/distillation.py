"""What the pruned student learns from a dense teacher: its logits, its hidden states, and how its tokens relate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from transformers import DataCollator, PreTrainedConfig, PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.families import find_architecture
from finllm_prune.inference import Gather, answer
from finllm_prune.training.layers import hidden_error, ordered_matches, real_tokens, relation_divergence, uniform_layers
from finllm_prune.training.logit_losses import kl, margin_mse, mse, set_kl
from finllm_prune.training.projection import Projection
from finllm_prune.training.teacher_logits import TEACHER_LOGITS, with_teacher_logits
from finllm_prune.training.teacher_states import TEACHER_ROW, KeptStates, states_bytes, with_teacher_states

_Blocks = Sequence[Tensor] | Mapping[int, Tensor]


@dataclass(frozen=True)
class Distillation:
    """``alpha * L + (1 - alpha) * task loss + hidden * H + relations * R``.

    L is ``T^2 * KL(teacher || student)`` for classes, and a squared error where there is one output (see ``logits``). Logits
    after Hinton et al. 2015 (https://arxiv.org/abs/1503.02531). H is the sum, over pairs of a student's and a
    teacher's layer, of ``hidden_error``; R is the sum, over the same pairs, of ``relation_divergence``. At 90 % sparsity
    the hidden states are what keeps movement pruning from collapsing.

    Args:
        teacher: ``dense``, the baseline of this run, or a local path or Hub id of another fine-tuned model, which may be
            wider and deeper; its tokenizer must be the model's.
        alpha: the weight of the teacher's logits against the labels, 0..1.
        temperature: softens both distributions of ``kl``; above 0.
        logits: how logits are compared: ``kl``, ``mse`` or ``margin_mse`` (see ``logit_losses``). ``auto`` takes ``kl`` for
            classes (of label sets, between the two sides of each label), ``margin_mse`` for the lists of a reranker, and
            ``mse`` for other models with one output.
        hidden: the weight of the hidden states; 0 leaves them out. A teacher of another width is compared through a
            ``Projection`` that is trained along.
        layers: ``uniform`` pairs each layer of the student with the teacher's at the same relative height (its own, where
            both have the same depth). ``dynamic`` is the matching of CoFi (Xia et al. 2022,
            https://arxiv.org/abs/2204.00408): every third layer of these, from the last one down, is paired in each batch
            with the layer of the student that is nearest to it, and a lower one with a lower one. CoFi goes greedily from
            the top; here the pairs of the smallest sum are taken.
        relations: the weight of the relations between tokens; it needs no projection. 0 leaves them out.
        dropout: in all dropout layers of the student, 0 to below 1; None leaves what its config says. Who imitates a teacher
            is held by it, and in a short run learns more without the noise.
        cache: let the teacher run over the training rows once, and keep on disk what the student is compared with: logits,
            and hidden states in bfloat16 (two bytes for each token, compared layer and unit of width; see ``plan``). Else
            it runs in every step, and takes nearly half of one where the student has become small.
    """

    teacher: str = "dense"
    alpha: float = 0.9
    temperature: float = 2.0
    logits: Literal["auto", "kl", "mse", "margin_mse"] = "auto"
    hidden: float = 10.0
    layers: Literal["uniform", "dynamic"] = "uniform"
    relations: float = 0.0
    dropout: float | None = None
    cache: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.temperature <= 0 or self.hidden < 0 or self.relations < 0:
            raise InputError(
                "distillation: alpha must lie in 0..1, temperature above 0, and hidden and relations must not be negative"
            )
        refuse_unless_part(self.dropout, "distillation.dropout")
        if self.layers == "dynamic" and self.hidden == 0:
            raise InputError(
                "distillation.layers: dynamic matches layers by their hidden states; set hidden above 0, or layers: uniform"
            )

    @property
    def compares_layers(self) -> bool:
        """Whether the loss needs hidden states of student and teacher."""
        return self.hidden > 0 or self.relations > 0

    def compared(self, layers: Sequence[int]) -> list[int]:
        """Of the teacher's blocks that stand at the height of each of the student's, those that are compared, in order."""
        return list(layers if self.layers == "uniform" else layers[::-3][::-1])

    def kept_bytes(
        self, rows: datasets.Dataset, own: PreTrainedConfig, teacher: PreTrainedConfig, kept: Sequence[int] | None
    ) -> int:
        """What the hidden states that ``cache`` keeps take on disk; 0 where it keeps none. Logits are little beside them.

        Args:
            rows: tokenized, for training.
            own, teacher: configs of the student, before it loses blocks, and of the teacher.
            kept: the blocks that the student keeps; None for all.
        """
        if not self.cache or not self.compares_layers:
            return 0
        depth, height = (find_architecture(each.model_type).depth_of(each) for each in (own, teacher))
        return states_bytes(
            rows, self.compared(uniform_layers(kept or range(depth), depth, height)), teacher.hidden_size
        )


def drop_out(model: torch.nn.Module, part: float | None) -> None:
    """Set all dropout layers, unless it is None; the config keeps the model's own, for whoever trains it next."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and part is not None:
            module.p = part


def refuse_unless_part(dropout: float | None, key: str) -> None:
    """Raises InputError where ``key`` is no part that can be dropped."""
    if dropout is not None and not 0 <= dropout < 1:
        raise InputError(f"{key}: a part from 0 to below 1 is dropped, not {dropout:g}")


class Teacher:
    """A dense model that a student is compared with.

    Args:
        model: the fine-tuned dense model; put into eval mode.
        settings: the weights of the parts.
        layers: for each block of the student, the block of the teacher that it imitates; see ``uniform_layers``.
        width: of the student's hidden states; None says that it is the teacher's.

    Attributes:
        model: None where its answers are kept.
        compares_layers: whether its loss needs hidden states.
        projection: from the student's width to the teacher's; None where both are equal or nothing needs it. Whoever
            trains the student trains its parameters too, as PruningTrainer does.
        states: the hidden states of the training rows, where they are kept; None lets the model compute them.
    """

    def __init__(self, model: PreTrainedModel, settings: Distillation, layers: Sequence[int], width: int | None = None):
        self.model: PreTrainedModel | None = model.eval().requires_grad_(False)
        self.settings = settings
        self.layers = list(layers)
        self.states: KeptStates | None = None
        self.outputs = model.config.num_labels
        self.compares_layers = settings.compares_layers
        self.of_sets = model.config.problem_type == "multi_label_classification"
        own = model.config.hidden_size
        widths_differ = settings.hidden > 0 and width not in (None, own)
        self.projection = Projection(width, own) if widths_differ and width is not None else None

    @classmethod
    def of(
        cls, model: PreTrainedModel, settings: Distillation, student: PreTrainedModel, kept: Sequence[int] | None, depth: int
    ) -> "Teacher":  # fmt: skip
        """The teacher of a student that had ``depth`` blocks and has these left (None: all), each imitating at its height."""
        height = find_architecture(model.config.model_type).depth_of(model.config)
        layers = uniform_layers(kept or range(depth), depth, height)
        return cls(model, settings, layers, getattr(student.config, "hidden_size", None))

    def to(self, device: torch.device) -> None:
        """Move the model and the projection."""
        if self.model is not None:
            torch.nn.Module.to(self.model, device=device)
        if self.projection is not None:
            self.projection.to(device)

    def keep_answers(self, rows: datasets.Dataset, collator: DataCollator, folder: Path) -> datasets.Dataset:
        """The rows with what stands for the model, which runs over them once, unless an earlier process did it, and is let go.

        Args:
            rows, collator, folder: as of ``with_teacher_logits``.
        """
        assert self.model is not None
        if self.compares_layers:
            blocks = self.settings.compared(self.layers)
            rows, self.states = with_teacher_states(self.model, rows, collator, folder, blocks)
        else:
            rows = with_teacher_logits(self.model, rows, collator, folder)
        self.model = None
        return rows

    def loss(self, outputs: dict[str, Any], inputs: dict[str, Tensor], gather: Gather | None = None) -> Tensor:
        """The whole training loss.

        Args:
            outputs: of the student: ``loss`` (of the task), ``logits`` (batch, classes), and ``hidden_states`` (a tuple
                of (batch, tokens, width), embeddings first) if ``settings.compares_layers``.
            inputs: the batch, on the student's device, labels included. If it carries ``teacher_logits`` (batch,
                classes), they and ``states`` stand for the teacher, which does not run.
            gather: what made the student's logits of those of several sequences a row, or of each token; of a language model's
                completions the rows of both models' logits are tokens.
        """
        settings, logits = self.settings, outputs["logits"]
        self.to(logits.device)
        target = self._target(inputs, gather)
        distance = self._distance(logits, target["logits"], inputs.get("labels"))
        loss: Tensor = settings.alpha * distance + (1.0 - settings.alpha) * outputs["loss"]
        if settings.compares_layers:
            loss = loss + self._layers(outputs["hidden_states"][1:], target["blocks"], real_tokens(inputs))
        return loss

    def _distance(self, student: Tensor, teacher: Tensor, labels: Tensor | None) -> Tensor:
        """Of the logits, by ``settings.logits``."""
        one = self.outputs == 1
        is_list = one and labels is not None and labels.ndim == 2
        kind = self.settings.logits
        if kind == "auto":
            kind = "margin_mse" if is_list else "mse" if one else "kl"
        if kind == "kl" and self.of_sets:
            return set_kl(student, teacher, self.settings.temperature)
        if kind == "kl" and not one:
            return kl(student, teacher, self.settings.temperature)
        if kind == "margin_mse" and is_list and labels is not None:
            return margin_mse(student, teacher, labels)
        if kind == "mse":
            return mse(student, teacher, labels if is_list else None)
        raise InputError(
            f"distillation.logits: {kind} compares {'classes' if kind == 'kl' else 'the passages of a query'}, and there are "
            "none; use auto"
        )

    def _target(self, inputs: dict[str, Tensor], gather: Gather | None) -> dict[str, Any]:
        """``logits``, and the hidden states behind the ``blocks`` that are compared."""
        if self.model is None or (TEACHER_LOGITS in inputs and not self.compares_layers):
            blocks = {} if self.states is None else self.states.of(inputs[TEACHER_ROW], real_tokens(inputs))
            return {"logits": inputs[TEACHER_LOGITS], "blocks": blocks}
        with torch.no_grad():
            outputs = answer(self.model, inputs, gather, output_hidden_states=self.compares_layers)
        return {"logits": outputs["logits"], "blocks": outputs["hidden_states"][1:] if self.compares_layers else {}}

    def _layers(self, student: Sequence[Tensor], teacher: _Blocks, mask: Tensor) -> Tensor:
        hidden = relations = torch.zeros((), device=mask.device)
        for own, other in self._pairs(student, teacher, mask):
            if self.settings.hidden > 0:
                hidden = hidden + hidden_error(self._project(student[own]), teacher[other], mask)
            if self.settings.relations > 0:
                relations = relations + relation_divergence(student[own], teacher[other], mask)
        return self.settings.hidden * hidden + self.settings.relations * relations

    def _pairs(self, student: Sequence[Tensor], teacher: _Blocks, mask: Tensor) -> list[tuple[int, int]]:
        """(Block of the student, block of the teacher) that are compared."""
        if self.settings.layers == "uniform":
            return list(enumerate(self.layers))
        others = self.settings.compared(self.layers)
        with torch.no_grad():
            projected = [self._project(states) for states in student]
            errors = [hidden_error(own, teacher[other], mask) for other in others for own in projected]
        return list(zip(ordered_matches(torch.stack(errors).view(len(others), -1)), others, strict=True))

    def _project(self, states: Tensor) -> Tensor:
        return states if self.projection is None else self.projection(states)
