"""LoRA: adapters train beside frozen weights, and what is cut goes from both; the merged model is a plain one."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification, TrainerCallback, TrainerState, TrainingArguments

import finllm_prune.run
from finllm_prune.checkpoints import verify
from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.prepare import read
from finllm_prune.pruning import (
    NM,
    Adapter,
    Cubic,
    Frozen,
    Global,
    Head,
    Movement,
    Neuron,
    Pruner,
    Rule,
    Site,
    Slot,
    Taylor,
)
from finllm_prune.recipe import parse
from finllm_prune.training import Lora, PruningTrainer, adapt, merge
from finllm_prune.training.lora import ExactGradients
from finllm_prune.training.trainer import STATE_FILE
from tests import small
from tests.conftest import logits, tiny_model
from tests.test_trainer import rows

RULES = [Rule("mlp", 0.5, Neuron(), Taylor()), Rule("attention", 0.5, Head(), Movement())]
SINGLE = [Rule("attention", 0.5, NM(), Taylor(), Global()), Rule("mlp", 0.75, criterion=Taylor(), budget=Global())]
BATCH = {name: torch.tensor(column) for name, column in rows(8).to_dict().items()}


def adapted(model_type: str, lora: Lora, rules: list[Rule] = RULES) -> tuple[PeftModel, Pruner]:
    """Adapters that are no zeros, beside a tiny model."""
    model = tiny_model(model_type)
    pruner = Pruner(find_family(model_type).groups(model, rules), Cubic(0.1, 0.5, 0.8))
    peft_model = adapt(model, lora, 1, pruner.groups)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return peft_model, pruner


def trainer(folder: Path, model: PeftModel, pruner: Pruner, lora: Lora, **arguments: Any) -> PruningTrainer:
    defaults = {
        "max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1, "save_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "seed": 5,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **(defaults | arguments))
    return PruningTrainer(model, args, pruner=pruner, train_dataset=rows(), callbacks=lora.callbacks(pruner))


def cuts(pruner: Pruner) -> dict[str, Tensor]:
    """Name of a frozen parameter -> where it is cut."""
    return {
        slot.name: group.expand(~group.mask, slot).reshape(slot.parameter.shape)
        for group in pruner.groups
        for slot in group.slots
        if isinstance(slot, Frozen)
    }


def slots(pruner: Pruner, kind: type[Slot]) -> list[Any]:
    return [slot for group in pruner.groups for slot in group.slots if isinstance(slot, kind)]


def test_the_estimate_is_the_gradient_as_the_factors_see_it() -> None:
    """``s (G A^T A + B B^T G)``: where A and B are square and orthogonal, ``2 s G``."""
    generator = np.random.default_rng(0)
    scale, gradient = 0.5, generator.normal(size=(5, 5))
    rotations = [np.linalg.qr(generator.normal(size=(5, 5)))[0] for _ in range(2)]
    for a, b in ((generator.normal(size=(3, 5)), generator.normal(size=(5, 3))), rotations):
        factors = [nn.Parameter(torch.tensor(factor, dtype=torch.float32)) for factor in (a, b)]
        weight = nn.Parameter(torch.ones(5, 5), requires_grad=False)
        slot = Frozen(Slot("layer.weight", weight, Site("layer")), Adapter(*factors, scale), single=False)
        (torch.tensor(gradient) * (weight + scale * factors[1] @ factors[0])).sum().backward()
        expected = scale * (gradient @ a.T @ a + b @ b.T @ gradient)
        np.testing.assert_allclose(slot.effective_gradient.detach(), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(slot.effective, 1.0 + scale * b @ a, rtol=1e-5)
    np.testing.assert_allclose(expected, 2 * scale * gradient, rtol=1e-6)


@pytest.mark.parametrize(("model_type", "rules"), [("bert", RULES), ("qwen3", SINGLE)], ids=["heads", "single"])
def test_exact_gradients_are_those_of_the_merged_model_and_never_two_at_once(
    model_type: str, rules: list[Rule]
) -> None:
    model, pruner = adapted(model_type, Lora(r=4, gradients="exact"), rules)
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    of_plain = find_family(model_type).groups(plain, rules)
    whole = {slot.name: slot.weight.clone() for group in of_plain for slot in group.slots}
    if rules is SINGLE:  # what is cut is judged too, by what it was
        for group, other in zip(pruner.groups, of_plain, strict=True):
            group.set_mask(torch.rand(group.shape) > 0.5)
            group.park()
            other.set_mask(group.mask)
            other.zero()
        pruner._cover()
    callback, alive = ExactGradients(pruner), []
    weights = [slot.parameter for slot in slots(pruner, Frozen)]
    for weight in weights:
        weight.requires_grad_(True).register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(weight.grad is not None for weight in weights))
        )
    callback.on_train_begin(None, None, None)
    for part in (slice(0, 4), slice(4, 8)):  # accumulation
        for net in (model, plain):
            (net(**{name: column[part] for name, column in BATCH.items()}).loss / 2).backward()
    assert alive == [1] * (2 * len(weights))
    for group, other in zip(pruner.groups, of_plain, strict=True):
        reference = other.sum(lambda slot: slot.gradient * whole[slot.name])
        torch.testing.assert_close(group.heard, reference, rtol=1e-4, atol=1e-6)
    callback.on_train_end(None, None, None)
    assert not any(weight.requires_grad for weight in weights)


@pytest.mark.parametrize(("model_type", "gradients"), [("bert", "lora"), ("llama", "exact"), ("qwen3", "lora")])
def test_only_adapters_and_head_train_and_cut_units_are_gone_from_the_merged_model(
    tmp_path: Path, model_type: str, gradients: str
) -> None:
    lora = Lora(r=4, gradients=gradients)
    model, pruner = adapted(model_type, lora)
    run = trainer(tmp_path, model, pruner, lora)
    before = {slot.name: slot.parameter.clone() for slot in slots(pruner, Frozen)}
    run.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    moments = sum(state["exp_avg"].numel() for state in run.optimizer.state.values())
    assert moments == sum(model.get_parameter(name).numel() for name in trained) < 0.25 * model.num_parameters()
    assert pruner.sparsity() == 0.5
    cut = cuts(pruner)
    for slot in slots(pruner, Frozen):
        assert torch.equal(slot.parameter, before[slot.name].masked_fill(cut[slot.name], 0))
    said = logits(model)
    plain = merge(model)
    assert pruner.holds()
    torch.testing.assert_close(logits(plain), said, rtol=0, atol=1e-5)
    counts = [
        int((linear.weight == 0).sum()) / linear.weight.numel()
        for linear in find_family(model_type).linears(plain).values()
    ]
    assert counts == [0.5] * len(counts)


def test_what_adapters_learn_is_the_gradient_through_the_mask(tmp_path: Path) -> None:
    """Against autograd of a plain model whose weights are ``mask * (W + s B A)``."""
    lora = Lora(r=4)
    model, pruner = adapted("bert", lora)
    trainer(tmp_path, model, pruner, lora, max_steps=6).train()
    factors: dict[str, Tensor] = {
        name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora_" in name
    }
    model(**BATCH).loss.backward()
    for group in pruner.groups:
        group.clear_gradients()
    plain = copy.deepcopy(model).unload()
    weights = dict(plain.named_parameters())
    masks = cuts(pruner)
    for name in [
        name for name in weights if f"base_model.model.{name.removesuffix('weight')}lora_A.default.weight" in factors
    ]:
        a, b = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{part}.default.weight"] for part in "AB")
        cut = masks.get(name)
        weights[name] = (weights[name] + 8.0 * b @ a) * (1.0 if cut is None else ~cut)
    functional_call(plain, weights, kwargs=BATCH).loss.backward()
    assert len(factors) == 26
    for name, factor in factors.items():
        torch.testing.assert_close(model.get_parameter(name).grad, factor.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("gradients", ["lora", "exact"])
def test_single_weights_are_zeros_to_every_forward_and_stay_so_when_merged(tmp_path: Path, gradients: str) -> None:
    class Says(TrainerCallback):
        heard: Tensor
        sparsity = 0.0

        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            self.heard = logits(kwargs["model"])
            if state.global_step == 3:  # before the masks freeze
                masks = cuts(pruner)
                plain = copy.deepcopy(kwargs["model"]).merge_and_unload()
                for name, weight in plain.named_parameters():
                    if name in masks:
                        weight.data.masked_fill_(masks[name], 0)
                torch.testing.assert_close(self.heard, logits(plain), rtol=0, atol=1e-5)
                self.sparsity = pruner.sparsity()
            kwargs["model"].train()

    lora = Lora(r=4, gradients=gradients)
    model, pruner = adapted("llama", lora, SINGLE)
    run, says = trainer(tmp_path, model, pruner, lora), Says()
    run.add_callback(says)
    run.train()
    assert 0.1 < says.sparsity < pruner.sparsity() == pytest.approx(2 / 3, abs=0.01)
    plain = merge(model)
    assert not pruner.holds()
    pruner.finish()
    assert pruner.holds()
    torch.testing.assert_close(logits(plain), says.heard, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("gradients", "rules"), [("lora", RULES), ("exact", SINGLE)], ids=["lora", "exact"])
def test_a_resumed_run_is_exact_and_its_checkpoints_hold_no_frozen_weight(
    tmp_path: Path, gradients: str, rules: list[Rule]
) -> None:
    lora = Lora(r=4, gradients=gradients, lora_dropout=0.1)

    def trained(**arguments: Any) -> tuple[dict[str, Tensor], str]:
        model, pruner = adapted("llama", lora, rules)
        checkpoint = arguments.get("resume_from_checkpoint")
        trainer(tmp_path / "run", model, pruner, lora, **arguments).train(resume_from_checkpoint=checkpoint)
        return merge(model).state_dict(), pruner.mask_hash()

    weights, masks = trained(save_strategy="steps", save_steps=1)
    for step in (3, 9):  # before and after the masks freeze
        folder = tmp_path / "run" / f"checkpoint-{step}"
        again, same = trained(resume_from_checkpoint=str(folder))
        assert same == masks
        assert all(torch.equal(value, again[name]) for name, value in weights.items())
        kept = [load_file(folder / file) for file in ("adapter_model.safetensors", STATE_FILE)]
        assert not any(".lora_" not in name and "score" not in name for name in kept[0])
        assert not any(name.endswith("weight/parked") for name in kept[1])


def test_a_base_in_bf16_keeps_its_rotary_frequencies() -> None:
    before = dict(tiny_model("llama").named_buffers())
    merged = merge(adapt(tiny_model("llama"), Lora(r=4, base_dtype="bfloat16"), 1))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in merged.named_buffers())


@pytest.fixture
def data(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    small.few_resamples(monkeypatch)
    return {
        "model": str(tiny_folder("llama")), "peft": {"r": 4, "keep_adapter": True},
        "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
        "pruning": {
            "rules": [
                {"target": "mlp", "structure": "neuron", "sparsity": 0.5, "criterion": "taylor"},
                {"target": "attention", "structure": "head", "sparsity": 0.5},
            ]
        },
        "training": {
            "max_steps": 8, "per_device_train_batch_size": 6, "learning_rate": 2e-3, "use_cpu": True, "disable_tqdm": True,
            "seed": 3,
        },
        "export": ["masked", "compact"], "output": str(tmp_path / "out"),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft still asks for it
@pytest.mark.parametrize("changes", [{}, {"base_dtype": "bfloat16", "gradients": "exact"}], ids=["fp32", "bf16"])
def test_a_run_ends_in_plain_models_and_in_a_base_with_its_adapter(
    data: dict[str, Any], changes: dict[str, Any]
) -> None:
    data["training"]["bf16"] = bool(changes)
    recipe = parse(data | {"peft": data["peft"] | changes})
    report = finllm_prune.run.run(recipe)
    assert report is not None
    assert report.sparsity["targeted"] == 0.5
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(recipe.output / name)
        for name in ("masked", "compact", "lora/base")
    }
    for name in models:
        assert verify(recipe.output / name)
    assert models["compact"].config.intermediate_size == 32
    assert models["compact"].config.num_key_value_heads == 1
    expected = logits(models["masked"])
    torch.testing.assert_close(logits(models["compact"]), expected, rtol=0, atol=1e-5)
    base = models["lora/base"]
    assert not torch.allclose(logits(base), expected, atol=1e-4)
    layer = base.model.layers[0]
    assert int((layer.mlp.down_proj.weight == 0).all(0).sum()) == 32
    both = PeftModel.from_pretrained(base, str(recipe.output / "lora" / "adapter"))
    torch.testing.assert_close(logits(both), expected, rtol=0, atol=1e-5)


def test_masks_of_one_shot_stay_while_adapters_recover(data: dict[str, Any]) -> None:
    rules = [{"target": "encoder", "structure": {"name": "n:m"}, "sparsity": 0.5}]
    oneshot = {"name": "wanda", "rows": 8}
    recipe = parse(
        data
        | {
            "pruning": {"rules": rules, "oneshot": oneshot},
            "peft": {"r": 4, "base_dtype": "bfloat16"},
            "training": data["training"] | {"bf16": True},
            "export": ["masked"],
            "dense": {"checkpoint": data["model"]},
        }
    )
    report = finllm_prune.run.run(recipe)
    assert report is not None
    assert report.sparsity["targeted"] == 0.5
    assert verify(recipe.output / "masked")
    weights = (load_file(folder / "model.safetensors") for folder in (recipe.output / "masked", Path(data["model"])))
    name = "model.layers.1.mlp.up_proj.weight"
    now, before = (found[name] for found in weights)
    assert bool(((now != 0).view(-1, 4).sum(1) == 2).all())
    assert not torch.equal(now[now != 0], before.bfloat16().float()[now != 0])


MATRIX = [{"target": "encoder", "sparsity": 0.5}]
REFUSED: dict[str, dict[str, Any]] = {
    "peft.use_dora: unknown key": {"peft": {"use_dora": True}},
    r"peft\.gradients: input should be 'lora' or 'exact'": {"peft": {"gradients": "full"}},
    "peft: r and lora_alpha must be at least 1": {"peft": {"r": 0}},
    "recovery: this is not done beside adapters": {"recovery": {}},
    "pruning.fill: this is not done": {"pruning.rules": MATRIX, "pruning.fill": True},
    "pruning.oneshot: this is not done": {"pruning.rules": MATRIX, "pruning.oneshot": "sparsegpt"},
    "pruning.rules.0: second_order, l0": {"pruning.rules.0.criterion": "l0"},
    "pruning.rules.0.criterion: gradient sums": {"pruning.rules.0.criterion": "gradient", "peft.gradients": "exact"},
    "pruning.target: it adds up": {
        "pruning.rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor"}],
        "pruning.target": {"size": 0.8},
    },
    "peft.keep_adapter, or cut neurons": {"pruning.rules.1": {"target": "attention", "sparsity": 0.5}},
    "set training.bf16: true": {"peft.base_dtype": "bfloat16"},
    "set training.bf16 instead": {"peft.gradients": "exact", "training.fp16": True},
    r"gate_proj is pruned and has no adapter": {"peft.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    r"peft\.target_modules: .*querry.* fits no linear": {"peft.target_modules": ["querry"]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_adapters_is_told_before_training(data: dict[str, Any], message: str) -> None:
    changed = copy.deepcopy(data)
    for path, value in REFUSED[message].items():
        *parents, last = path.split(".")
        place: Any = changed
        for part in parents:
            place = place[int(part) if part.isdecimal() else part]
        place[int(last) if last.isdecimal() else last] = value
    with pytest.raises(InputError, match=message):
        read(parse(changed))
