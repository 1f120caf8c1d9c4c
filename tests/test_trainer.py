"""The Trainer: exact resume, the loss scale, the best checkpoint, distillation, autocast."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.inference import logits_of
from finllm_prune.pruning import (
    Block,
    Constant,
    Criterion,
    Cubic,
    Global,
    Magnitude,
    Movement,
    Neuron,
    Pruner,
    Rule,
    SoftMovement,
)
from finllm_prune.training import Distillation, PruningTrainer, Teacher
from finllm_prune.training.trainer import STATE_FILE, complete_checkpoint
from tests.conftest import logits, tiny_model
from tests.pruning.runs import make_batches, make_pruner, make_rule, train

RULES = {
    "neuron": [Rule("mlp", 0.5, structure=Neuron())],
    "unstructured": [Rule("encoder", 0.75, budget=Global())],
    "block": [
        Rule("attention", 0.5, structure=Block(8, 8)),
        Rule("mlp", 0.5, structure=Neuron(), criterion=SoftMovement()),
    ],
}


def rows(n: int = 96, length: int = 12) -> datasets.Dataset:
    ids = torch.randint(5, 300, (n, length), generator=torch.Generator().manual_seed(1))
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    return datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def trainer(
    folder: Path, rules: list[Rule] | None, *, model: PreTrainedModel | None = None, teacher: Teacher | None = None,
    data: datasets.Dataset | None = None, callbacks: list[TrainerCallback] | None = None, parts: dict[str, Any] | None = None,
    **arguments: Any,
) -> PruningTrainer:  # fmt: skip
    model = model or tiny_model()
    defaults = {
        "max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.1, "save_strategy": "no",
        "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "dataloader_pin_memory": False, "seed": 5,
    }  # fmt: skip
    pruner = Pruner(find_family("bert").groups(model, rules), Cubic(0.1, 0.7, 0.9)) if rules else None
    return PruningTrainer(
        model, TrainingArguments(str(folder), **(defaults | arguments)), pruner=pruner, teacher=teacher,
        train_dataset=data or rows(), callbacks=callbacks, **(parts or {}),
    )  # fmt: skip


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", RULES)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(tmp_path: Path, kind: str) -> None:
    whole = trainer(tmp_path / "whole", RULES[kind], save_strategy="steps", save_steps=1, save_total_limit=20)
    whole.train()
    for step in (1, 4, 8, 11):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = trainer(tmp_path / "resumed", RULES[kind], resume_from_checkpoint=checkpoint)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.pruner is not None
        assert whole.pruner is not None
        assert resumed.pruner.mask_hash() == whole.pruner.mask_hash()
        assert_same(weights(resumed.model), weights(whole.model))


def test_rows_are_evaluated_in_their_order_whatever_the_batches_of_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = rows(40)
    columns = {name: [row[: 3 + i % 7] for i, row in enumerate(data[name])] for name in ("input_ids", "attention_mask")}
    data = datasets.Dataset.from_dict(columns | {"labels": data["labels"]})
    run = trainer(
        tmp_path, None, data=data, train_sampling_strategy="group_by_length",
        parts={"data_collator": DataCollatorWithPadding(tokenizer)},
    )  # fmt: skip
    found = run.predict(data)
    assert found.label_ids.tolist() == data["labels"][:]
    torch.testing.assert_close(
        torch.as_tensor(found.predictions), logits_of(run.model, data, DataCollatorWithPadding(tokenizer)),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_a_checkpoint_in_mid_run_is_a_plain_model_with_exact_zeros(tmp_path: Path) -> None:
    run = trainer(tmp_path, RULES["neuron"], save_strategy="steps", save_steps=6)
    run.train()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    masks = {
        k.removesuffix("/mask"): v for k, v in load_file(tmp_path / "checkpoint-6" / STATE_FILE).items() if "/mask" in k
    }
    assert masks
    for block in range(2):
        kept = masks[f"bert.encoder.layer.{block}.mlp"]
        assert 0 < int((~kept).sum()) < 64
        layer = loaded.bert.encoder.layer[block]
        for tensor in (layer.intermediate.dense.weight[~kept], layer.intermediate.dense.bias[~kept]):
            assert not tensor.any()
        assert not layer.output.dense.weight[:, ~kept].any()


def test_a_checkpoint_without_its_pruning_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, RULES["neuron"], save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-8" / STATE_FILE).unlink()
    again = trainer(tmp_path, RULES["neuron"])
    with pytest.raises(InputError, match=r"checkpoint-8: there is no pruner\.safetensors"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert complete_checkpoint(str(tmp_path), pruned=True) == str(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / STATE_FILE).unlink()
    assert complete_checkpoint(str(tmp_path), pruned=True) == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("kind", ["neuron", "unstructured"])
def test_trap_6_accumulation_of_4_times_8_is_a_batch_of_32(tmp_path: Path, kind: str) -> None:
    """Without ``accepts_loss_kwargs = False`` the accumulated gradient would be four times too large."""
    at_once = trainer(tmp_path / "a", RULES[kind], per_device_train_batch_size=32, optim="sgd", max_grad_norm=0.1)
    at_once.train()
    in_parts = trainer(tmp_path / "b", RULES[kind], gradient_accumulation_steps=4, optim="sgd", max_grad_norm=0.1)
    in_parts.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (at_once, in_parts)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "grad_norm" in entry] for t in (at_once, in_parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert_same(weights(at_once.model), weights(in_parts.model), 1e-5)


def test_trap_8_only_checkpoints_with_the_final_masks_compete_for_the_best(tmp_path: Path) -> None:
    """The metric falls with every evaluation, so the first, dense checkpoint would win an open contest."""
    calls = []

    def metric(_: Any) -> dict[str, float]:
        calls.append(1)
        return {"falling": -float(len(calls))}

    run = trainer(
        tmp_path, RULES["neuron"], save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="falling", greater_is_better=True, save_total_limit=2,
        parts={"eval_dataset": rows(16), "compute_metrics": metric},
    )  # fmt: skip
    run.train()
    freeze = next(step for step in range(1, 13) if step / 12 >= 0.9)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{freeze}")
    assert run.pruner is not None
    assert run.pruner.sparsity() == 0.5
    kept = run.pruner.masks()["bert.encoder.layer.0.mlp"]
    assert not run.model.bert.encoder.layer[0].intermediate.dense.weight[~kept].any()
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{freeze}")
    assert_same(weights(best), weights(run.model))


def test_pruned_weights_are_zero_after_every_step_and_the_log_says_how_many(tmp_path: Path) -> None:
    class Watch(TrainerCallback):
        seen: list[float] = []  # noqa: RUF012

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            linears = find_family("bert").linears(kwargs["model"]).values()
            self.seen.append(sum(int((x.weight == 0).sum()) for x in linears) / sum(x.weight.numel() for x in linears))

    watch = Watch()
    run = trainer(tmp_path, RULES["unstructured"], callbacks=[watch])
    run.train()
    logged = [entry["sparsity"] for entry in run.state.log_history if "sparsity" in entry]
    assert len(logged) == len(watch.seen) == 12
    assert watch.seen == pytest.approx(logged, abs=1e-4)
    assert watch.seen[0] == 0.0
    assert watch.seen[-1] == pytest.approx(0.75, abs=1e-4)


def test_bf16_autocast_trains_and_prunes_with_fp32_weights(tmp_path: Path) -> None:
    run = trainer(tmp_path, RULES["neuron"], bf16=True)
    run.go_on()
    assert run.pruner is not None
    assert run.pruner.sparsity() == 0.5
    assert run.model.dtype == torch.float32
    run.model.save_pretrained(tmp_path / "saved")
    reloaded = type(run.model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(reloaded), logits(run.model)), "what was trained is no longer under autocast"
    assert all(value.isfinite().all() for value in weights(run.model).values())


@pytest.mark.parametrize("kind", ["neuron", "unstructured"])
def test_gradient_checkpointing_and_fused_adamw_end_with_the_same_weights(tmp_path: Path, kind: str) -> None:
    plain = trainer(tmp_path, RULES[kind], optim="adamw_torch")
    plain.train()
    checkpointing = tiny_model()
    # Its name in transformers 5.23, and before.
    getattr(checkpointing, "activation_checkpointing_enable", checkpointing.gradient_checkpointing_enable)()
    for how in ({"model": checkpointing, "optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}):
        other = trainer(tmp_path, RULES[kind], **how)
        other.train()
        assert other.pruner is not None
        assert plain.pruner is not None
        assert other.pruner.mask_hash() == plain.pruner.mask_hash()
        assert_same(weights(other.model), weights(plain.model), 1e-6)


@pytest.mark.parametrize("kind", ["neuron", "unstructured"])
def test_weights_in_bf16_stay_so_and_are_pruned(tmp_path: Path, kind: str) -> None:
    run = trainer(tmp_path, RULES[kind], model=tiny_model().to(torch.bfloat16), save_strategy="steps", save_steps=6)
    run.train()
    assert run.pruner is not None
    assert run.pruner.sparsity() == pytest.approx(0.5 if kind == "neuron" else 0.75, abs=1e-4)
    assert run.pruner.holds()
    assert {value.dtype for value in weights(run.model).values() if value.is_floating_point()} == {torch.bfloat16}
    kept = load_file(tmp_path / "checkpoint-6" / STATE_FILE)
    assert {tensor.dtype for key, tensor in kept.items() if key.endswith("/parked")} == {torch.bfloat16}
    assert {tensor.dtype for key, tensor in kept.items() if key.endswith("/scores")} == {torch.float32}


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_adam_with_moments_of_8_bits_prunes(tmp_path: Path) -> None:
    model = tiny_model(hidden=64, intermediate_size=256)  # smaller matrices than 4,096 weights keep moments in fp32
    run = trainer(tmp_path, RULES["unstructured"], model=model, optim="adamw_bnb_8bit")
    run.train()
    assert run.pruner is not None
    assert run.optimizer is not None
    assert {state["state1"].dtype for state in run.optimizer.state.values()} == {torch.uint8, torch.float32}
    assert run.pruner.holds()
    assert run.pruner.sparsity() == pytest.approx(0.75, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("structure", ["unstructured", "neuron"])
def test_a_compiled_model_is_compiled_once(structure: str) -> None:
    """Masks come and go in the weights, of which torch.compile knows the shapes alone."""
    batches, found = make_batches(10), []
    for compiled in (False, True):
        model = tiny_model()
        model.config.problem_type = "single_label_classification"  # the first forward would find it, and compile anew
        pruner = make_pruner(model, make_rule(structure))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            run = torch.compile(model, backend="aot_eager") if compiled else model
            train(run, pruner, optimizer, batches)
        assert pruner.sparsity() == 0.5
        found.append((pruner.mask_hash(), weights(model)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1], 1e-6)


@pytest.mark.parametrize("criterion", [Magnitude(), Movement()])
def test_one_shot_prunes_once_and_recovers(tmp_path: Path, criterion: Criterion) -> None:
    model = tiny_model()
    groups = find_family("bert").groups(model, [Rule("mlp", 0.5, structure=Neuron(), criterion=criterion)])
    run = trainer(tmp_path, None, model=model)
    run = PruningTrainer(
        model, run.args, pruner=Pruner(groups, Constant(begin=0.2, end=0.25, freeze=0.3)), train_dataset=rows()
    )
    run.train()
    logged = [entry["sparsity"] for entry in run.state.log_history if "sparsity" in entry]
    assert set(logged) == {0.0, 0.5}
    assert logged == sorted(logged)


def test_the_distillation_loss_is_its_formula() -> None:
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    ids = torch.randint(5, 300, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}
    outputs = student(**inputs, output_hidden_states=True)
    settings = Distillation(alpha=0.7, temperature=3.0, hidden=0.5)
    got = Teacher(teacher, settings, [0, 1]).loss(outputs, inputs)

    target = teacher.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    p, q = (F.softmax(logits / 3.0, -1) for logits in (target.logits, outputs.logits))
    divergence = (p * (p.log() - q.log())).sum(-1).mean()
    texts = [
        F.mse_loss(outputs.hidden_states[i][row, :length], target.hidden_states[i][row, :length])
        for i in (1, 2)
        for row, length in enumerate(mask.sum(1).tolist())
    ]
    layers = sum(texts) / len(mask)
    expected = 0.7 * 9.0 * divergence + 0.3 * F.cross_entropy(outputs.logits, inputs["labels"]) + 0.5 * layers
    torch.testing.assert_close(got, expected)


def test_a_student_of_fewer_layers_imitates_the_layers_that_it_kept(tmp_path: Path) -> None:
    student, teacher = tiny_model(layers=4), tiny_model(layers=4)
    find_family("bert").keep_layers(student, [1, 3])
    run = trainer(tmp_path, None, model=student, teacher=Teacher(teacher, Distillation(), [1, 3]))
    run.train()
    assert student.config.num_hidden_layers == 2
    student.save_pretrained(tmp_path / "saved")
    assert_same(weights(AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")), weights(student))


def test_the_teacher_is_not_trained(tmp_path: Path) -> None:
    teacher = tiny_model(seed=3)
    before = weights(teacher)
    trainer(tmp_path, RULES["neuron"], teacher=Teacher(teacher, Distillation(), [0, 1])).train()
    assert_same(before, weights(teacher))


class Poison(TrainerCallback):
    """Makes one gradient of a step infinite or NaN, and keeps the weights from before and after the step."""

    def __init__(self, name: str, value: float, step: int):
        self.name, self.value, self.step = name, value, step
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step:
            kwargs["model"].get_parameter(self.name).grad.view(-1)[7] = self.value

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in (self.step - 1, self.step):
            self.weights.append(weights(kwargs["model"]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.weight", "classifier.weight"])
@pytest.mark.parametrize("step", [10, 11])
def test_13_a_step_with_an_infinite_gradient_is_skipped_without_a_loss_scaler_too_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: float, step: int
) -> None:
    """Before and after the masks are frozen; in what is cut, and elsewhere."""
    poison = Poison(name, value, step)
    run = trainer(tmp_path, RULES["unstructured"], callbacks=[poison])
    run.train()
    assert run.pruner is not None
    assert int(run.pruner.skipped) == 1
    assert_same(*poison.weights)
    assert all(bool(value.isfinite().all()) for value in weights(run.model).values())
    assert run.pruner.holds()
    assert caplog.messages.count(
        f"Step {step} is skipped: a gradient is infinite or NaN. If this comes again, lower training.learning_rate."
    ) == 1  # fmt: skip
