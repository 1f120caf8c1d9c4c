"""compact beyond neurons: heads of decoders and blocks that add nothing are gone, and the logits are the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.checkpoints import find_format, verify
from finllm_prune.checkpoints.compact import compact
from finllm_prune.families import find_family
from finllm_prune.pruning import Constant, Global, Head, Layer, Neuron, Pruner, Random, Rule
from tests.conftest import DECODERS, logits, loud, tiny_model


def cut(model: PreTrainedModel, *rules: Rule) -> PreTrainedModel:
    Pruner(find_family(model.config.model_type).groups(model, list(rules)), Constant()).finish()
    return model


def without_blocks(model: PreTrainedModel, gone: list[int], target: str = "encoder") -> PreTrainedModel:
    group = find_family(model.config.model_type).groups(model, [Rule(target, 0.5, Layer())])[0]
    mask = torch.ones_like(group.mask)
    mask[gone] = False
    group.set_mask(mask)
    with torch.no_grad():
        group.zero()
    return model


@pytest.mark.parametrize("family", DECODERS)
def test_heads_of_decoders_go_with_their_kv_groups(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    model = loud(tiny_model(family, num_attention_heads=8, num_key_value_heads=4))
    cut(model, Rule("attention", 0.5, Head(), Random()), Rule("mlp", 0.75, Neuron(), Random()))
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    config = reloaded.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert config.intermediate_size == 16
    assert all(linear.weight.any(1).all() for linear in find_family(family).linears(reloaded).values())
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    assert verify(tmp_path / "compact")["format"] == "compact"


@pytest.mark.parametrize(("family", "heads"), [("llama", 4), ("qwen3", 3)])
def test_a_number_of_heads_that_the_config_refuses_is_filled_up_to_the_next(family: str, heads: int) -> None:
    """Llama's config wants the number of heads to divide the hidden width of 32; Qwen3's does not."""
    model = cut(loud(tiny_model(family, num_key_value_heads=4)), Rule("attention", 0.25, Head(), Random()))
    smaller = compact(model)
    assert (smaller.config.num_attention_heads, smaller.config.num_key_value_heads) == (heads, heads)
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-5, rtol=0)


def test_layers_with_several_numbers_of_heads_get_the_largest() -> None:
    model = loud(tiny_model("mistral", layers=4, num_attention_heads=8, num_key_value_heads=8))
    cut(model, Rule("attention", 0.6, Head(), Random(), Global()))
    smaller = compact(model)
    alive = [int(layer.self_attn.o_proj.weight.any(0).sum()) // 8 for layer in model.model.layers]
    assert len(set(alive)) > 1
    assert smaller.config.num_key_value_heads == max(alive) < 8
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["modernbert", *DECODERS])
@pytest.mark.parametrize("gone", [[0], [1], [1, 2]])
def test_blocks_that_add_nothing_go(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, gone: list[int]
) -> None:
    model = without_blocks(loud(tiny_model(family, layers=4)), gone)
    find_format("compact")(model, tokenizer, tmp_path / "compact")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compact")
    # The first block of ModernBERT has no norm, so that no other one can take its place.
    stays = 0 in gone and family == "modernbert"
    assert reloaded.config.num_hidden_layers == len(find_family(family).layers(reloaded)) == 4 - len(gone) + stays
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    assert len(find_family(family).layers(model)) == 4, "the model in memory is left alone"


@pytest.mark.parametrize(
    ("family", "target"), [("bert", "encoder"), ("deberta-v2", "encoder"), ("llama", "mlp"), ("llama", "attention")]
)
def test_blocks_that_still_have_an_effect_stay(family: str, target: str) -> None:
    """A zero block of BERT is still a norm, and half of a block is no identity."""
    model = without_blocks(loud(tiny_model(family, layers=3)), [1], target)
    smaller = compact(model)
    assert smaller.config.num_hidden_layers == 3
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-5, rtol=0)


def test_a_bias_alone_is_an_effect() -> None:
    model = without_blocks(loud(tiny_model("llama", layers=3, mlp_bias=True)), [1])
    assert compact(model).config.num_hidden_layers == 2
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias[0] = 0.5
    assert compact(model).config.num_hidden_layers == 3


def test_one_block_stays_where_none_has_an_effect() -> None:
    model = without_blocks(loud(tiny_model("llama", layers=3)), [0, 1, 2])
    smaller = compact(model)
    assert smaller.config.num_hidden_layers == 1
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-5, rtol=0)
