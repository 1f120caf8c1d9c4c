"""What all methods share: data, batches, steps, and the dense model of a seed that each starts from and is taught by."""

import shutil
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from bench.cells import Cell, claimed, digest, what_is_on
from bench.methods import METHODS, Method
from finllm_prune.prepare import Prepared, prepare, training_arguments
from finllm_prune.recipe import Recipe, parse
from finllm_prune.staging import staged
from finllm_prune.training import PruningTrainer

_BATCH = 32
_NOT_USED = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]


@dataclass(frozen=True)
class Protocol:
    """The conditions of a benchmark; see ``bench_methods.py --help`` for the fields."""

    data: Path
    model: str
    rows: int
    epochs: float
    dense_epochs: float
    dense_learning_rate: float
    out: Path
    progress: bool = False
    bf16: bool = False

    def cell(self, name: str, sparsity: float, seed: int, learning_rate: float) -> Cell:
        """A cell of the grid with all its settings, defaults filled in. Raises InputError for a wrong recipe."""
        method = METHODS[name]
        plan = self.recipe(method, sparsity, seed, learning_rate, self.out).resolved
        own: dict[str, Any] = {"distillation": plan["distillation"], "training": method.recipe.get("training", {})}
        own["unlabelled"] = method.unlabelled
        if "pruning" in method.recipe:
            own["pruning"] = plan["pruning"] | {
                "rules": [rule | {"sparsity": None} for rule in plan["pruning"]["rules"]]
            }
        if plan["recovery"] is not None:
            own["recovery"] = plan["recovery"]
        if method.peer:
            own["peer"] = repr(method.peer(0.0))
        return Cell(name, sparsity, seed, learning_rate, what_is_on({"protocol": self.settings, "method": own}))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the results of all cells; the data by their content, wherever they lie."""
        plan = self.recipe(Method(), 0.0, 0, 0.0, self.out)
        data = plan.task.load().fingerprint()
        return {
            "model": plan.resolved["model"],
            "task": plan.resolved["task"] | {"dataset": data},
            "training": {k: v for k, v in plan.resolved["training"].items() if k not in ("seed", "learning_rate")},
            "dense": {"num_train_epochs": self.dense_epochs, "learning_rate": self.dense_learning_rate},
        }

    def recipe(
        self, method: Method, sparsity: float, seed: int, learning_rate: float, output: Path, dense: Path | None = None
    ) -> Recipe:
        """The recipe of a cell; without ``dense``, a saved model, that of the dense model itself."""
        given = method.recipe.get("pruning", {})
        if "target" in given:  # what uniform cuts of that sparsity would leave, shared out as the method likes
            given = given | {"target": {**given["target"], "flops": 1.0 - sparsity}}
        elif "rules" in given:
            given = given | {"rules": [{**rule, "sparsity": sparsity} for rule in given["rules"]]}
        training = {
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": _BATCH,
            "warmup_steps": 0.06,
            "weight_decay": 0.01,
            "train_sampling_strategy": "group_by_length",
        }
        if self.bf16:
            training |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
        training |= method.recipe.get("training", {})
        changes = method.recipe
        task = {"name": "sentiment", "dataset": str(self.data), "max_length": 64, "train_rows": self.rows}
        if method.unlabelled:  # then an epoch is longer, but there are as many steps
            task |= {"unlabelled": str(self.data)}
            training |= {"max_steps": self._steps(training)}
            if recovery := changes.get("recovery"):
                changes = changes | {"recovery": recovery | {"max_steps": self._steps(recovery)}}
        # The teacher of a seed is the same for all of its cells, so it runs once.
        distillation = method.recipe.get("distillation", {})
        if distillation is not None:
            distillation = {"cache": True} | distillation
        return parse(
            {
                "model": self.model,
                "task": task,
                **changes,
                "distillation": distillation,
                "pruning": {"rules": _NOT_USED, **given},
                "training": training | {"seed": seed, "learning_rate": learning_rate},
                "dense": {"checkpoint": str(dense)} if dense else {},
                "export": ["masked"],
                "output": str(output),
            }
        )

    def _steps(self, arguments: dict[str, Any]) -> int:
        """Of so many epochs over the rows with labels."""
        epochs: float = arguments["num_train_epochs"]
        return ceil(ceil(self.rows / _BATCH) * epochs)

    def dense_model(self, seed: int) -> Path:
        """The folder of a seed's dense model, which is trained by whoever needs it first."""
        fixed = self.settings
        name = f"seed{seed}-{digest([fixed['model'], fixed['task'], fixed['training'] | fixed['dense']])}"
        folder = self.out / "dense" / name
        with claimed(self.out, f"dense-{name}", wait=True):
            if not folder.is_dir():
                plan = self.recipe(Method(), 0.0, seed, self.dense_learning_rate, self.out / "work" / f"dense-{name}")
                ready = prepare(plan, resume=False, overwrite=True)
                self.train(ready, ready.model, {"num_train_epochs": self.dense_epochs})
                with staged(folder) as partial:
                    ready.model.save_pretrained(partial)
                    ready.tokenizer.save_pretrained(partial)
                shutil.rmtree(ready.work)
        return folder

    def train(self, ready: Prepared, model: nn.Module, changes: dict[str, Any], **parts: Any) -> PruningTrainer:
        """Fine-tune on the protocol's rows."""
        trainer = PruningTrainer(
            model, self._arguments(ready, changes), processing_class=ready.tokenizer,
            data_collator=ready.recipe.task.collator(ready.tokenizer), **({"train_dataset": ready.tokens["train"]} | parts),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.go_on()
        return trainer

    def _arguments(self, ready: Prepared, changes: dict[str, Any]) -> TrainingArguments:
        quiet = {"disable_tqdm": not self.progress, "save_strategy": "no", "report_to": "none"}
        return training_arguments(ready.recipe, ready.work, "bench", quiet | changes)
