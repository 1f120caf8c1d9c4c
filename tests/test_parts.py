"""Rows of several sequences: the trainer, its teacher and the evaluation see rows, the model sees sequences."""

from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, TrainingArguments

from finllm_prune.inference import logits_of, outputs_of
from finllm_prune.tasks.collating import PartsCollator
from finllm_prune.training import Distillation, PruningTrainer, Teacher, with_teacher_logits
from tests.conftest import loud, tiny_model

PARTS = [3, 1, 2, 1, 4, 2]


def mean_of_parts(logits: Tensor, parts: Tensor) -> Tensor:
    return torch.stack([of_row.mean(0) for of_row in logits.split(parts.tolist())])


def documents() -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [
        [torch.randint(4, 300, (5 + row + part,), generator=generator).tolist() for part in range(parts)]
        for row, parts in enumerate(PARTS)
    ]
    masks = [[[1] * len(part) for part in row] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": [0, 1, 2, 0, 1, 2]})


def one_by_one(model: torch.nn.Module) -> Tensor:
    with torch.inference_mode():
        rows = [
            torch.stack([model(torch.tensor([part])).logits[0] for part in row]).mean(0)
            for row in documents()["input_ids"]
        ]
    return torch.stack(rows)


def trainer(
    folder: Path, tokenizer: PreTrainedTokenizerFast, rows: datasets.Dataset, teacher: Teacher | None = None
) -> PruningTrainer:  # fmt: skip
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=3, max_steps=2, learning_rate=1e-3, report_to="none", disable_tqdm=True,
        save_strategy="no", use_cpu=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    return PruningTrainer(
        tiny_model(seed=1), arguments, train_dataset=rows, eval_dataset=documents(), teacher=teacher,
        data_collator=PartsCollator(tokenizer, mean_of_parts), task_loss=torch.nn.functional.cross_entropy,
    )  # fmt: skip


def test_a_batch_holds_the_sequences_of_all_rows_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = documents()
    batch = PartsCollator(tokenizer, mean_of_parts)([rows[0], rows[1]])
    assert batch["parts"].tolist() == [3, 1]
    assert batch["labels"].tolist() == [0, 1]
    given = [part for row in rows["input_ids"][:2] for part in row]
    assert [ids[: len(part)].tolist() for ids, part in zip(batch["input_ids"], given, strict=True)] == given
    assert batch["attention_mask"].sum(-1).tolist() == [len(part) for part in given]


def test_logits_of_rows_are_those_of_each_row_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    model = loud(tiny_model())
    found = logits_of(model, documents(), PartsCollator(tokenizer, mean_of_parts), batch_size=4)
    torch.testing.assert_close(found, one_by_one(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_a_batch_counts_sequences_not_rows(tokenizer: PreTrainedTokenizerFast, most: int) -> None:
    batches = [
        batch for _, batch, _ in outputs_of(tiny_model(), documents(), PartsCollator(tokenizer, mean_of_parts), most)
    ]
    assert sum(len(batch["labels"]) for batch in batches) == len(PARTS)
    for batch in batches:
        assert len(batch["input_ids"]) <= most or len(batch["labels"]) == 1


def test_rows_of_one_sequence_train_as_plain_rows_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = documents()
    first = [row[:1] for row in whole["input_ids"]]
    masks = [[[1] * len(part) for part in row] for row in first]
    nested = datasets.Dataset.from_dict({"input_ids": first, "attention_mask": masks, "labels": whole["labels"][:]})
    plain = datasets.Dataset.from_dict(
        {"input_ids": [row[0] for row in first], "attention_mask": [row[0] for row in masks], "labels": whole["labels"][:]}
    )  # fmt: skip
    runs = []
    for rows, collator in ((nested, None), (plain, DataCollatorWithPadding(tokenizer))):
        run = trainer(tmp_path, tokenizer, rows)
        run.data_collator = collator or run.data_collator
        run.train()
        runs.append(dict(run.model.named_parameters()))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(parameter, runs[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_is_compared_row_by_row(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, cached: bool) -> None:
    model = loud(tiny_model(seed=3))
    settings = Distillation(alpha=1.0, temperature=1.0, hidden=0.0)
    rows = documents()
    if cached:
        rows = with_teacher_logits(model, rows, PartsCollator(tokenizer, mean_of_parts), tmp_path / "logits")
    run = trainer(tmp_path, tokenizer, rows, Teacher(model, settings, [0, 1]))
    run.model.eval()
    batch = run.data_collator([rows[i] for i in range(6)])
    student = one_by_one(run.model).log_softmax(-1)
    run.model.train()  # without dropout it computes the same, and the teacher speaks
    expected = torch.nn.functional.kl_div(
        student, one_by_one(model).log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(run.compute_loss(run.model, batch), expected, atol=1e-5, rtol=1e-4)


def test_the_trainer_evaluates_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    run = trainer(tmp_path, tokenizer, documents())
    found = run.predict(documents())
    torch.testing.assert_close(torch.tensor(found.predictions), one_by_one(run.model.eval()), atol=1e-5, rtol=1e-4)
    assert found.label_ids.tolist() == documents()["labels"][:]
