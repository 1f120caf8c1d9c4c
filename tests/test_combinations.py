"""Every criterion on every structure of every family: cut, saved, and reloaded with plain transformers, or refused by name."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.pruning import CRITERIA, NM, STRUCTURES, Layer, Magnitude, Pruner, Rule
from tests.conftest import FAMILIES, logits, loud, tiny_model
from tests.pruning.runs import fits, make_batches, make_optimizer, make_pruner, make_rule, train


def combinations() -> list[Any]:
    """Criterion x structure x family. Each two of them meet in the fast tests; what is left is in the full ones."""
    product = itertools.product(enumerate(CRITERIA), enumerate(STRUCTURES), enumerate(FAMILIES))
    return [
        pytest.param(criterion, structure, family, marks=[] if (i + k) % len(STRUCTURES) == j else [pytest.mark.full])
        for (i, criterion), (j, structure), (k, family) in product
    ]


def refusal(criterion: str, structure: str, family: str) -> str | None:
    """The sentence for a combination that cannot be."""
    if (family, structure) == ("albert", "layer"):
        return "the blocks of albert share one set of weights, so structure layer cannot cut one of them"
    if not fits(criterion, structure):
        return "criterion second_order: it weighs single weights; use structure unstructured or n:m with it"
    return None


@pytest.mark.parametrize(("criterion", "structure", "family"), combinations())
def test_every_criterion_cuts_every_structure_of_every_family_or_is_refused_by_name(
    tmp_path: Path, criterion: str, structure: str, family: str
) -> None:
    model, rule = loud(tiny_model(family)), make_rule(structure, criterion)
    if (sentence := refusal(criterion, structure, family)) is not None:
        with pytest.raises(InputError, match=sentence):
            make_pruner(model, rule)
        return
    pruner = make_pruner(model, rule)
    train(model, pruner, make_optimizer(model), make_batches(3))
    pruner.finish()
    assert pruner.sparsity() == 0.5
    assert_only_cut_weights_are_zero_after_a_round_trip(model, pruner, tmp_path)
    matrices = {slot.name.removesuffix(".weight") for group in pruner.groups for slot in group.matrices}
    assert matrices <= find_family(family).linears(model).keys()


SUBLAYERS = {
    "attention of a block": Rule("attention", 0.5, Layer(), Magnitude()),
    "mlp of a block": Rule("mlp", 0.5, Layer(), Magnitude()),
    "4:8": Rule("encoder", 0.5, NM(4, 8), Magnitude()),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", SUBLAYERS)
def test_sublayers_and_wider_patterns_are_cut_in_every_family_too(tmp_path: Path, what: str, family: str) -> None:
    model = loud(tiny_model(family))
    if family == "albert" and what != "4:8":
        with pytest.raises(InputError, match="the blocks of albert share one set of weights"):
            make_pruner(model, SUBLAYERS[what])
        return
    pruner = make_pruner(model, SUBLAYERS[what])
    pruner.finish()
    assert pruner.sparsity() == 0.5
    assert_only_cut_weights_are_zero_after_a_round_trip(model, pruner, tmp_path)


def assert_only_cut_weights_are_zero_after_a_round_trip(model: PreTrainedModel, pruner: Pruner, folder: Path) -> None:
    model.save_pretrained(folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(reloaded), logits(model))
    cut = {
        slot.name: group.rule.structure.expand(~group.mask, slot.weight, slot.site)
        for group in pruner.groups
        for slot in group.slots
    }
    for name, parameter in reloaded.named_parameters():
        if name in cut:
            # No other weight was a zero, so that one elsewhere would be a wrong cut.
            assert torch.equal(parameter == 0, cut[name].reshape(parameter.shape)), name
