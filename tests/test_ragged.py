"""ragged: heads of every family and blocks of several widths go, and what is loaded is a plain model that works on."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from finllm_prune.checkpoints import find_format, verify
from finllm_prune.checkpoints.quantizer import LURE, WEIGHTS, PrunedConfig
from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.pruning import Constant, Global, Head, Neuron, Pruner, Random, Rule, Unstructured
from tests.conftest import FAMILIES, tiny_model
from tests.test_families import logits, loud


def uneven(model_type: str = "bert") -> PreTrainedModel:
    """A tiny model that lost another number of heads and neurons in each block."""
    model = loud(tiny_model(model_type, layers=3))
    rules = [Rule("mlp", 0.75, Neuron(), Random(), Global()), Rule("attention", 0.5, Head(), Random(), Global())]
    Pruner(find_family(model_type).groups(model, rules), Constant()).finish()
    return model


def with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """The same without nine of ten single weights."""
    family = find_family(model.config.model_type)
    Pruner(family.groups(model, [Rule("encoder", 0.9, Unstructured(), Random())]), Constant()).finish()
    return model


def load(folder: Path, **how: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, **how)


def widths(model: PreTrainedModel) -> set[int]:
    return {layer.intermediate.dense.out_features for layer in model.base_model.encoder.layer}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "ragged"
    find_format("ragged")(uneven(), tokenizer, folder)
    return folder


@pytest.fixture(scope="module", params=["ragged", "packed", "packed-int8"])
def each(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, PreTrainedModel]:
    """A folder of each format, whose blocks have several widths, and the model that lies in it."""
    folder = tmp_path_factory.mktemp("each") / request.param
    model = uneven() if request.param == "ragged" else with_zeros(uneven())
    return folder, find_format(request.param)(model, tokenizer, folder)


@pytest.fixture
def spoilt(exported: Path, tmp_path: Path) -> Path:
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_model_is_the_one_in_memory(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    model = uneven(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    returned = find_format("ragged")(model, tokenizer, tmp_path / "ragged")
    reloaded = load(tmp_path / "ragged")
    assert type(reloaded) is type(model)
    assert torch.equal(logits(reloaded), logits(returned))
    torch.testing.assert_close(logits(reloaded), logits(model), atol=1e-5, rtol=0)
    linears = find_family(family).linears
    assert sum(x.weight.numel() for x in linears(reloaded).values()) < sum(
        x.weight.numel() for x in linears(model).values()
    )
    assert all(linear.weight.any(1).all() for linear in linears(reloaded).values())
    assert verify(tmp_path / "ragged")["format"] == "ragged"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for again in (returned, reloaded):
        again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
        assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
        assert torch.equal(logits(load(tmp_path / "again")), logits(returned))


@pytest.mark.parametrize("format_name", ["masked", "compact"])
def test_zeros_fill_it_up_where_plain_transformers_is_to_open_it(
    exported: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format_name: str
) -> None:
    model = load(exported)
    find_format(format_name)(model, tokenizer, tmp_path / "even")
    even = load(tmp_path / "even")
    assert "quantization_config" not in json.loads((tmp_path / "even" / "config.json").read_text())
    assert widths(even) == {64 if format_name == "masked" else max(widths(model))}
    torch.testing.assert_close(logits(even), logits(model), atol=1e-5, rtol=0)


def test_every_way_to_load_gives_the_same_model(
    each: tuple[Path, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    folder, model = each
    for device_map in ("cpu", "auto"):
        assert torch.equal(logits(load(folder, device_map=device_map)), logits(model))
    half = load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    expected = dict(model.named_parameters())
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in half.named_parameters())
    torch.testing.assert_close(logits(half).float(), logits(model), atol=0.2, rtol=0)
    assert widths(AutoModel.from_pretrained(folder)) == widths(model)
    assert len(widths(model)) > 1
    text = "Profit rose by 12 percent."
    with torch.no_grad():
        scored = model(**tokenizer(text, return_tensors="pt")).logits.softmax(1)[0]
    found = pipeline("text-classification", model=str(folder), device="cpu")(text, top_k=None)
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        {model.config.id2label[i]: float(score) for i, score in enumerate(scored)}, abs=1e-6
    )
    scores = CrossEncoder(str(folder), device="cpu").predict([(text, text)], apply_softmax=True)
    with torch.no_grad():
        pair = model(**tokenizer(text, text, return_tensors="pt")).logits.softmax(1)
    torch.testing.assert_close(torch.tensor(scores), pair, atol=1e-5, rtol=0)


def test_what_is_offloaded_to_disk_is_the_same_model(each: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = each
    where = {"bert": "disk", "classifier": "cpu"}
    offloaded = load(folder, device_map=where, offload_folder=tmp_path)
    assert offloaded.bert.encoder.layer[0].output.dense.weight.is_meta
    assert torch.equal(logits(offloaded), logits(model))


@pytest.mark.parametrize("format_name", ["ragged", "packed"])
@pytest.mark.parametrize("family", ["modernbert", "qwen3", "deberta-v2"])
def test_other_families_load_by_a_device_map_and_in_half_precision(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, format_name: str
) -> None:
    model = uneven(family) if format_name == "ragged" else with_zeros(uneven(family))
    returned = find_format(format_name)(model, tokenizer, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved", device_map="auto")), logits(returned))
    half, expected = load(tmp_path / "saved", dtype=torch.bfloat16), dict(returned.named_parameters())
    assert half.dtype == torch.bfloat16
    assert all(torch.equal(each, expected[name].bfloat16()) for name, each in half.named_parameters())
    assert logits(half).isfinite().all()


def rows_to_train() -> list[dict[str, Any]]:
    return [{"input_ids": [2, 7 + i, 9, 3], "attention_mask": [1] * 4, "labels": i % 3} for i in range(8)]


def steps(folder: Path) -> TrainingArguments:
    """Two of them."""
    return TrainingArguments(
        folder, max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=1e-2
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft still asks for it
def test_a_loaded_model_trains_resumes_and_takes_adapters(each: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, before = each
    rows, arguments = rows_to_train(), steps(tmp_path)
    model = load(folder)
    Trainer(model, arguments, train_dataset=Dataset.from_list(rows)).train()
    assert not torch.equal(logits(model), logits(before))
    assert torch.equal(logits(load(tmp_path / "checkpoint-2")), logits(model))
    resumed = load(folder)
    trainer = Trainer(resumed, arguments, train_dataset=Dataset.from_list(rows))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed), logits(model))
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "base")
    arguments.save_strategy = "no"
    Trainer(adapted, arguments, train_dataset=Dataset.from_list(rows)).train()
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")), logits(adapted)
    )
    merged = adapted.merge_and_unload()
    assert not torch.allclose(logits(merged), logits(model), atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "format_name"), [("deberta-v2", "ragged"), ("qwen3", "packed")])
def test_other_families_train_and_take_adapters(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, family: str, format_name: str
) -> None:
    find_format(format_name)(with_zeros(uneven(family)), tokenizer, tmp_path / "saved")
    model, data = load(tmp_path / "saved"), Dataset.from_list(rows_to_train())
    Trainer(model, steps(tmp_path), train_dataset=data).train()
    assert torch.equal(logits(load(tmp_path / "checkpoint-2")), logits(model))
    names = ["query_proj", "dense"] if family == "deberta-v2" else ["q_proj", "down_proj"]
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=names, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "checkpoint-2"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
    assert not torch.allclose(logits(adapted), logits(model), atol=1e-3)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(format_version=2), r"format_version: 2 is not 1.*pip install -U finllm-prune"),
        (lambda c: c.pop("format_version"), r"format_version: None is not 1"),
        (lambda c: c.update(new_key=1), r"quantization_config: per_layer_config"),
        (lambda c: c.update(packed="many"), r"quantization_config: per_layer_config"),
        (lambda c: c.update(packed=3), r"holds 0 packed matrices, but config.json tells of 3"),
        (lambda c: c["per_layer_config"].pop("1"), r"it names blocks 0, 2, but the model has 3"),
        (lambda c: c["per_layer_config"]["1"].pop("intermediate_size"), r"per_layer_config.1: .* are expected"),
        (
            lambda c: c["per_layer_config"]["1"].update(intermediate_size=65),
            r"1.intermediate_size: 65 is no number from",
        ),
        (
            lambda c: c["per_layer_config"]["1"].update(intermediate_size=0),
            r"1.intermediate_size: 0 is no number from 1",
        ),
        (lambda c: c["per_layer_config"]["1"].update(num_attention_heads=True), r"True is no number from 1 to 4"),
        (lambda c: c["per_layer_config"]["1"].update(num_attention_heads="2"), r"'2' is no number from 1 to 4"),
    ],
)
def test_a_changed_config_is_refused(spoilt: Path, change: Callable[[dict[str, Any]], object], expected: str) -> None:
    edit(spoilt, change)
    with pytest.raises(InputError, match=expected) as error:
        load(spoilt)
    assert "\n" not in str(error.value)


def test_other_widths_than_those_of_the_file_are_refused(spoilt: Path) -> None:
    edit(spoilt, lambda c: c["per_layer_config"]["1"].update(intermediate_size=3))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(spoilt)


def test_key_and_query_heads_go_together(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    find_format("ragged")(uneven("llama"), tokenizer, tmp_path / "ragged")
    edit(tmp_path / "ragged", lambda c: c["per_layer_config"]["1"].update(num_attention_heads=3))
    with pytest.raises(InputError, match="other query heads than key heads"):
        load(tmp_path / "ragged")


def test_an_unknown_family_and_a_dense_model_are_refused(spoilt: Path, tmp_path: Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(json.dumps(config | {"model_type": "nystromformer"}))
    with pytest.raises(InputError, match="no family is known for model_type 'nystromformer'"):
        load(spoilt)
    tiny_model().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        load(tmp_path / "dense", quantization_config=PrunedConfig(1))


def test_a_file_that_was_cut_off_is_refused(spoilt: Path) -> None:
    whole = (spoilt / WEIGHTS).read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        (spoilt / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"{WEIGHTS} is missing or damaged"):
            load(spoilt)
    (spoilt / WEIGHTS).unlink()
    with pytest.raises(InputError, match=rf"{WEIGHTS} is missing or damaged"):
        load(spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["ragged", pytest.param("packed", marks=pytest.mark.full)])
def test_the_import_may_come_first_or_last_but_not_be_absent(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, format_name: str
) -> None:
    find_format(format_name)(uneven(), tokenizer, tmp_path / "saved")
    ours, theirs = (
        "import finllm_prune",
        "from transformers import AutoModelForSequenceClassification as Auto, pipeline",
    )
    light = f"{ours}; import sys; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    use = "Auto.from_pretrained('saved'); pipeline('text-classification', model='saved', device='cpu')('Profit rose.')"

    def python(*lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, text=True, capture_output=True, check=False
        )

    for order in ([light, theirs], [theirs, ours]):
        done = python(*order, use)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_the_import_each_format_says_what_to_install(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = ("ragged", "packed", "packed-int8")
    for name in names:
        find_format(name)(uneven(), tokenizer, tmp_path / name)
    code = (
        "import sys\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        Auto.from_pretrained(name, ignore_mismatched_sizes=True)\n"
        "    except OSError as error:\n"
        "        print(str(error).splitlines()[-1])\n"
        "assert 'finllm_prune' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == len(names)
    assert all("first_pip_install_finllm-prune_and_import_finllm_prune.safetensors" in line for line in told)


def test_a_missing_file_of_another_name_stands_for_the_same_weights(spoilt: Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    assert config["transformers_weights"] == LURE
    expected = logits(load(spoilt))
    config["transformers_weights"] = "first_import_finllm_prune.safetensors"
    (spoilt / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(spoilt)), expected)
