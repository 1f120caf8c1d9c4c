"""Hybrid filling: which heads and neurons survive, what they hold then, and that a run with it resumes and exports."""

import copy
import logging
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from finllm_prune.checkpoints.compact import compact
from finllm_prune.errors import InputError
from finllm_prune.families import Architecture, find_family, shrink, without_effect
from finllm_prune.pruning import (
    NM,
    Block,
    Cubic,
    Group,
    Head,
    Layer,
    Magnitude,
    Neuron,
    Pruner,
    Rule,
    ScoreMovement,
    Site,
    Slot,
    Structure,
)
from finllm_prune.pruning.filling import refuse_unfillable, survivors
from finllm_prune.recipe import parse
from finllm_prune.run import run
from tests import small
from tests.conftest import logits, loud, tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_rule, train

BLOCKS = Rule("encoder", 0.5, Block(8, 8), Magnitude())
SCHEDULE = Cubic(begin=0.1, end=0.7, freeze=0.9)
WHOLE: dict[str, Structure] = {"attention": Head(), "mlp": Neuron()}
KINDS: dict[str, dict[str, Any]] = {
    "bert": {}, "llama": {}, "modernbert": {}, "deberta-v2": {},
    "deberta-v2 with projections of positions": {"share_att_key": False},
    "albert": {}, "albert with two sets of weights": {"num_hidden_groups": 2},
}  # fmt: skip


def filling(model: PreTrainedModel, *rules: Rule) -> Pruner:
    family = find_family(model.config.model_type)
    return Pruner(family.groups(model, list(rules)), SCHEDULE, family.whole_units(model, list(rules)))


def half_useful(kind: str, side: str) -> PreTrainedModel:
    """A model whose first half of heads and neurons has all the loud weights of a side, in half of the other side's blocks."""
    model = loud(tiny_model(kind.split()[0], **KINDS[kind]))
    family = find_family(model.config.model_type)
    for block, part in [(block, part) for block in range(len(family.layers(model))) for part in WHOLE]:
        for site in family.sites(model, part, block):
            weight = model.get_submodule(site.path).weight.data
            units = WHOLE[part].units(weight, site)
            if (site.axis == 1) == (side == "output"):
                useful = torch.arange(units[0]) < units[0] // 2
                weight[~WHOLE[part].expand(useful, weight, site)] *= 0.01
            else:
                weight.narrow(1 - site.axis, 0, 16).mul_(100.0)
    return model


def reference(reads: np.ndarray, writes: np.ndarray) -> list[bool]:
    """Unit by unit: ``reads`` (matrices, units, inputs), ``writes`` (outputs, units)."""
    alive = [bool(reads[:, unit].any() and writes[:, unit].any()) for unit in range(writes.shape[1])]
    left = [int(reads[:, unit].sum() + writes[:, unit].sum()) for unit in range(writes.shape[1])]
    return alive if any(alive) else [unit == left.index(max(left)) for unit in range(len(left))]


@given(
    arrays.arrays(bool, st.tuples(st.integers(1, 2), st.just(5), st.integers(1, 3))),
    arrays.arrays(bool, st.tuples(st.integers(1, 3), st.just(5))),
)
def test_a_unit_survives_where_it_reads_and_writes_anything(reads: np.ndarray, writes: np.ndarray) -> None:
    def slot(name: str, shape: tuple[int, ...], axis: int) -> Slot:
        return Slot(name, nn.Parameter(torch.ones(shape)), Site(name, axis))

    slots = [slot(f"in{i}", kept.shape, 0) for i, kept in enumerate(reads)]
    slots += [slot("bias", (5,), 0), slot("out", writes.shape, 1)]
    pruned = {f"in{i}": torch.from_numpy(~kept) for i, kept in enumerate(reads)} | {"out": torch.from_numpy(~writes)}
    assert survivors(Group("mlp", Rule("mlp", 0.5, Neuron()), slots), pruned).tolist() == reference(reads, writes)


@pytest.mark.parametrize("side", ["inputs", "output"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_useful_is_dense_again_as_it_was_and_the_rest_goes_with_its_biases(
    kind: str, side: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = half_useful(kind, side)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data += 1.0
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pruner, still = filling(model, BLOCKS), torch.optim.SGD(model.parameters(), lr=0.0)
    batches = make_batches(10)
    train(model, pruner, still, batches, range(8))
    assert pruner.sparsity() == 0.5
    assert any(slot.parked is not None for group in pruner.groups for slot in group.slots)
    train(model, pruner, still, batches, range(8, 10))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, whole[name])}
    for group in pruner.groups:
        units = group.mask.numel()
        assert group.mask.tolist() == [True] * (units // 2) + [False] * (units // 2)
        for slot in group.slots:
            kept = group.rule.structure.expand(group.mask, slot.weight, slot.site).view_as(slot.parameter)
            assert torch.equal(slot.parameter, whole[slot.name] * kept)
            changed.discard(slot.name)
    assert changed == set(), "biases of the outputs and all that no rule targets"
    assert pruner.sparsity() == 0.5
    assert "Filled: 50.0% of the targeted weights were cut; whole heads and neurons with 50.0% of them" in caplog.text
    assert all(slot.parked is None and not group.cut for group in pruner.stages[0] for slot in group.slots)


@pytest.mark.parametrize("kind", KINDS)
def test_the_smaller_model_computes_the_same(kind: str) -> None:
    model = half_useful(kind, "output")
    pruner = filling(model, BLOCKS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    train(model, pruner, optimizer, make_batches(10))
    pruner.finish()
    assert pruner.holds()
    smaller = compact(model)
    assert smaller.config.intermediate_size == 32
    assert smaller.config.num_attention_heads == (2 if kind == "llama" else 4)
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-4, rtol=1e-4)
    narrow, family = shrink(model, without_effect(model)), find_family(model.config.model_type)
    for block, part in [(block, part) for block in range(len(family.layers(model))) for part in WHOLE]:
        *_, output = family.sites(model, part, block)
        assert narrow.get_submodule(output.path).in_features * 2 == model.get_submodule(output.path).in_features
    torch.testing.assert_close(logits(narrow), logits(model), atol=1e-4, rtol=1e-4)


def test_filled_weights_are_fine_tuned_and_what_is_gone_stays_gone() -> None:
    model, batches = half_useful("bert", "output"), make_batches(20)
    pruner, optimizer = filling(model, BLOCKS), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(18))
    masks, before = pruner.mask_hash(), [parameter.detach().clone() for parameter in model.parameters()]
    train(model, pruner, optimizer, batches, range(18, 20))
    moved = {id(p): p != old for p, old in zip(model.parameters(), before, strict=True)}
    for group in pruner.groups:
        for slot in group.slots:
            kept = group.rule.structure.expand(group.mask, slot.weight, slot.site).view_as(slot.parameter)
            assert moved[id(slot.parameter)][kept].float().mean() > 0.9
            assert not slot.parameter[~kept].any()
    assert pruner.mask_hash() == masks


def test_one_head_and_one_neuron_of_each_layer_stay_where_the_blocks_left_none() -> None:
    model = tiny_model()
    # Every matrix keeps one block: of the inputs the first rows', of the output the last columns'.
    family = find_family("bert")
    for block, part in [(block, part) for block in range(2) for part in WHOLE]:
        *inputs, output = (model.get_submodule(site.path).weight.data for site in family.sites(model, part, block))
        for weight in inputs:
            weight[:8, :8] = 9.0
        output[:8, -8:] = 9.0
    pruner = filling(model, Rule("encoder", 0.999, Block(8, 8), Magnitude()))
    pruner.finish()
    assert [group.mask.nonzero().flatten().tolist() for group in pruner.groups] == [[0]] * 4
    assert all(torch.count_nonzero(group.slots[-1].parameter) for group in pruner.groups)


def test_a_rule_that_cuts_whole_units_is_left_as_it_is_beside_one_that_is_filled() -> None:
    model = half_useful("bert", "output")
    pruner = filling(model, Rule("attention", 0.5, Block(8, 8), Magnitude()), make_rule("neuron", sparsity=0.75))
    train(model, pruner, make_optimizer(model), make_batches(10), range(8))
    assert [group.mask.ndim for group in pruner.groups] == [2] * 8 + [1] * 2
    train(model, pruner, make_optimizer(model), make_batches(10), range(8, 10))
    names = [f"bert.encoder.layer.{block}.{part}" for part in ("mlp", "attention") for block in range(2)]
    assert [group.name for group in pruner.groups] == names
    assert [int(group.mask.sum()) for group in pruner.groups] == [16, 16, 2, 2]


@pytest.mark.parametrize("stop", [1, 5, 10, 11])
@pytest.mark.parametrize("structure", ["block", "unstructured"])
def test_a_run_that_is_resumed_before_or_after_the_filling_is_the_undisturbed_one(
    structure: str, stop: int, tmp_path: Path
) -> None:
    batches, rule = make_batches(12), make_rule(structure, sparsity=0.8)
    model = half_useful("bert", "output")
    pruner, optimizer = filling(model, rule), make_optimizer(model)
    train(model, pruner, optimizer, batches, range(stop))
    assert pruner.frozen == (stop == 11)

    save_file(pruner.state_dict(), tmp_path / "pruner.safetensors")
    resumed = tiny_model(seed=1)
    resumed.load_state_dict(model.state_dict())
    other, its_optimizer = filling(resumed, rule), make_optimizer(resumed)
    other.load_state_dict(load_file(tmp_path / "pruner.safetensors"))
    assert other.mask_hash() == pruner.mask_hash()
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    train(model, pruner, optimizer, batches, range(stop, 12))
    train(resumed, other, its_optimizer, batches, range(stop, 12))
    for (name, one), again in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, again), name
    assert pruner.frozen
    assert other.frozen
    assert pruner.mask_hash() == other.mask_hash()
    assert pruner.state_dict().keys() == other.state_dict().keys()
    assert not any("dense/mask" in key for key in other.state_dict())


def test_a_filled_state_is_refused_without_the_key_and_the_other_way_round() -> None:
    filled, plain = tiny_model(), tiny_model()
    first, second = filling(filled, BLOCKS), Pruner(find_family("bert").groups(plain, [BLOCKS]), SCHEDULE)
    first.finish()
    second.finish()
    for pruner, state in ((second, first.state_dict()), (first, second.state_dict())):
        with pytest.raises(InputError, match="belongs to other rules"):
            pruner.load_state_dict(state)


# Refusals


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ([Rule("mlp", 0.5, Neuron()), Rule("attention", 0.5, Head())], "pruning.fill: every rule cuts whole units"),
        ([Rule("encoder", 0.5, Layer())], "nothing to fill; remove the key, or set a rule's structure to block"),
        ([Rule("mlp", 0.5, Block()), Rule("attention", 0.5, NM())], r"pruning.rules.1.structure: n:m leaves weights"),
        ([Rule("mlp", 0.5, Block(), ScoreMovement())], "pruning.rules.0.criterion: score_movement does not train"),
    ],
)
def test_rules_that_cannot_be_filled_are_refused_by_number(rules: list[Rule], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        refuse_unfillable(rules)


def test_rules_of_both_kinds_side_by_side_are_no_fault() -> None:
    refuse_unfillable([Rule("mlp", 0.5, Neuron(), ScoreMovement()), Rule("attention", 0.5, Block())])


def test_units_that_are_not_known_are_refused() -> None:
    with pytest.raises(InputError, match=r"pruning.fill: target 'query' is a pattern.*use attention, mlp or encoder"):
        find_family("bert").whole_units(tiny_model(), [Rule("query", 0.5, Block(8, 8))])
    with pytest.raises(InputError, match=r"pruning.fill: no family is known for model_type 'linear'.*remove the key"):
        Architecture().whole_units(nn.Linear(2, 2), [Rule("query", 0.5)])


def test_a_run_with_the_key_exports_a_smaller_model(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    folder = tiny_folder("bert")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    for block in model.bert.encoder.layer:
        block.output.dense.weight.data[:, 32:] = 0.0
    model.save_pretrained(folder)
    rules = [{"target": "mlp", "structure": {"name": "block", "rows": 8, "cols": 8}, "sparsity": 0.5,
              "criterion": "magnitude"}]  # fmt: skip
    data = recipe(fill=True, rules=rules) | {
        "model": str(folder), "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
        "training": {"max_steps": 4, "learning_rate": 1e-6, "use_cpu": True, "disable_tqdm": True},
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    report = run(parse(data))
    assert report is not None
    smaller = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compact")
    masked = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "masked")
    assert smaller.config.intermediate_size <= 32
    torch.testing.assert_close(logits(smaller), logits(masked), atol=1e-5, rtol=0)
    kept = [float(block.output.dense.weight.any(0).float().mean()) for block in masked.bert.encoder.layer]
    assert report.sparsity["targeted"] == pytest.approx(1.0 - sum(kept) / 2)


def recipe(**pruning: Any) -> dict[str, Any]:
    rules = [{"target": "mlp", "structure": "block", "sparsity": 0.5}]
    return {"model": "x", "task": "sentiment", "output": "out", "pruning": {"rules": rules} | pruning}


def test_the_key_of_a_recipe_makes_compact_possible() -> None:
    filled = parse(recipe(fill=True))
    assert filled.pruning.fill
    assert filled.resolved["pruning"]["fill"] is True
    assert parse(filled.resolved) == filled
    with pytest.raises(InputError, match="export: no rule removes whole neurons"):
        parse(recipe())


@pytest.mark.parametrize(
    ("pruning", "sentence"),
    [
        ({"fill": "perhaps"}, "pruning.fill: input should be a valid boolean"),
        ({"fill": True, "rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]}, "nothing to fill"),
        (
            {"fill": True, "oneshot": "magnitude", "rules": [{"target": "mlp", "sparsity": 0.5}]},
            "pruning.fill: masks that are chosen in one shot .* remove fill or oneshot",
        ),
    ],
)
def test_a_recipe_that_cannot_be_filled_is_refused(pruning: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse(recipe(**pruning))
