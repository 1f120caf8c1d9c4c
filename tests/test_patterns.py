"""Targets by patterns of module paths: on families, on models without one, and on any module."""

from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.families import Architecture, find_architecture
from finllm_prune.pruning import Criterion, Cubic, Magnitude, Movement, Platon, Pruner, Rule, Taylor
from finllm_prune.training import PruningTrainer, Recording
from tests.conftest import tiny_model
from tests.pruning.runs import make_structure


class Plain(nn.Module):
    """No transformers model: an embedding, torch's own encoder, and an output layer with the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decode = nn.Linear(16, 20, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decode(self.encoder(self.embed(ids)))


def targets(model: nn.Module, target: str, architecture: Architecture | None = None) -> list[str]:
    return [group.name for group in (architecture or Architecture()).groups(model, [Rule(target, 0.5)])]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"encoder.*.linear\d", [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]),
        (r"1\.linear\d", ["encoder.layers.1.linear1", "encoder.layers.1.linear2"]),
        (
            "linear1|out_proj",
            [f"encoder.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.out_proj", "linear1")],
        ),
        ("encoder.layers.0.linear2", ["encoder.layers.0.linear2"]),
        (".*", [f"encoder.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.out_proj", "linear1", "linear2")]),
    ],
)
def test_a_pattern_matches_whole_names_at_the_end_of_a_path(pattern: str, found: list[str]) -> None:
    assert targets(Plain(), pattern) == found


@pytest.mark.parametrize("pattern", ["inear1", "linear", "encoder", "layers.0"])
def test_part_of_a_name_is_no_match(pattern: str) -> None:
    with pytest.raises(
        InputError, match=rf"target '{pattern}' matches no linear layer.*which here are as encoder\.layers\.0"
    ):
        targets(Plain(), pattern)


@pytest.mark.parametrize("structure", ["unstructured", "n:m", "block"])
@pytest.mark.parametrize("criterion", [Magnitude()])
def test_any_module_is_pruned(structure: str, criterion: Criterion) -> None:
    model = Plain()
    rule = Rule(r"linear\d", 0.5, make_structure(structure), criterion)
    pruner = Pruner(Architecture().groups(model, [rule]), Cubic())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        ids = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        pruner.before_step((step + 1) / 4)
        optimizer.step()
        pruner.after_step()
        optimizer.zero_grad()
    pruner.finish()
    for name, parameter in model.named_parameters():
        expected = 0.5 if name.endswith(("linear1.weight", "linear2.weight")) else 0.0
        assert float((parameter == 0).float().mean()) == expected, name


@pytest.mark.parametrize("criterion", [Movement(), Taylor(), Platon()])
def test_any_module_that_a_trainer_takes_is_pruned_recorded_and_resumed(tmp_path: Path, criterion: Criterion) -> None:
    class Answering(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.decode = nn.Linear(16, 20)  # a checkpoint of tied weights is transformers' business

        def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = super().forward(ids)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}

    def start(name: str, checkpoint: str | None = None) -> PruningTrainer:
        model = Answering()
        pruner = Pruner(Architecture().groups(model, [Rule(r"linear\d", 0.5, criterion=criterion)]), Cubic())
        arguments = TrainingArguments(
            str(tmp_path / name), max_steps=12, per_device_train_batch_size=4, save_steps=6, disable_tqdm=True, use_cpu=True,
            report_to="none", dataloader_pin_memory=False, resume_from_checkpoint=checkpoint,
        )  # fmt: skip
        return PruningTrainer(model, arguments, pruner=pruner, recording=Recording(), train_dataset=rows)

    ids = torch.randint(0, 20, (48, 5), generator=torch.Generator().manual_seed(0)).tolist()
    rows = datasets.Dataset.from_dict({"ids": ids, "labels": ids})
    whole = start("whole")
    whole.train()
    for name, parameter in whole.model.named_parameters():
        expected = 0.5 if name.endswith(("linear1.weight", "linear2.weight")) else 0.0
        assert float((parameter == 0).float().mean()) == expected, name
    assert whole.recorder is not None
    assert whole.recorder.table().num_rows == 12 * 4
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")
    resumed = start("resumed", checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    state = resumed.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("structure", ["neuron", "head", "layer"])
def test_what_cuts_several_matrices_needs_a_family(structure: str) -> None:
    rule = Rule("linear1", 0.5, make_structure(structure))
    with pytest.raises(
        InputError, match=rf"structure {structure} cuts several.*families/plain\.py.*use unstructured, n:m or"
    ):
        Architecture().groups(Plain(), [rule])


@pytest.mark.parametrize("structure", ["neuron", "head", "layer"])
def test_what_cuts_several_matrices_takes_no_pattern_of_a_family_either(structure: str) -> None:
    model, cut = tiny_model(), make_structure(structure)
    with pytest.raises(
        InputError, match=rf"structure {structure} exists in target .* only, not in query; set target: "
    ):
        find_architecture("bert").groups(model, [Rule("query", 0.5, cut)])


def test_a_family_takes_patterns_too() -> None:
    bert = find_architecture("bert")
    found = targets(tiny_model(), r"0.attention.self.(query|key)", bert)
    assert found == [f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key")]
    assert targets(tiny_model(), "pooler.dense", bert) == ["bert.pooler.dense"]


@pytest.mark.parametrize("pattern", ["classifier", "class.*"])
def test_a_head_is_no_target(pattern: str) -> None:
    with pytest.raises(InputError, match=rf"target '{pattern}' is classifier, an output layer, which is never cut"):
        targets(tiny_model(), pattern, find_architecture("bert"))


def test_an_output_layer_that_is_tied_to_the_embedding_is_no_target() -> None:
    with pytest.raises(InputError, match="target 'decode' is decode, an output layer, which is never cut"):
        targets(Plain(), "decode")
    model = AutoModelForMaskedLM.from_config(tiny_model().config)
    with pytest.raises(InputError, match=r"is cls\.predictions\.decoder, an output layer"):
        targets(model, "decoder", find_architecture("bert"))


def test_a_weight_that_layers_share_is_one_target() -> None:
    model = Plain()
    first, second = model.encoder.layers
    second.linear1.weight = first.linear1.weight
    assert targets(model, "linear1") == ["encoder.layers.0.linear1"]


@pytest.mark.parametrize("pattern", ["(", "linear[", "*"])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match="is no regular expression"):
        targets(Plain(), pattern)


def test_a_model_without_linear_layers_has_no_target() -> None:
    with pytest.raises(InputError, match=r"which here are as \(there is no nn\.Linear\)"):
        targets(nn.Sequential(nn.Conv1d(1, 1, 1)), "mlp")
