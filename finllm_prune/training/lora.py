"""LoRA while pruning: only adapters and the task's head train, beside frozen weights (Hu et al. 2021, by peft)."""

import functools
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finllm_prune.errors import InputError, optional
from finllm_prune.pruning import L0, Adapter, Frozen, Gradient, Group, Pruner, Rule, ScoreMovement, SecondOrder, attach


@dataclass(frozen=True)
class Lora:
    """The adapters, in peft's own names, and where criteria take their gradients from.

    Args:
        r: the rank.
        lora_alpha: an adapter's product is scaled by ``lora_alpha / r``, with ``use_rslora`` by ``lora_alpha / sqrt(r)``.
        lora_dropout: on the inputs of the adapters.
        target_modules: the linear layers that get one: "all-linear", a pattern of module paths, or the ends of their names.
        gradients: of the frozen weights: "lora" estimates them from those of the adapters (``finllm_prune.pruning.adapters``);
            "exact" takes them, which costs the backward of full fine-tuning, and the memory of one matrix's gradient.
        base_dtype: of the frozen weights while the adapters train; the merged model is fp32.
        keep_adapter: whether the pruned base and its adapter are also written apart, into ``lora/base`` and ``lora/adapter``.
    """

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    gradients: Literal["lora", "exact"] = "lora"
    base_dtype: Literal["float32", "bfloat16"] = "float32"
    keep_adapter: bool = False

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise InputError(
                "peft: r and lora_alpha must be at least 1 and lora_dropout a part below 1, not "
                f"{self.r}, {self.lora_alpha} and {self.lora_dropout}"
            )

    def callbacks(self, pruner: Pruner) -> list[TrainerCallback]:
        """What the training of a pruned model needs."""
        return [ExactGradients(pruner)] if self.gradients == "exact" else []


def adapt(model: PreTrainedModel, lora: Lora | None, seed: int, groups: Sequence[Group] = ()) -> Any:
    """Put fresh adapters beside a model's linear layers, and freeze all but these and the head; None changes nothing.

    The head of a causal language model is no task's, and mostly its embeddings: it is frozen like them.

    Args:
        groups: of a pruner of this model, which are told of their adapters.

    Returns:
        A ``peft.PeftModel``, which trains and is called like the model; or the model itself.

    Raises:
        InputError: peft is not installed, ``target_modules`` names nothing or the head of a language model, or gradients
            cannot be estimated.
    """
    if lora is None:
        return model
    causal = model.get_output_embeddings() is not None
    if causal and any(name in str(lora.target_modules) for name in ("lm_head", "embed_tokens")):
        raise InputError(
            "peft.target_modules: the head of a language model and its embeddings, mostly one matrix, stay as they are; leave "
            "them out, or use all-linear"
        )
    parts = {name: list(part.parameters()) for name, part in model.named_children()}
    heads = [name for name, held in parts.items() if held and name != model.base_model_prefix]
    config = _peft().LoraConfig(
        task_type="CAUSAL_LM" if causal else "SEQ_CLS", modules_to_save=None if causal else heads,
        target_modules=lora.target_modules, r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
    )  # fmt: skip
    model.name_or_path = ""  # else each checkpoint asks the Hub for a config
    for parameter in model.parameters():  # buffers stay: rotary frequencies that are rounded to bf16 are others
        parameter.data = parameter.data.to(getattr(torch, lora.base_dtype))
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers 5.23 has renamed
            torch.manual_seed(seed)  # the same adapters in a run that goes on after it was killed
            adapted = _peft().get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"peft.target_modules: {lora.target_modules} fits no linear layer of this model; use all-linear, or name its layers"
        ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    attach(groups, _adapters_of(adapted), estimated=lora.gradients == "lora")
    return adapted


def merge(adapted: Any) -> PreTrainedModel:
    """The plain model (fp32) with the products in its weights; a plain model as it is."""
    if isinstance(adapted, PreTrainedModel):
        return adapted
    nn.Module.to(adapted, dtype=torch.float32)
    model: PreTrainedModel = adapted.merge_and_unload()
    return model


def _adapters_of(adapted: nn.Module) -> dict[nn.Parameter, Adapter]:
    """Frozen weight -> what is added to it."""
    return {
        layer.base_layer.weight: Adapter(
            layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        )
        for layer in adapted.modules()
        if isinstance(layer, _peft().tuners.lora.Linear)
    }


def _peft() -> Any:
    return optional("peft", key="peft", extra="peft")


def refuse_beside_lora(rules: Iterable[Rule], lora: Lora, fp16: bool) -> None:
    """What asks more of frozen weights than their gradient, or of the gradient than is kept."""
    for i, rule in enumerate(rules):
        where, criterion = f"pruning.rules.{i}", rule.criterion
        if lora.keep_adapter and rule.structure.couples is None:
            raise InputError(
                f"{where}.structure: single weights stay zero only where adapter and base are merged; remove "
                "peft.keep_adapter, or cut neurons, heads or layers"
            )
        if isinstance(criterion, SecondOrder | L0 | ScoreMovement) or rule.regularizer is not None:
            raise InputError(
                f"{where}: second_order, l0, score_movement and regularizers change or freeze what peft does not train, or "
                "does; use movement, taylor, platon or magnitude, or remove peft"
            )
        if isinstance(criterion, Gradient) and lora.gradients == "exact":
            raise InputError(
                f"{where}.criterion: gradient sums |g| of whole batches, and exact gradients are consumed in parts; "
                "use taylor, or peft.gradients: lora"
            )
    if fp16 and lora.gradients == "exact":
        raise InputError(
            "peft.gradients: exact gradients are consumed before fp16 unscales them; set training.bf16 instead of fp16"
        )


class ExactGradients(TrainerCallback):
    """Gives frozen weights gradients until the masks freeze, one at a time: each is summed per unit and freed at once.

    It starts when the optimizer and DDP have taken what requires gradients, so that neither knows of these.
    """

    def __init__(self, pruner: Pruner):
        self.pruner = pruner
        self._hooks: list[RemovableHandle] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group, slot in self._slots():
            slot.parameter.requires_grad_(True)
            hook = functools.partial(_hear, group, slot)
            self._hooks.append(slot.parameter.register_post_accumulate_grad_hook(hook))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pruner.frozen:
            self._stop()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for group in self.pruner.groups if args.world_size > 1 else []:
            group.heard = None if group.heard is None else reduce(group.heard, "mean")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop()

    def _slots(self) -> Iterable[tuple[Group, Frozen]]:
        return ((group, slot) for group in self.pruner.groups for slot in group.slots if isinstance(slot, Frozen))

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for _, slot in self._slots() if self._hooks else []:
            slot.parameter.requires_grad_(False)
        self._hooks = []


def _hear(group: Group, slot: Frozen, _: Tensor) -> None:
    with torch.no_grad():
        slot.hear(group)
