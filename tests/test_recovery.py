"""Recovery: the rest of the training on the small model ends where the full-size one would, and goes on after a kill."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import finllm_prune.run
from finllm_prune.checkpoints import verify
from finllm_prune.errors import InputError
from finllm_prune.families import expand, find_family, shrink, without_effect
from finllm_prune.prepare import prepare
from finllm_prune.pruning import Constant, Head, Neuron, Pruner, Random, Rule
from finllm_prune.recipe import parse
from finllm_prune.run import prune
from finllm_prune.training import PruningTrainer
from tests import small
from tests.conftest import FAMILIES, tiny_model
from tests.test_families import logits, loud

NEURONS = {"target": "mlp", "structure": "neuron", "sparsity": 0.5}
HEADS = {"target": "attention", "structure": "head", "sparsity": 0.5}
SINGLE = {"target": "attention", "structure": "unstructured", "sparsity": 0.75, "budget": "global"}
OWN = {"max_steps": 5, "learning_rate": 2e-3}
Weights = dict[str, torch.Tensor]


@pytest.fixture
def data(tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of 10 steps in epochs of 4, the masks final at the 5th, on a model that is as it is dense."""
    small.few_resamples(monkeypatch)
    model = str(tiny_folder(hidden=32))
    return {
        "model": model, "dense": {"checkpoint": model},
        "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
        "pruning": {"rules": [NEURONS, HEADS], "schedule": {"name": "cubic", "begin": 0.0, "end": 0.4, "freeze": 0.5}},
        "training": {
            "max_steps": 10, "per_device_train_batch_size": 6, "learning_rate": 2e-3, "weight_decay": 0.1, "save_steps": 1,
            "use_cpu": True, "disable_tqdm": True, "warmup_steps": 0.1, "seed": 3,
        },
        "export": ["masked"], "output": str(tmp_path / "out"),
    }  # fmt: skip


def weights(data: dict[str, Any], name: str, resume: bool = False, **changes: Any) -> Weights:
    """What a run trains, up to its report."""
    recipe = parse(data | {"output": str(Path(data["output"]).with_name(name))} | changes)
    ready = prepare(recipe, resume=resume, overwrite=False)
    finllm_prune.run.dense(ready)
    return {key: value.clone() for key, value in prune(ready, {})[0].state_dict().items()}


def assert_same(one: Weights, other: Weights, tolerance: float = 0.0) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("rules", [[NEURONS, HEADS], [NEURONS, SINGLE]], ids=["structured", "hybrid"])
def test_the_rest_of_the_training_ends_where_the_full_size_model_does(data: dict[str, Any], rules: list[Any]) -> None:
    data["pruning"]["rules"] = rules
    assert_same(weights(data, "full"), weights(data, "recovered", recovery={}), 1e-4)
    checkpoints = Path(data["output"]).with_name("recovered.partial") / "checkpoints"
    sizes = {
        phase: {len(w["bert.encoder.layer.0.intermediate.dense.bias"]) for w in saved(checkpoints / phase)}
        for phase in ("prune", "recover")
    }
    assert sizes == {"prune": {64}, "recover": {32}}


def saved(folder: Path) -> list[Weights]:
    return [load_file(file) for file in folder.glob("checkpoint-*/model.safetensors")]


def test_the_report_is_that_of_the_recovered_weights(data: dict[str, Any]) -> None:
    recipe = parse(data | {"recovery": OWN, "pruning": data["pruning"] | {"rules": [NEURONS, SINGLE]}})
    finllm_prune.run.run(recipe)
    masked = load_file(recipe.output / "masked" / "model.safetensors")
    assert verify(recipe.output / "masked")
    report = json.loads((recipe.output / "report.json").read_text())
    assert report["sparsity"]["targeted"] == report["sparsity"]["encoder_linear"] == 0.625
    assert [entry["step"] for entry in report["history"]] == list(range(1, 16))
    assert report["wall_seconds"].keys() == {"dense", "pruning", "recovery", "evaluation_and_export", "total"}
    assert "5 further steps on the model without" in (recipe.output / "README.md").read_text()
    assert_same(weights(data, "again", recovery=OWN, pruning=recipe.resolved["pruning"]), masked)


class Killed(Exception):
    """The process is gone."""


class Kill(TrainerCallback):
    """Raises behind the checkpoint of a step of a phase."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recovery", "phase", "step"),
    [
        ({}, "prune", 3),
        ({}, "recover", 5),
        pytest.param({}, "recover", 8, marks=pytest.mark.full),
        pytest.param(OWN, "prune", 7, marks=pytest.mark.full),
        (OWN, "recover", 0),
        pytest.param(OWN, "recover", 3, marks=pytest.mark.full),
    ],
)
def test_a_run_killed_before_at_and_after_the_seam_ends_with_the_same_weights(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, recovery: dict[str, Any], phase: str, step: int
) -> None:
    data["pruning"]["rules"] = [NEURONS, SINGLE]
    whole = weights(data, "whole", recovery=recovery)
    with monkeypatch.context() as patch:
        made = finllm_prune.run._trainer

        def trainer(ready: Any, model: Any, name: str, *args: Any, **parts: Any) -> PruningTrainer:
            result = made(ready, model, name, *args, **parts)
            if name == phase:
                result.add_callback(Kill(step))
            return result

        patch.setattr(finllm_prune.run, "_trainer", trainer)
        with pytest.raises(Killed):
            weights(data, "killed", recovery=recovery)
    assert_same(whole, weights(data, "killed", resume=True, recovery=recovery))


def test_a_run_killed_while_the_seam_is_made_makes_it_anew(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(data, "whole", recovery={})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            weights(data, "killed", recovery={})
    assert_same(whole, weights(data, "killed", resume=True, recovery={}))


def test_the_moments_are_kept_or_dropped(data: dict[str, Any]) -> None:
    kept = weights(data, "kept", recovery=OWN)
    dropped = weights(data, "dropped", recovery=OWN | {"keep_moments": False})
    assert any(not torch.equal(value, dropped[name]) for name, value in kept.items())


def test_the_best_of_the_rest_may_be_its_first(data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It was evaluated at full size; as the small model takes it over, it can still be loaded in the end."""
    calls = []

    def falling(*_: Any) -> dict[str, float]:
        calls.append(1)
        return {"macro_f1": -float(len(calls))}

    monkeypatch.setattr(finllm_prune.run, "_scores", falling)
    best = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "macro_f1",
        "greater_is_better": True,
    }  # fmt: skip
    first = weights(data, "best", recovery={}, training=data["training"] | best)
    assert_same(first, weights(data, "full", training=data["training"] | best))


def test_bf16_and_accumulation_go_through_the_same_trainer(data: dict[str, Any]) -> None:
    more = data["training"] | {"bf16": True, "gradient_accumulation_steps": 2}
    full, recovered = (
        weights(data, name, training=more, **part) for name, part in (("a", {}), ("b", {"recovery": {}}))
    )
    assert all(value.isfinite().all() for value in recovered.values())
    assert_same(full, recovered, 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_expanding_undoes_shrinking(family: str) -> None:
    model = loud(tiny_model(family, layers=2))
    rules = [Rule("mlp", 0.75, Neuron(), Random()), Rule("attention", 0.5, Head(), Random())]
    pruner = Pruner(find_family(family).groups(model, rules), Constant())
    pruner.finish()
    cuts = without_effect(model)
    smaller = shrink(model, cuts)
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.mul_(1.1)
    expand(smaller, model, cuts)
    assert pruner.holds()
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-4, rtol=1e-4)
    assert all(
        torch.equal(one, other)
        for one, other in zip(shrink(model, cuts).parameters(), smaller.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pruning": {"rules": [SINGLE]}}, "recovery: no rule removes whole neurons"),
        ({"pruning": {"rules": [SINGLE], "oneshot": "magnitude"}}, "recovery: masks that are chosen in one shot"),
        ({"pruning": {"rules": [NEURONS | {"criterion": "score_movement"}]}}, "score_movement does not train"),
        ({"pruning": {"rules": [NEURONS], "schedule": {"name": "cubic", "freeze": 1.0}}}, "set pruning.schedule.freeze"),
        ({"recovery": {"learning_rate": 1e-3}}, "recovery.learning_rate: without num_train_epochs"),
        ({"recovery": {"keep_moment": True}}, "recovery.keep_moment: unknown key"),
        ({"training": {"save_only_model": True}}, "save_only_model"),
    ],
)  # fmt: skip
def test_a_recovery_that_cannot_be_is_refused(data: dict[str, Any], changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse(data | {"recovery": {}} | changes)


@pytest.mark.parametrize("recovery", [None, {}, OWN, OWN | {"keep_moments": False}])
def test_a_recipe_with_recovery_resolves_to_itself(data: dict[str, Any], recovery: Any) -> None:
    recipe = parse(data | {"recovery": recovery})
    assert parse(recipe.resolved) == recipe
