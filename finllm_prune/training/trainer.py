"""A transformers.Trainer that prunes: `compute_loss`, `create_optimizer`, `log`, the sampler and callbacks, no copied loop."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import CPUOffloadPolicy, StateDictType
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints, unwrap_peft_model

from finllm_prune.errors import InputError
from finllm_prune.families import Family, find_architecture
from finllm_prune.inference import PARTS, answer, gather_of, length
from finllm_prune.pruning import Pruner, not_finite, split_mesh
from finllm_prune.staging import clear_when_full
from finllm_prune.training.batches import BucketSampler
from finllm_prune.training.beside import load_beside, save_beside
from finllm_prune.training.cosines import COSINES, Cosines
from finllm_prune.training.distillation import Teacher
from finllm_prune.training.projection import PROJECTION_FILE, ProjectionCallback
from finllm_prune.training.recorder import Recorder, Recording
from finllm_prune.training.recovery import Seam
from finllm_prune.training.sigterm import Sigterm
from finllm_prune.training.teacher_logits import TEACHER_LOGITS
from finllm_prune.training.teacher_states import TEACHER_ROW

TaskLoss = Callable[[Tensor, Tensor], Tensor]

logger = logging.getLogger(__name__)

STATE_FILE = "pruner.safetensors"
_KEPT = (TEACHER_LOGITS, TEACHER_ROW, COSINES)  # columns that no model takes


@runtime_checkable
class Smooth(Protocol):
    """A task's loss of rows with one class each."""

    def smoothed(self, part: float) -> TaskLoss:
        """The same with a part of each label shared by all classes."""
        ...


def smoothed(loss: TaskLoss | None, part: float, key: str = "training") -> TaskLoss | None:
    """The task's loss with ``label_smoothing_factor``; of a model's own loss the Trainer takes care.

    Raises:
        InputError: the loss knows no single class of a row whose label could be smoothed.
    """
    if loss is None or part == 0:
        return loss
    asked: object = loss
    if not isinstance(asked, Smooth):
        raise InputError(
            f"{key}.label_smoothing_factor: it goes with one class a row, not with the loss of this task (of scores, label "
            "sets, rankings or completions); set 0"
        )
    return asked.smoothed(part)


class PruningTrainer(Trainer):
    """Fine-tunes a plain model, prunes it between gradient and weight, and distils it from a teacher.

    Everything that ``transformers.Trainer`` takes is taken. The model stays plain: each checkpoint loads with
    ``from_pretrained``, and ``pruner.safetensors`` beside it makes ``train(resume_from_checkpoint=...)`` exact.

    Args:
        pruner: built on the same model; None fine-tunes without pruning.
        teacher: adds its loss to the task's; None trains on the labels alone.
        task_loss: (logits, labels) -> the mean over a batch's rows, in place of the model's own loss; None leaves it to the
            model. One that has a method ``smoothed`` goes with ``args.label_smoothing_factor``.
        cosines: take a part in the task's loss; the training rows have a column of them.
        recording: of the flight recorder, which is ``recorder`` then; None records nothing.
        description: what the progress bar is called.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, pruner: Pruner | None = None,
        teacher: Teacher | None = None, task_loss: TaskLoss | None = None,
        cosines: Cosines | None = None, recording: Recording | None = None, description: str = "train", **kwargs: Any,
    ):  # fmt: skip
        # The classification heads of transformers 5 average their loss over the batch, but the Trainer takes their
        # **kwargs as proof that they divide by num_items_in_batch: loss and gradient would come out too large by the
        # number of accumulation steps and of ranks (huggingface/transformers#47688).
        # A task's loss of a language model is scaled below as transformers scales the model's own.
        plain = unwrap_peft_model(model)
        plain.accepts_loss_kwargs = task_loss is not None and getattr(plain, "loss_type", None) == "ForCausalLM"
        if asks_for_fsdp(args):
            _wrap_blocks(model)
        super().__init__(model, args, **kwargs)
        self.pruner = pruner
        self.teacher = teacher
        self.task_loss = smoothed(task_loss, args.label_smoothing_factor)
        if task_loss is not None:
            self.label_smoother = None
        self.cosines = cosines
        self.recorder: Recorder | None = None
        if teacher is not None and self.compute_loss_func is not None:
            raise InputError(
                "compute_loss_func: it is normalised over all accumulated batches and the teacher's loss over one, so they "
                "cannot be added; train without a teacher, or give the model the loss"
            )
        if task_loss is not None and self.compute_loss_func is not None:
            raise InputError("compute_loss_func: it replaces the loss, as task_loss does; use one")
        if teacher is not None and teacher.projection is not None:
            if asks_for_fsdp(args):
                raise InputError(
                    "distillation.hidden: a teacher of another width needs a projection, which FSDP does not train; set "
                    "hidden: 0, or launch with DDP"
                )
            # Before the pruner's callback: that a checkpoint is complete is told by the pruner's file.
            self.add_callback(ProjectionCallback(teacher.projection))
        if pruner is not None:
            refuse_unsupported(args)
            if recording is not None:
                self.recorder = Recorder(pruner, recording)
                self.add_callback(self.recorder)
            self.add_callback(PruningCallback(pruner))
        self.add_callback(Sigterm(self.accelerator))
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(ProgressBar(description))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        teacher, cosines = (self.teacher, self.cosines) if model.training else (None, None)
        if teacher is None and cosines is None and self.task_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own = {key: value for key, value in inputs.items() if key not in _KEPT}
        options = {} if teacher is None else {"output_hidden_states": teacher.compares_layers}
        gather = gather_of(self.data_collator)
        if self.task_loss is not None:
            # The model is not asked for a loss of its own, which a base's problem_type may make of another kind.
            outputs = answer(model, own, gather, **options)
            loss = self.task_loss(outputs["logits"], inputs["labels"])
        else:
            assert PARTS not in inputs, "no model has a loss of its own for rows of several sequences"
            loss, outputs = super().compute_loss(model, own | options, True, num_items_in_batch)
        if cosines is not None:
            loss = cosines.loss(outputs["logits"], loss, inputs)
        if teacher is not None:
            loss = teacher.loss({**outputs, "loss": loss}, inputs, gather)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None and model.training:
            # All tokens that a step learns from count alike, in whatever batches and on whatever ranks they lie.
            ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            loss = loss * (len(outputs["logits"]) * ranks / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def go_on(self) -> None:
        """Train; with ``args.resume_from_checkpoint`` from there, which may be the end: then nothing is trained."""
        checkpoint = self.args.resume_from_checkpoint
        if checkpoint is None or not self.finished(Path(checkpoint)):
            self._refuse_other_engine(checkpoint)
            with clear_when_full(Path(self.args.output_dir or ".")):
                self.train(resume_from_checkpoint=checkpoint)
            for name in (
                "forward",
                "_original_forward",
            ):  # accelerate's autocast: what is evaluated next runs in the weights' dtype
                vars(self.model).pop(name, None)
            return
        # The Trainer itself would go on for a step where the end is not the end of an epoch.
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        assert self.model is not None
        self._load_plain(Path(best or checkpoint))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _refuse_other_engine(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        was_split = (Path(checkpoint) / f"{FSDP_MODEL_NAME}_0").is_dir()
        if was_split != asks_for_fsdp(self.args):
            raise InputError(
                f"--resume: {checkpoint} was written {'under' if was_split else 'without'} FSDP, so go on in the same way; "
                f"launch with recipes/accelerate/{'fsdp2' if was_split else 'ddp'}.yaml, by whatever number of processes"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's; with a Pruner, older checkpoints go later, when its file has made this one complete."""
        limit = self.args.save_total_limit
        self.args.save_total_limit = None if self.pruner is not None else limit
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit

    def _load_plain(self, checkpoint: Path) -> None:
        """The weights of a checkpoint, by whatever engine, into the model as it is before training."""
        assert self.model is not None
        if (checkpoint / f"{FSDP_MODEL_NAME}_0").is_dir():
            load({"model": self.model.state_dict()}, checkpoint_id=checkpoint / f"{FSDP_MODEL_NAME}_0")
        elif (checkpoint / "adapter_model.safetensors").is_file():
            self.model.load_adapter(str(checkpoint), "default", is_trainable=True)  # type: ignore[operator]
        else:
            load_model(self.model, checkpoint / "model.safetensors", device=str(self.args.device))

    def finished(self, checkpoint: Path) -> bool:
        """Whether a training ended with this checkpoint."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        frozen = self.pruner is not None and bool(load_file(checkpoint / STATE_FILE)["frozen"])
        ends_frozen = any(
            isinstance(part, Seam) and not part.recovery.of_its_own for part in self.callback_handler.callbacks
        )
        return state.global_step >= state.max_steps or (frozen and ends_frozen)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's, which trains the teacher's projection too."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.teacher is not None and self.teacher.projection is not None:
            self.teacher.to(self.args.device)
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            new = [parameter for parameter in self.teacher.projection.parameters() if id(parameter) not in held]
            if new:
                optimizer.add_param_group({"params": new, "weight_decay": 0.0})
        return optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Kept answers of teachers and what a collator gathers by reach the batch, though no model takes them."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *_KEPT, PARTS]  # type: ignore[assignment,misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """``train_sampling_strategy: group_by_length`` with the batches of an epoch in random order."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, datasets.Dataset):
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        lengths = [length(ids) for ids in rows["input_ids"]]
        batch_size = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return BucketSampler(lengths, batch_size, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        """Rows in their order, whatever ``train_sampling_strategy``: a judge knows its answers by it."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.pruner is not None and "loss" in logs:
            logs = {**logs, "sparsity": self.pruner.sparsity()} | (self.recorder.news() if self.recorder else {})
        super().log(logs, *args, **kwargs)


class PruningCallback(TrainerCallback):
    """The two steps of the Pruner at the Trainer's two events, and its state beside each checkpoint."""

    def __init__(self, pruner: Pruner):
        self.pruner = pruner

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if split_mesh(model) is not None:
            self.pruner.follow(model)
        if state.global_step > 0:
            self.pruner.load_state_dict(load_beside(args, state, STATE_FILE, model))
            if args.should_save:
                _drop_unfinished(Path(args.output_dir or "."), state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        skip = _overflow(optimizer)
        self.pruner.before_step((state.global_step + 1) / state.max_steps, skip)
        if not args.fp16 and bool(skip):  # else the loss scaler skips the step
            logger.warning(
                "Step %d is skipped: a gradient is infinite or NaN. If this comes again, lower training.learning_rate.",
                state.global_step + 1,
            )
            optimizer.zero_grad(set_to_none=True)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        was_frozen = self.pruner.frozen
        self.pruner.after_step()
        if self.pruner.frozen and not was_frozen:
            # Checkpoints from before are denser or have other masks: they do not compete for the best.
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_beside(args, state, STATE_FILE, self.pruner.state_dict, split_mesh(kwargs["model"]) is not None)
        if args.should_save:
            rotate_checkpoints(
                args.output_dir or ".", args.save_total_limit, state.best_model_checkpoint, use_mtime=True
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pruner.finish(replaced=args.load_best_model_at_end)


class ProgressBar(ProgressCallback):
    """One bar per training, with loss and sparsity in it instead of lines of dicts around it."""

    def __init__(self, description: str):
        super().__init__()
        self.description = description

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self._bar is not None:
            self._bar.set_description(self.description)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self._bar is not None and logs is not None and "loss" in logs:
            shown = {key: f"{float(logs[key]):.3f}" for key in ("loss", "sparsity") if key in logs}
            self._bar.set_postfix(shown)

    @property
    def _bar(self) -> Any:
        return self.training_bar


def complete_checkpoint(output_dir: str | None, pruned: bool, projected: bool = False) -> str | None:
    """The newest checkpoint that was written to its end, or None; one that a kill cut short is passed over."""
    last_file = STATE_FILE if pruned else PROJECTION_FILE if projected else "trainer_state.json"
    folders = [path.parent for path in Path(output_dir or ".").glob(f"checkpoint-*/{last_file}")]
    return str(max(folders, key=_step_of)) if folders else None


def _drop_unfinished(folder: Path, step: int) -> None:
    """Checkpoints after the one that a run goes on from are not whole: they would count as the newest that are kept."""
    for checkpoint in folder.glob("checkpoint-*"):
        if _step_of(checkpoint) > step and not (checkpoint / STATE_FILE).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether the arguments, or the launcher, ask for FSDP."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def _wrap_blocks(model: nn.Module) -> None:
    """Let FSDP split a model by its blocks: transformers names the embeddings too, which accelerate then splits twice."""
    architecture = find_architecture(model.config.model_type)  # type: ignore[union-attr,arg-type]
    if isinstance(model, PreTrainedModel) and isinstance(architecture, Family):
        model._no_split_modules = {type(block).__name__ for block in architecture.layers(model)}


def refuse_unsupported(args: TrainingArguments) -> None:
    """Engines under which the Pruner cannot reach the parameters or their gradients."""
    kind = args.distributed_state.distributed_type if args.distributed_state is not None else DistributedType.NO
    if kind == DistributedType.DEEPSPEED or args.deepspeed:
        raise InputError(
            "training: pruning under DeepSpeed ZeRO is not supported, for it keeps weights and gradients to itself; launch "
            "with FSDP2 (recipes/accelerate/fsdp2.yaml) or DDP"
        )
    if args.n_gpu > 1:
        raise InputError(
            "training: several GPUs in one process (DataParallel) split the gradients; "
            "start one process per GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )
    if asks_for_fsdp(args):
        _refuse_fsdp_unless_split(args, kind)


def _refuse_fsdp_unless_split(args: TrainingArguments, kind: DistributedType) -> None:
    """FSDP2 with sharded checkpoints, on GPUs, where each rank reads the model and keeps its rows."""
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            "training: FSDP needs a GPU for each process (accelerate would train with DDP and say nothing); launch with "
            "recipes/accelerate/ddp.yaml instead"
        )
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    wrong = {
        "fsdp_version": plugin.fsdp_version != 2 and "2",
        "fsdp_state_dict_type": plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT and "SHARDED_STATE_DICT",
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy) and "false",
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading and "false",
    }
    for key, value in wrong.items():
        if value:
            raise InputError(
                f"training: pruning under FSDP needs {key}: {value}; set it in the file of accelerate launch, as in "
                "recipes/accelerate/fsdp2.yaml, or in training.fsdp_config"
            )


def _overflow(optimizer: torch.optim.Optimizer) -> Tensor:
    """1.0 where a gradient of what the optimizer trains is infinite or NaN: such a step is skipped."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return not_finite([parameter.grad for parameter in parameters if parameter.grad is not None])
