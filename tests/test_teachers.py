"""Teachers that a recipe names: larger ones, kept logits, and those that cannot teach this model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.plan import plan
from finllm_prune.prepare import prepare
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run
from finllm_prune.training import Teacher
from tests import small
from tests.conftest import LABELS, tiny_model


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Makes a recipe of a tiny model whose teacher lies in the folder ``teacher``."""
    for name, sizes in {"model": {}, "teacher": {"layers": 4, "hidden": 48, "seed": 3}}.items():
        tiny_model(**sizes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    def make(**distillation: Any) -> Recipe:
        return parse(
            {
                "model": str(tmp_path / "model"),
                "task": {"name": "sentiment", "dataset": str(small.write_folder(tmp_path / "data"))},
                "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
                "dense": {"training": {"max_steps": 1}},
                "distillation": {"teacher": str(tmp_path / "teacher"), **distillation},
                "training": {"max_steps": 3, "use_cpu": True, "disable_tqdm": True},
                "export": ["masked"],
                "output": str(tmp_path / "out"),
            }
        )

    return make


def refusal(recipe: Recipe) -> str:
    with pytest.raises(InputError) as caught:
        prepare(recipe, resume=False, overwrite=False)
    assert not recipe.output.with_name("out.partial").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "distillation",
    [{"layers": "dynamic", "relations": 0.1}, {"cache": True, "hidden": 0.0}, {"cache": True}],
    ids=["wider_and_deeper", "kept_logits", "kept_states"],
)
def test_a_larger_teacher_leaves_a_plain_model_and_nothing_of_its_own(
    tmp_path: Path, recipe: Any, distillation: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    report = run(recipe(**distillation))
    assert report is not None
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "dense", "masked", "plots", "README.md", "report.json", "report.html", "flips.json", "recipe.yaml", "recorder.parquet",
    }  # fmt: skip
    assert (
        yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["distillation"].items() >= distillation.items()
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "masked")
    assert model.state_dict().keys() == tiny_model().state_dict().keys()
    assert model.config.hidden_size == 32


def test_a_run_on_kept_answers_with_recovery_is_the_run_beside_the_teacher(
    tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    keep, needed, ends = Teacher.keep_answers, [], []

    def weighed(teacher: Teacher, rows: Any, collator: Any, folder: Path) -> Any:
        rows = keep(teacher, rows, collator, folder)
        needed.append(sum(path.stat().st_size for path in folder.glob("teacher_states-*/*")))
        return rows

    monkeypatch.setattr(Teacher, "keep_answers", weighed)
    for cache in (False, True):
        content = recipe(cache=cache, layers="dynamic", relations=0.1).resolved | {
            "output": str(tmp_path / f"out{cache}"),
            "recovery": {},
        }
        content["model"] = {"name": content["model"]["name"], "keep_layers": [1]}
        made = parse(content)
        foretold = plan(made)
        assert run(made) is not None
        ends.append(load_file(tmp_path / f"out{cache}" / "masked" / "model.safetensors"))
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert ends[0].keys() == ends[1].keys()
    moved = []
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name] == 0, value == 0)
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=5e-4)  # Adam magnifies the rounding of bfloat16
        moved.append(float((value - start[name]).abs().max()) if start[name].shape == value.shape else 0.0)
    assert max(moved) > 5e-3
    of_plan, of_run = needed
    assert foretold.seconds["teacher"] > 0
    assert 0 < foretold.kept_bytes <= of_run < 1.3 * foretold.kept_bytes  # with a header for each file
    assert of_plan <= of_run
    assert f"{foretold.kept_bytes / 1e9:.2f} GB" in [row[2] for row in foretold.rows()]


def test_states_that_the_disk_has_no_room_for_are_refused_before_training(
    recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finllm_prune.training.teacher_states.free_bytes", lambda folder: 1000)
    assert "distillation.cache: the teacher's hidden states" in refusal(recipe(cache=True))
    prepare(recipe(cache=True, hidden=0.0), resume=False, overwrite=False)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, recipe: Any) -> None:
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 300)}
    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")
    other.save_pretrained(tmp_path / "teacher")
    assert "reads the texts as other tokens than the model" in refusal(recipe())


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path, recipe: Any) -> None:
    (tmp_path / "teacher" / "tokenizer.json").unlink()
    assert refusal(recipe()).startswith("distillation.teacher: ")


def test_a_teacher_of_other_labels_is_refused(tmp_path: Path, recipe: Any) -> None:
    teacher = tiny_model()
    teacher.config.id2label = dict(enumerate(reversed(LABELS)))
    teacher.save_pretrained(tmp_path / "teacher")
    assert "predicts positive, neutral, negative, not negative, neutral, positive in this order" in refusal(recipe())
