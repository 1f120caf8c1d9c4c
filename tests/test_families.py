"""Structures on each family: what a cut takes along, what it leaves, what is refused by name."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format
from finllm_prune.errors import InputError
from finllm_prune.evaluation import removed
from finllm_prune.families import Architecture, find_architecture, find_family
from finllm_prune.pruning import STRUCTURES, Constant, Head, Layer, Neuron, Pruner, Random, Rule
from tests.conftest import DECODERS, FAMILIES, logits, loud, tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, make_rule, train


@pytest.mark.parametrize(("structure", "target"), [(Head(), "attention"), (Neuron(), "mlp")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_unit_is_whole_it_leaves_no_trace_in_the_units_that_stay(
    family: str, structure: Head | Neuron, target: str
) -> None:
    """Cut everywhere, or only where it writes its output: the logits are equal, so inputs and outputs are the same units."""
    whole, half = loud(tiny_model(family)), loud(tiny_model(family))
    half.load_state_dict(whole.state_dict())
    rule = Rule(target, 0.5, structure, Random())
    dense = logits(whole)
    pruner = Pruner(find_family(family).groups(whole, [rule]), Constant())
    pruner.finish()
    for group, other in zip(pruner.groups, find_family(family).groups(half, [rule]), strict=True):
        other.slots = [slot for slot in other.slots if slot.site.axis == 1]
        other.set_mask(group.mask)
        with torch.no_grad():
            other.zero()
    torch.testing.assert_close(logits(whole), logits(half), atol=1e-5, rtol=0)
    assert (logits(whole) - dense).abs().max() > 0.01


def test_a_head_of_a_decoder_is_a_kv_group_with_the_queries_that_share_it() -> None:
    model = tiny_model("llama", layers=1)
    group = make_pruner(model, make_rule("head")).groups[0]
    group.set_mask(torch.tensor([True, False]))
    with torch.no_grad():
        group.zero()
    attention = model.model.layers[0].self_attn
    rows = {name: (getattr(attention, f"{name}_proj").weight != 0).any(1).tolist() for name in "qkv"}
    assert rows == {"q": [True] * 16 + [False] * 16, "k": [True] * 8 + [False] * 8, "v": [True] * 8 + [False] * 8}
    assert (attention.o_proj.weight != 0).any(0).tolist() == rows["q"]


def test_a_single_kv_group_cannot_be_cut() -> None:
    model = tiny_model("gemma", layers=2, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"model\.layers\.0\.attention is a single unit of structure head"):
        make_pruner(model, make_rule("head"))


def test_a_single_block_cannot_be_cut() -> None:
    with pytest.raises(InputError, match=r"bert\.encoder\.layer is a single unit of structure layer"):
        make_pruner(tiny_model(layers=1), make_rule("layer"))


@pytest.mark.parametrize(("shared", "matrices"), [(True, 4), (False, 6)])
def test_a_head_of_deberta_has_rows_in_the_projections_of_positions_where_there_are_any(
    shared: bool, matrices: int
) -> None:
    model = loud(tiny_model("deberta-v2", layers=1, share_att_key=shared))
    names = [slot.name for slot in make_pruner(model, make_rule("head")).groups[0].slots if slot.parameter.ndim == 2]
    assert len(names) == matrices
    assert any("pos_query_proj" in name for name in names) != shared
    assert len(find_family("deberta-v2").linears(model)) == matrices + 2


@pytest.mark.parametrize("target", ["attention", "mlp", "encoder"])
def test_layers_are_cut_whole_or_by_their_parts(target: str) -> None:
    model = tiny_model(layers=3)
    pruner = Pruner(find_family("bert").groups(model, [Rule(target, 0.34, Layer(), Random())]), Constant())
    train(model, pruner, make_optimizer(model), make_batches(2))
    pruner.finish()
    assert [mask.tolist().count(False) for mask in pruner.masks().values()] == [1]
    gone = int((~pruner.groups[0].mask).nonzero())
    inside = {
        "attention": ["attention"],
        "mlp": ["intermediate", "output"],
        "encoder": ["attention", "intermediate", "output"],
    }
    for index, block in enumerate(model.bert.encoder.layer):
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                cut = index == gone and name.partition(".")[0] in inside[target]
                assert linear.weight.any() != cut, name
                assert linear.bias.any() != cut, name


@pytest.mark.parametrize("keep", [[0, 2], [1, 2]])
@pytest.mark.parametrize("family", ["deberta-v2", "modernbert", *DECODERS])
def test_a_model_with_fewer_blocks_is_a_plain_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, keep: list[int]
) -> None:
    """Windows of attention, places in the cache and norms of the first block go with the blocks that stay."""
    model = loud(tiny_model(family, layers=3))
    if (family, keep) == ("modernbert", [1, 2]):
        with pytest.raises(InputError, match=r"block 0 of this model is built unlike block 1.*keep block 0 too"):
            find_family(family).keep_layers(model, keep)
        return
    before = logits(model)
    find_family(family).keep_layers(model, keep)
    assert (logits(model) - before).abs().max() > 0.01
    find_format("masked")(model, tokenizer, tmp_path / "masked")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")
    assert reloaded.config.num_hidden_layers == 2
    assert torch.equal(logits(reloaded), logits(model))


def test_shared_blocks_cannot_be_dropped() -> None:
    with pytest.raises(InputError, match="the blocks of albert share one set of weights, so none can be dropped"):
        find_family("albert").keep_layers(tiny_model("albert"), [0])


def test_each_of_several_sets_of_shared_weights_is_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud(tiny_model("albert", layers=4, num_hidden_groups=2))
    pruner = make_pruner(model, make_rule("neuron"), make_rule("head"))
    assert len(pruner.groups) == 4
    train(model, pruner, make_optimizer(model), make_batches(3))
    pruner.finish()
    assert removed(tiny_model("albert", layers=4, num_hidden_groups=2), model)["encoder_linear"] == 0.5
    find_format("masked")(model, tokenizer, tmp_path / "masked")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "masked")
    assert torch.equal(logits(reloaded), logits(model))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_linear_layer_that_the_family_does_not_name_is_refused(structure: str) -> None:
    """It would stay dense without a word."""
    with pytest.raises(
        InputError, match=r"layer_groups\.0\.albert_layers\.1\.\S+ is a linear layer.*inner_group_num: 1"
    ):
        make_pruner(tiny_model("albert", inner_group_num=2), make_rule(structure))


def test_the_depth_is_that_of_the_hidden_states() -> None:
    for family in FAMILIES:
        model = tiny_model(family, layers=3)
        states = model(**make_batches(1)[0], output_hidden_states=True).hidden_states
        assert find_family(family).depth_of(model.config) == len(states) - 1 == 3, family


@pytest.mark.parametrize("model_type", ["gpt_neox", "family", "architecture", "", "a.b", "../bert"])
def test_a_model_type_without_a_family_is_an_error_that_names_the_file(model_type: str) -> None:
    assert type(find_architecture(model_type)) is Architecture
    with pytest.raises(InputError, match=r"^model: no family is known for model_type '.*families/.*\.py"):
        find_family(model_type)
