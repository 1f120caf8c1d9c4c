"""Deltas: one base in memory becomes each of its tasks, bit for bit, and is the base again afterwards."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from finllm_prune.checkpoints import delta, verify
from finllm_prune.checkpoints.manifest import MANIFEST, sha256
from finllm_prune.errors import InputError, ProofError
from finllm_prune.families import find_family
from finllm_prune.pruning import Constant, Cubic, Magnitude, Pruner, Rule, ScoreMovement, Unstructured
from tests.conftest import FAMILIES, tiny_model
from tests.pruning.runs import make_batches, make_optimizer, make_pruner, train


def by_score_movement(base: PreTrainedModel, sparsity: float = 0.5) -> PreTrainedModel:
    """Fine-tuning that chooses masks and trains the head; all else of the base stays."""
    model = copy.deepcopy(base)
    cut = {f"{path}.weight" for path in find_family("bert").linears(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in cut or name.startswith("classifier")
    pruner = make_pruner(
        model, Rule("encoder", sparsity, Unstructured(), ScoreMovement()), schedule=Cubic(0.1, 0.5, 0.8)
    )
    train(model, pruner, make_optimizer(model), make_batches(8))
    pruner.finish()
    return model.eval()


def by_fine_tuning(base: PreTrainedModel, sparsity: float = 0.5) -> PreTrainedModel:
    """All weights move, and those of least magnitude are cut."""
    model = copy.deepcopy(base)
    pruner = make_pruner(model, Rule("encoder", sparsity, Unstructured(), Magnitude()), schedule=Cubic(0.1, 0.5, 0.8))
    train(model, pruner, make_optimizer(model), make_batches(8))
    pruner.finish()
    return model.eval()


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tasks(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, PreTrainedModel]:
    """Folder of a delta -> the model that it was made of; all of one base."""
    folder = tmp_path_factory.mktemp("deltas")
    made = {
        folder / "masks": by_score_movement(base),
        folder / "tuned": by_fine_tuning(base),
        folder / "classes": other_classes(base),
    }
    for path, model in made.items():
        delta.write(base, model, path)
    return made


def other_classes(base: PreTrainedModel) -> PreTrainedModel:
    """The base's body with a head of two classes."""
    config = copy.deepcopy(base.config)
    config.id2label, config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    model = type(base)(config)
    model.bert.load_state_dict(base.bert.state_dict())
    return model.eval()


def bits(model: nn.Module) -> dict[str, tuple[tuple[int, ...], bytes]]:
    return {name: (tuple(t.shape), t.numpy().tobytes()) for name, t in model.state_dict().items()}


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=torch.arange(4, 40).view(3, 12)).logits


def test_one_base_becomes_each_task_in_turn(base: PreTrainedModel, tasks: dict[Path, PreTrainedModel]) -> None:
    model = copy.deepcopy(base)
    parameters = [id(parameter) for parameter in model.parameters()]
    for folder, expected in [*tasks.items(), *reversed(tasks.items())]:
        applied = delta.apply(model, folder)
        assert bits(model) == bits(expected)
        assert torch.equal(logits(model), logits(expected))
        assert model.config.id2label == expected.config.id2label
        assert model.config.label2id == expected.config.label2id
        assert model.num_labels == expected.num_labels == model.classifier.out_features
        applied.remove()
        assert bits(model) == bits(base)
        assert model.config.to_dict() == base.config.to_dict()
        assert [id(parameter) for parameter in model.parameters()] == parameters
        applied.remove()
        assert bits(model) == bits(base), "a second time changes nothing"


def test_a_delta_saved_with_the_base_is_the_task_s_model(
    base: PreTrainedModel, tasks: dict[Path, PreTrainedModel], tmp_path: Path
) -> None:
    for folder, expected in tasks.items():
        model = copy.deepcopy(base)
        delta.apply(model, folder)
        model.save_pretrained(tmp_path)
        assert bits(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == bits(expected)


def test_score_movement_costs_a_bit_a_weight(base: PreTrainedModel, tmp_path: Path) -> None:
    model = by_score_movement(base)
    counts = delta.write(base, model, tmp_path / "delta")
    linears = find_family("bert").linears(model)
    assert counts == {"equal": len(model.state_dict()) - len(linears) - 2, "zeros": len(linears), "values": 2}
    size, dense = (tmp_path / "delta" / delta.WEIGHTS).stat().st_size, 4 * sum(p.numel() for p in model.parameters())
    payload = sum(linear.weight.numel() for linear in linears.values()) // 8 + 4 * (3 * 32 + 3)
    assert payload <= size < payload + 2500, "the rest is the header of the file"
    assert size < 0.05 * dense


def test_fine_tuned_values_lie_there_too(base: PreTrainedModel, tmp_path: Path) -> None:
    sizes = {}
    for sparsity in (0.1, 0.9):
        counts = delta.write(base, by_fine_tuning(base, sparsity), tmp_path / "delta")
        assert counts["zeros"] == 0
        sizes[sparsity] = (tmp_path / "delta" / delta.WEIGHTS).stat().st_size
    weights = sum(linear.weight.numel() for linear in find_family("bert").linears(base).values())
    assert sizes[0.1] > 0.9 * 4 * weights, "what was tuned is no bit"
    assert sizes[0.1] - sizes[0.9] == pytest.approx(weights * 0.8 * 4, rel=0.05)


@given(
    shape=st.sampled_from([(), (7,), (5, 9), (2, 3, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64]),
    cut=st.floats(0, 1), moved=st.floats(0, 1), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_difference_of_two_tensors_is_told_exactly(
    shape: tuple[int, ...], dtype: torch.dtype, cut: float, moved: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randint(-2, 3, shape, generator=generator).to(dtype)) * (-1 if dtype.is_floating_point else 1)
    change = torch.rand(shape, generator=generator) < moved
    model = torch.where(change, torch.randint(-2, 3, shape, generator=generator).to(dtype) * 0.5, base).to(dtype)
    model[torch.rand(shape, generator=generator) < cut] = 0
    holder = nn.Module()
    holder.register_buffer("x", base.clone())
    parts = delta._difference(base, model)
    for where, values in delta._changes(parts, base.shape):
        delta._put(holder, "x", where, values)  # type: ignore[arg-type]
    assert bytes(holder.x.view(-1).view(torch.uint8).tolist()) == bytes(model.view(-1).view(torch.uint8).tolist())
    assert parts == {} or sum(part.nbytes for part in parts.values()) <= max(model.nbytes, -(-model.numel() // 8))


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("tuned", [False, True], ids=["zeros", "values"])
def test_every_family_has_its_delta(tmp_path: Path, model_type: str, tuned: bool) -> None:
    base = tiny_model(model_type).eval()
    model, before = copy.deepcopy(base), bits(base)
    if tuned:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.view(-1)[::3] += 0.01
    family, rule = find_family(model_type), Rule("encoder", 0.5, Unstructured(), Magnitude())
    Pruner(family.groups(model, [rule]), Constant()).finish()
    counts = delta.write(base, model, tmp_path / "delta")
    assert (counts["zeros"], counts["equal"]) == (0, 0) if tuned else counts["zeros"] == len(family.linears(model))
    assert verify(tmp_path / "delta")["format"] == "delta"
    applied = delta.apply(base, tmp_path / "delta")
    assert bits(base) == bits(model)
    assert torch.equal(logits(base), logits(model))
    applied.remove()
    assert bits(base) == before


def moved(model: PreTrainedModel) -> None:
    model.bert.embeddings.LayerNorm.bias.data[0] += 1e-3


def in_bfloat16(model: PreTrainedModel) -> None:
    nn.Module.to(model, dtype=torch.bfloat16)


def with_a_delta(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].output.dense.weight.data[0] = 0


@pytest.mark.parametrize("change", [moved, in_bfloat16, with_a_delta])
def test_a_model_that_is_not_the_base_is_refused(
    base: PreTrainedModel, tasks: dict[Path, PreTrainedModel], change: Callable[[PreTrainedModel], None]
) -> None:
    other = copy.deepcopy(base)
    change(other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for folder in tasks:
        with pytest.raises(
            InputError, match="the model in memory is not this delta's base, a bert model with the sha256"
        ):
            delta.apply(other, folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_the_head_of_the_base_does_not_matter(base: PreTrainedModel, tasks: dict[Path, PreTrainedModel]) -> None:
    other = copy.deepcopy(base)
    other.classifier.weight.data.normal_()
    for folder, expected in tasks.items():
        applied = delta.apply(other, folder)
        assert bits(other) == bits(expected)
        applied.remove()


@pytest.mark.parametrize("model", [tiny_model(layers=1), tiny_model("roberta"), tiny_model(hidden=16)])
def test_models_of_other_shapes_have_no_delta(base: PreTrainedModel, tmp_path: Path, model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="not the base's in name, shape and dtype"):
        delta.write(base, model, tmp_path / "delta")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_delta_leaves_the_base_as_it_was(base: PreTrainedModel, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    delta.write(base, by_score_movement(base), folder)
    assert verify(folder)["format"] == "delta"
    content = (folder / delta.WEIGHTS).read_bytes()
    (folder / delta.WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ProofError, match=r"delta\.safetensors is missing or is not the file that was proved"):
        delta.apply(base, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"] = {delta.WEIGHTS: sha256(folder / delta.WEIGHTS)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    before = bits(base)
    with pytest.raises(ProofError, match="cannot be applied: the result is not the model that it was made of"):
        delta.apply(base, folder)
    assert bits(base) == before


@pytest.mark.parametrize("version", [0, 2, -1])
def test_a_delta_of_another_version_is_neither_proved_nor_applied(
    base: PreTrainedModel, tasks: dict[Path, PreTrainedModel], tmp_path: Path, version: int
) -> None:
    shutil.copytree(next(iter(tasks)), tmp_path / "delta")
    manifest, before = json.loads((tmp_path / "delta" / MANIFEST).read_text()), bits(base)
    (tmp_path / "delta" / MANIFEST).write_text(json.dumps(manifest | {"format_version": version}))
    for read in (verify, lambda folder: delta.apply(base, folder)):
        with pytest.raises(
            ProofError, match=rf"has the format version {version}, and this finllm_prune reads 1; upgrade"
        ):
            read(tmp_path / "delta")
    assert bits(base) == before


def test_a_whole_checkpoint_is_no_delta(base: PreTrainedModel, tmp_path: Path, tokenizer) -> None:
    from finllm_prune.checkpoints import find_format

    find_format("masked")(base, tokenizer, tmp_path / "masked")
    with pytest.raises(InputError, match="holds a masked checkpoint and no delta; load it with from_pretrained"):
        delta.apply(base, tmp_path / "masked")
