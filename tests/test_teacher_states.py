"""Hidden states of a teacher that are kept on disk: what the student learns of them, and what becomes of the files."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

from finllm_prune.tasks.collating import PartsCollator
from finllm_prune.training import Distillation, Teacher, teacher_states
from finllm_prune.training.teacher_states import states_bytes
from tests.conftest import loud, tiny_model
from tests.test_distillation import unequal_rows
from tests.test_parts import documents, mean_of_parts
from tests.test_trainer import RULES, assert_same, trainer, weights


class Silent(torch.nn.Module):
    """In the place of a teacher's model that must not run again."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was asked")


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [({}, [0, 1]), ({"relations": 0.5}, [1]), ({"hidden": 0.0, "relations": 0.5}, [0, 1]), ({"layers": "dynamic"}, [0, 1])],
)  # fmt: skip
@pytest.mark.parametrize("width", [32, 48], ids=["same_width", "wider"])
def test_kept_answers_give_the_loss_of_the_teacher_itself(
    tmp_path: Path,
    collator: DataCollatorWithPadding,
    settings: dict[str, Any],
    layers: list[int],
    width: int,
) -> None:
    student, model, data = tiny_model(seed=1), loud(tiny_model(hidden=width, seed=2)), unequal_rows(12)
    live, kept = (Teacher(model, Distillation(**settings, cache=cache), layers, 32) for cache in (False, True))
    columns = kept.keep_answers(data, collator, tmp_path)
    assert kept.model is None
    for chosen in ([3, 0, 11, 7], [5], [2, 1]):
        inputs = collator([data[i] for i in chosen])
        answers = student(**inputs, output_hidden_states=True)
        expected = live.loss(answers, inputs)
        found = kept.loss(answers, collator([columns[i] for i in chosen]))
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


def test_rows_of_several_sequences_find_the_states_of_each(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model, collator, data = loud(tiny_model(seed=2)), PartsCollator(tokenizer, mean_of_parts), documents()
    teacher = Teacher(model, Distillation(cache=True), [0, 1])
    columns = teacher.keep_answers(data, collator, tmp_path)
    batch = collator([columns[i] for i in (4, 0, 2)])
    assert teacher.states is not None
    found = teacher.states.of(batch["teacher_row"], batch["attention_mask"])
    with torch.inference_mode():
        states = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[1:]
    for block, expected in enumerate(states):
        real = expected * batch["attention_mask"].unsqueeze(-1)
        torch.testing.assert_close(found[block].float(), real, rtol=4e-3, atol=1e-5)

    left = torch.arange(batch["attention_mask"].shape[1]) >= (1 - batch["attention_mask"]).sum(-1, keepdim=True)
    moved = teacher.states.of(batch["teacher_row"], left.long())
    for block, right in found.items():
        torch.testing.assert_close(moved[block][left], right[batch["attention_mask"].bool()], rtol=0, atol=0)
        assert not moved[block][~left].any()


@pytest.mark.parametrize("rule", ["neuron", None])
def test_a_run_on_kept_states_is_nearly_the_run_beside_the_teacher(
    tmp_path: Path, collator: DataCollatorWithPadding, rule: str | None
) -> None:
    ends = []
    for cache in (False, True):
        teacher, data = Teacher(tiny_model(seed=2), Distillation(cache=cache), [0, 1]), unequal_rows()
        if cache:
            data = teacher.keep_answers(data, collator, tmp_path / "kept")
        run = trainer(
            tmp_path, RULES[rule] if rule else None, teacher=teacher, data=data, train_sampling_strategy="group_by_length",
            parts={"data_collator": collator, "eval_dataset": unequal_rows(8)}, optim="sgd", max_steps=8,
            learning_rate=0.01, eval_strategy="epoch",
        )  # fmt: skip
        run.train()
        ends.append(weights(run.model))
    assert_same(*ends, 1e-5)
    started = weights(tiny_model())
    assert max(float((ends[0][name] - started[name]).abs().max()) for name in started) > 1e-3  # 100 times as far


def test_states_are_read_again_and_lie_in_files_of_a_size(
    tmp_path: Path, collator: DataCollatorWithPadding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_states, "_FILE_BYTES", 4000)
    model, data = tiny_model(seed=2), unequal_rows(20)
    first = Teacher(model, Distillation(cache=True), [0, 1])
    first.keep_answers(data, collator, tmp_path)
    [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
    tensors = [load_file(path) for path in sorted(folder.iterdir())]
    assert len(tensors) > 3
    held = {int(row): tensor for file in tensors for row, tensor in file.items()}
    assert sorted(held) == list(range(20))
    assert [held[row].shape for row in range(20)] == [(2, len(ids), 32) for ids in data["input_ids"]]
    assert sum(tensor.nbytes for tensor in held.values()) == states_bytes(data, [0, 1], 32)

    again = Teacher(model, Distillation(cache=True), [0, 1])
    forward = model.forward
    monkeypatch.setattr(model, "forward", Silent().forward)
    columns = again.keep_answers(data, collator, tmp_path)
    assert columns["teacher_row"] == list(range(20))
    with pytest.raises(AssertionError, match="asked"):  # other blocks are other states
        Teacher(model, Distillation(cache=True), [1]).keep_answers(data, collator, tmp_path)
    monkeypatch.setattr(model, "forward", forward)
    Teacher(model, Distillation(cache=True), [1]).keep_answers(data, collator, tmp_path)


def test_what_is_cut_short_leaves_no_half_folder_and_is_made_again(
    tmp_path: Path, collator: DataCollatorWithPadding, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = tiny_model(seed=2), unequal_rows(200)
    by_row, seen = teacher_states._by_row, []

    def fails(blocks: Iterable[Tensor], batch: dict[str, Tensor]) -> Sequence[Tensor]:
        seen.append(len(batch["input_ids"]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return by_row(blocks, batch)

    monkeypatch.setattr(teacher_states, "_by_row", fails)
    with pytest.raises(KeyboardInterrupt):
        Teacher(model, Distillation(cache=True), [0, 1]).keep_answers(data, collator, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not torch.is_inference_mode_enabled()
    columns = Teacher(model, Distillation(cache=True), [0, 1]).keep_answers(data, collator, tmp_path)
    assert len(columns) == 200
