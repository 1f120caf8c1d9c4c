"""A reranker that learns from a sentence encoder, dense and pruned: its cosines, the loss, and what is refused."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.inference import logits_of
from finllm_prune.prepare import Prepared, prepare, read
from finllm_prune.recipe import parse
from finllm_prune.run import dense, prune
from finllm_prune.training import Cosines
from finllm_prune.training.logit_losses import centred_mse
from tests.rankings import write_set


@pytest.fixture
def encoder(tmp_path: Path, tiny_folder) -> Path:
    """Of the mean over a tiny model's last states, which is also the base of the reranker."""
    base = Transformer(str(tiny_folder()))
    SentenceTransformer(modules=[base, Pooling(base.get_embedding_dimension())], device="cpu").save(
        str(tmp_path / "encoder")
    )
    return tmp_path / "encoder"


def test_scores_of_a_list_are_compared_whatever_is_added_and_without_what_fills_it_up() -> None:
    teacher = torch.tensor([[3.0, 1.0, 9.0], [4.0, 0.0, 0.0]])
    student = torch.tensor([[1.0, 0.0, 5.0], [2.0, 0.0, 1.0]], requires_grad=True)
    relevance = torch.tensor([[1, 0, -100], [0, 1, 0]])
    distance = centred_mse(student, teacher, relevance)
    # Off by -2 and -1; by -2, 0 and 1.
    assert distance.item() == pytest.approx((np.var([-2, -1]) + np.var([-2, 0, 1])) / 2)
    distance.backward()
    assert student.grad is not None
    assert student.grad[0, 2] == 0
    assert centred_mse(teacher + 7.0, teacher, relevance).item() == pytest.approx(0.0, abs=1e-6)


def test_cosines_are_those_of_the_encoder_on_texts_cut_to_what_the_reranker_reads(encoder: Path) -> None:
    rows = Dataset.from_list([
        {"text": "goodwill", "passages": ["goodwill was paid in march " * 9, "no lease was booked"]},
        {"text": "what is a swap", "passages": ["goodwill"]},
    ])  # fmt: skip
    arguments = TrainingArguments(output_dir=str(encoder / "out"), use_cpu=True)
    found = Cosines(str(encoder)).of(rows, str(encoder), 12, 3, arguments)
    model, tokenizer = (auto.from_pretrained(encoder) for auto in (AutoModel, AutoTokenizer))

    def embed(text: str) -> torch.Tensor:
        tokens = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
        return F.normalize(model.eval()(**tokens).last_hidden_state[0].mean(0), dim=0)

    with torch.no_grad():
        expected = [[(embed(row["text"]) @ embed(told)).item() for told in row["passages"]] for row in rows]
    torch.testing.assert_close(found[0, :2], torch.tensor(expected[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], torch.tensor([*expected[1], 0.0, 0.0]), rtol=1e-4, atol=1e-5)


def written(encoder: Path, folder: Path, **cosines: object) -> dict[str, Any]:
    return {
        "model": str(encoder), "task": {"name": "reranking", "dataset": str(folder), "max_length": 24, "candidates": 4},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
        "cosines": {"encoder": str(encoder), **cosines},
        "training": {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "report_to": "none",
                     "save_strategy": "no", "use_cpu": True, "disable_tqdm": True},
        "output": str(folder.with_name("out")),
    }  # fmt: skip


def far_off(ready: Prepared, *models: PreTrainedModel) -> list[Tensor]:
    """How far the scores of each model are from the cosines that the run has kept."""
    (kept,) = (ready.work / "checkpoints").glob("cosines-*.safetensors")
    cosines, rows = 10 * load_file(kept)["cosines"], ready.tokens["train"]
    collator, labels = ready.recipe.task.collator(ready.tokenizer), torch.tensor(rows["labels"])
    return [centred_mse(logits_of(model, rows, collator), cosines, labels) for model in models]


def test_a_dense_reranker_learns_the_cosines_of_its_own_base(tmp_path: Path, encoder: Path) -> None:
    asked = written(encoder, write_set(tmp_path / "set"), alpha=1.0)
    asked |= {"dense": {"dropout": 0.05}, "distillation": {"dropout": 0.2}}
    ready = prepare(parse(asked), resume=False, overwrite=False)
    fresh = copy.deepcopy(ready.model)
    learned = dense(ready)
    off = far_off(ready, fresh, learned)
    assert {module.p for module in ready.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.05}
    assert {module.p for module in learned.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert off[1] < 0.5 * off[0]
    student, *_ = prune(ready, {})
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}


@pytest.mark.parametrize(
    "distillation", [{"alpha": 0.5, "hidden": 0.0, "cache": True}, {"alpha": 0.5, "hidden": 0.0}, False]
)
def test_the_pruned_reranker_learns_the_cosines_too(
    tmp_path: Path, encoder: Path, tiny_folder, distillation: dict[str, Any] | bool
) -> None:
    untaught = tiny_folder(labels=["relevance"], seed=4)
    asked = written(encoder, write_set(tmp_path / "set"), alpha=1.0)
    asked |= {"dense": {"checkpoint": str(untaught)}, "distillation": distillation}
    ready = prepare(parse(asked), resume=False, overwrite=False)
    before = dense(ready)
    student, *_ = prune(ready, {})
    off = far_off(ready, before, student)
    assert off[1] < 0.8 * off[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": {"name": "sentiment"}}, "cosines: they compare a query with passages"),
        ({"cosines": {"encoder": "nowhere/at all"}}, "cosines.encoder: there is no folder"),
        ({"cosines": {"encoder": "it", "alpha": 2.0}}, "cosines: alpha must lie in 0..1"),
        ({"dense": {"dropout": 1.0}}, "dense.dropout: a part from 0 to below 1 is dropped, not 1"),
        ({"distillation": {"dropout": -0.1}}, "distillation.dropout: a part from 0 to below 1 is dropped, not -0.1"),
    ],
)
def test_cosines_that_cannot_teach_are_refused(
    tmp_path: Path, encoder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        read(parse(written(encoder, write_set(tmp_path / "set")) | changes))


def test_a_missing_package_is_told_before_training(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(InputError, match="which is not installed: pip install"):
        read(parse(written(encoder, write_set(tmp_path / "set"))))
