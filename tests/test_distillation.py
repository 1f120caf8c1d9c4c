"""Distillation: the losses against their formulas, teachers of another size, and logits that are computed once."""

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.training import Distillation, Teacher, uniform_layers, with_teacher_logits
from finllm_prune.training.layers import hidden_error, ordered_matches, relation_divergence
from finllm_prune.training.projection import PROJECTION_FILE
from tests.conftest import tiny_model
from tests.test_trainer import RULES, assert_same, rows, trainer, weights


def batch(n: int = 4, length: int = 9, pad: int = 4) -> dict[str, Tensor]:
    """A batch whose first text is shorter than the others."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.ones(n, length, dtype=torch.long)
    mask[0, length - pad :] = 0
    ids = torch.randint(5, 300, (n, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(n) % 3}


def unequal_rows(n: int = 48) -> datasets.Dataset:
    """Rows of 4 to 12 tokens."""
    ids = [row[: 4 + i % 9] for i, row in enumerate(rows(n)["input_ids"])]
    masks = [[1] * len(row) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": [i % 3 for i in range(n)]})


def states(width: int, seed: int, n: int = 3, length: int = 5) -> Tensor:
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))


def test_without_padding_the_loss_is_its_formula() -> None:
    student, teacher, inputs = tiny_model(seed=1), tiny_model(seed=2).eval(), batch(pad=0)
    outputs = student(**inputs, output_hidden_states=True)
    got = Teacher(teacher, Distillation(hidden=3.0), [0, 1]).loss(outputs, inputs)

    target = teacher(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    p, q = (F.log_softmax(logits / 2.0, -1) for logits in (target.logits, outputs.logits))
    divergence = F.kl_div(q, p, reduction="batchmean", log_target=True)
    kept = inputs["attention_mask"].unsqueeze(-1).float()
    layers = torch.zeros(())
    for own, other in zip(outputs.hidden_states[1:], target.hidden_states[1:], strict=True):
        layers = layers + ((own - other) * kept).square().sum() / (kept.sum() * 32)
    torch.testing.assert_close(got, 0.9 * 2.0 * 2.0 * divergence + (1.0 - 0.9) * outputs.loss + 3.0 * layers)


@pytest.mark.parametrize(
    ("kept", "depth", "teacher_depth", "expected"),
    [
        (range(6), 6, 6, [0, 1, 2, 3, 4, 5]),
        ([1, 3], 4, 4, [1, 3]),
        (range(6), 6, 12, [1, 3, 5, 7, 9, 11]),
        ([0, 2, 4], 6, 12, [1, 5, 11]),
        (range(4), 4, 6, [1, 2, 3, 5]),
        (range(6), 6, 2, [0, 0, 0, 0, 1, 1]),
    ],
)
def test_a_layer_imitates_the_layer_at_its_relative_height(
    kept: list[int], depth: int, teacher_depth: int, expected: list[int]
) -> None:
    assert uniform_layers(kept, depth, teacher_depth) == expected


@given(st.integers(1, 30), st.integers(1, 30))
def test_layers_are_matched_in_order_and_the_last_with_the_last(depth: int, teacher_depth: int) -> None:
    layers = uniform_layers(range(depth), depth, teacher_depth)
    assert layers == sorted(layers)
    assert layers[0] >= 0
    assert layers[-1] == teacher_depth - 1


@given(st.data())
def test_ordered_matches_have_the_smallest_sum_of_all_that_do_not_cross(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 7))
    n = data.draw(st.integers(1, columns))
    costs = data.draw(st.lists(st.integers(0, 50), min_size=n * columns, max_size=n * columns))
    cost = torch.tensor(costs, dtype=torch.float32).view(n, columns)
    found = ordered_matches(cost)
    assert found == sorted(set(found))
    every = itertools.combinations(range(columns), n)
    assert cost[range(n), found].sum() == min(cost[range(n), list(choice)].sum() for choice in every)


def test_relations_are_their_formula_in_numpy_across_widths() -> None:
    student, teacher = states(32, 1), states(48, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])

    def related(h: Any, i: int, others: list[int]) -> Any:
        scores = np.array([h[i] @ h[j] / math.sqrt(len(h[i])) for j in others])
        return np.exp(scores) / np.exp(scores).sum()

    texts = []
    for s, t, length in zip(student.double().numpy(), teacher.double().numpy(), mask.sum(1).tolist(), strict=True):
        tokens = []
        for i in range(length):
            others = [j for j in range(length) if j != i]
            p, q = related(t, i, others), related(s, i, others)
            tokens.append((p * np.log(p / q)).sum())
        texts.append(np.mean(tokens))
    got = relation_divergence(student, teacher, mask)
    assert got.item() == pytest.approx(np.mean(texts), rel=1e-5)
    assert got.item() > 0.1


def test_relations_do_not_see_a_rotation_nor_padding() -> None:
    student, mask = states(32, 1), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    turned = student @ torch.linalg.qr(torch.randn(32, 32)).Q
    assert relation_divergence(turned, student, mask).item() == pytest.approx(0.0, abs=1e-5)
    other, padded = states(48, 2), student.clone()
    padded[mask == 0] = 9.0
    assert relation_divergence(padded, other, mask) == relation_divergence(student, other, mask)


@pytest.mark.parametrize("loss", [hidden_error, relation_divergence])
def test_the_layers_of_a_batch_are_the_mean_of_its_parts_however_they_are_padded(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    student, teacher = states(32, 1, n=4), states(32, 2, n=4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    whole = loss(student, teacher, mask)
    parts = [loss(student[i : i + 2, :n], teacher[i : i + 2, :n], mask[i : i + 2, :n]) for i, n in ((0, 5), (2, 3))]
    torch.testing.assert_close(whole, sum(parts) / 2)


def test_the_loss_adds_relations_of_the_paired_layers() -> None:
    student, teacher, inputs = tiny_model(seed=1), tiny_model(layers=4, hidden=48, seed=2), batch()
    outputs = student(**inputs, output_hidden_states=True)
    without, with_relations = (
        Teacher(teacher, Distillation(hidden=0.0, relations=weight), [1, 3], 32) for weight in (0.0, 0.5)
    )
    target = teacher(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    pairs = [(outputs.hidden_states[1], target.hidden_states[2]), (outputs.hidden_states[2], target.hidden_states[4])]
    relations = sum(relation_divergence(own, other, inputs["attention_mask"]) for own, other in pairs)
    assert with_relations.projection is None
    torch.testing.assert_close(
        with_relations.loss(outputs, inputs), without.loss(outputs, inputs) + 0.5 * relations, rtol=1e-6, atol=1e-6
    )


def test_dynamic_layers_are_the_best_pairs_of_every_third_layer() -> None:
    """Four blocks imitate the blocks 1, 2, 3 and 5 of a teacher of six; of these, 5 and 1 are matched."""
    student, teacher, inputs = tiny_model(layers=4, seed=1), tiny_model(layers=6, seed=2).eval(), batch()
    outputs, target = (model(**inputs, output_hidden_states=True) for model in (student, teacher))
    errors = [
        [
            hidden_error(own, target.hidden_states[other + 1], inputs["attention_mask"])
            for own in outputs.hidden_states[1:]
        ]
        for other in (1, 5)
    ]
    best = min(errors[0][low] + errors[1][high] for low, high in itertools.combinations(range(4), 2))
    layers = uniform_layers(range(4), 4, 6)
    dynamic, none = Distillation(layers="dynamic", hidden=0.5), Distillation(hidden=0.0)
    torch.testing.assert_close(
        Teacher(teacher, dynamic, layers).loss(outputs, inputs),
        Teacher(teacher, none, layers).loss(outputs, inputs) + 0.5 * best,
    )


def test_dynamic_layers_find_a_layer_wherever_it_is_but_do_not_cross() -> None:
    teacher, inputs = tiny_model(layers=6, seed=2).eval(), batch()
    target = teacher(**inputs, output_hidden_states=True)
    embedded, _, _, third, _, _, sixth = target.hidden_states
    settings = Distillation(alpha=1.0, layers="dynamic")

    def loss(*hidden: Tensor) -> float:
        outputs = {"loss": target.loss, "logits": target.logits, "hidden_states": (embedded, *hidden)}
        return Teacher(teacher, settings, range(6)).loss(outputs, inputs).item()

    other = torch.zeros_like(third)
    for hidden in ((third, sixth, other), (other, third, other, sixth), (third, other, other, other, sixth)):
        assert loss(*hidden) == pytest.approx(0.0, abs=1e-6)
    assert loss(sixth, other, third, other) > 1e-4


def test_a_projection_is_trained_like_the_model_and_its_gradient_is_cleared(tmp_path: Path) -> None:
    """Four steps of two micro-batches by the Trainer, against a plain loop with one optimizer over both."""
    data, settings = rows(64), Distillation(hidden=0.5)
    run = trainer(
        tmp_path, None, model=tiny_model(seed=1), teacher=Teacher(tiny_model(hidden=48, seed=2), settings, [0, 1], 32),
        data=data, max_steps=4, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05, weight_decay=0.0,
        max_grad_norm=0.0, lr_scheduler_type="constant", train_sampling_strategy="sequential",
    )  # fmt: skip
    assert run.teacher is not None
    assert run.teacher.projection is not None
    before = run.teacher.projection.weight.clone()
    run.train()

    model, teacher = tiny_model(seed=1), Teacher(tiny_model(hidden=48, seed=2), settings, [0, 1], 32)
    assert teacher.projection is not None
    assert torch.equal(teacher.projection.weight, before)
    parameters = [*model.parameters(), *teacher.projection.parameters()]
    for step in range(4):
        loss = torch.zeros(())
        for part in (0, 1):
            start = (2 * step + part) * 8
            inputs = {key: torch.tensor(value) for key, value in data[start : start + 8].items()}
            loss = loss + teacher.loss(model(**inputs, output_hidden_states=True), inputs) / 2
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.05 * (torch.zeros(()) if gradient is None else gradient)
    assert_same(weights(run.model), weights(model), 1e-6)
    torch.testing.assert_close(run.teacher.projection.weight, teacher.projection.weight, rtol=0, atol=1e-6)
    assert (run.teacher.projection.weight - before).abs().max() > 1e-3


def test_a_run_with_a_wider_teacher_resumes_bit_for_bit_and_its_checkpoints_stay_plain(tmp_path: Path) -> None:
    def start(folder: Path, **arguments: Any) -> Any:
        model = tiny_model(layers=4, hidden=48, seed=2)
        teacher = Teacher(model, Distillation(layers="dynamic", relations=0.1), uniform_layers(range(2), 2, 4), 32)
        return trainer(folder, RULES["neuron"], teacher=teacher, **arguments)

    whole = start(tmp_path / "whole", save_strategy="steps", save_steps=5, max_steps=10)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert weights(plain).keys() == weights(tiny_model()).keys()
    assert load_file(checkpoint / PROJECTION_FILE)["weight"].shape == (48, 32)
    resumed = start(tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), max_steps=10)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(resumed.model), weights(whole.model))
    assert torch.equal(resumed.teacher.projection.weight, whole.teacher.projection.weight)
    (checkpoint / PROJECTION_FILE).unlink()
    again = start(tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(InputError, match=r"checkpoint-5: there is no projection\.safetensors"):
        again.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("where", ["projection", "model", "nowhere"])
def test_13_a_step_that_a_loss_scaler_skips_reaches_no_score_wherever_the_overflow_is(
    tmp_path: Path, where: str
) -> None:
    """The Trainer's events around a real scaler, which looks at all that the optimizer trains."""
    teacher = Teacher(tiny_model(hidden=48, seed=2), Distillation(), [0, 1], 32)
    run = trainer(tmp_path, RULES["unstructured"], teacher=teacher, max_steps=12)
    assert run.pruner is not None
    assert teacher.projection is not None
    run.args.fp16 = True  # what the callbacks ask; transformers refuses it without a GPU
    run.state.max_steps = 12
    run.callback_handler.optimizer = optimizer = run.create_optimizer()
    scaler, inputs = torch.amp.GradScaler("cpu"), batch()
    parameters = [*run.model.parameters(), *teacher.projection.parameters()]
    before, states = [parameter.detach().clone() for parameter in parameters], run.pruner.state_dict()

    scaler.scale(run.compute_loss(run.model.train(), dict(inputs))).backward()
    for name, module in {"projection": teacher.projection, "model": run.model.classifier}.items():
        if name == where:
            module.weight.grad[0, 0] = torch.inf
    scaler.unscale_(optimizer)
    run.callback_handler.on_pre_optimizer_step(run.args, run.state, run.control)
    scaler.step(optimizer)
    run.callback_handler.on_optimizer_step(run.args, run.state, run.control)

    moved = [not torch.equal(one, other) for one, other in zip(parameters, before, strict=True)]
    learned = [
        not torch.equal(value, states[key]) for key, value in run.pruner.state_dict().items() if key.endswith("/scores")
    ]
    assert any(moved) == all(learned) == any(learned) == (where == "nowhere")
    assert float(run.pruner.skipped) == (where != "nowhere")


def test_no_projection_where_the_widths_are_equal_or_nothing_needs_it() -> None:
    assert Teacher(tiny_model(), Distillation(), [0, 1], 32).projection is None
    assert Teacher(tiny_model(hidden=48), Distillation(hidden=0.0), [0, 1], 32).projection is None
    assert Teacher(tiny_model(hidden=48), Distillation(), [0, 1], 32).projection is not None


def test_label_smoothing_counts_with_a_teacher_too(tmp_path: Path) -> None:
    teacher = Teacher(tiny_model(seed=2), Distillation(alpha=0.0, hidden=0.0), [0, 1])
    run = trainer(tmp_path, None, teacher=teacher, label_smoothing_factor=0.2)
    inputs = batch()
    loss, outputs = run.compute_loss(run.model.train(), dict(inputs), return_outputs=True)
    torch.testing.assert_close(loss, F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.2))


def test_a_loss_function_of_the_users_own_is_refused_beside_a_teacher(tmp_path: Path) -> None:
    teacher = Teacher(tiny_model(seed=2), Distillation(), [0, 1])
    parts = {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}
    with pytest.raises(InputError, match="compute_loss_func"):
        trainer(tmp_path, None, teacher=teacher, parts=parts)
    trainer(tmp_path, None, parts=parts)


@pytest.fixture
def collator(tokenizer: PreTrainedTokenizerFast) -> DataCollatorWithPadding:
    return DataCollatorWithPadding(tokenizer)


def test_each_row_carries_the_logits_that_the_teacher_gives_it(
    tmp_path: Path, collator: DataCollatorWithPadding
) -> None:
    teacher, data = tiny_model(seed=2), unequal_rows()
    found = with_teacher_logits(teacher, data, collator, tmp_path, batch_size=7)
    alone = [teacher(torch.tensor([row])).logits[0] for row in data["input_ids"]]
    torch.testing.assert_close(torch.tensor(found["teacher_logits"][:]), torch.stack(alone), rtol=0, atol=1e-5)
    assert found["labels"] == data["labels"]


def test_kept_logits_are_read_again_but_never_for_another_teacher_or_other_rows(
    tmp_path: Path, collator: DataCollatorWithPadding
) -> None:
    teacher, data = tiny_model(seed=2), unequal_rows()
    with_teacher_logits(teacher, data, collator, tmp_path)
    [file] = tmp_path.iterdir()
    save_file({"teacher_logits": torch.full((48, 3), 7.0)}, file)
    assert with_teacher_logits(teacher, data, collator, tmp_path)["teacher_logits"][0] == [7.0, 7.0, 7.0]
    other_rows = with_teacher_logits(teacher, data.select(range(47, -1, -1)), collator, tmp_path)
    other_teacher = with_teacher_logits(tiny_model(seed=3), data, collator, tmp_path)
    assert 7.0 not in other_rows["teacher_logits"][0] + other_teacher["teacher_logits"][0]
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("sampling", ["random", "group_by_length"])
def test_a_run_on_kept_logits_is_the_run_beside_the_teacher(
    tmp_path: Path, collator: DataCollatorWithPadding, sampling: str
) -> None:
    ends = []
    for cache in (False, True):
        model, data = tiny_model(seed=2), unequal_rows()
        teacher = Teacher(model, Distillation(hidden=0.0, cache=cache), [0, 1])
        if cache:
            data = with_teacher_logits(model, data, collator, tmp_path / "logits")
            teacher.model = None  # type: ignore[assignment]  # whoever calls it fails
            teacher.to = lambda device: None  # type: ignore[method-assign]
        run = trainer(
            tmp_path, RULES["neuron"], teacher=teacher, data=data, train_sampling_strategy=sampling,
            parts={"data_collator": collator, "eval_dataset": unequal_rows(8)}, optim="sgd", max_steps=8,
            eval_strategy="epoch",
        )  # fmt: skip
        run.train()
        ends.append(weights(run.model))
    assert_same(*ends, 1e-6)


def train_as_a_rank(folder: Path, batch_size: int) -> None:
    """One process of a run with a wider teacher; writes what it ends with."""
    settings = Distillation(hidden=0.5, relations=0.3)
    teacher = Teacher(tiny_model(hidden=48, seed=2), settings, [0, 1], 32)
    run = trainer(
        folder, RULES["neuron"], model=tiny_model(seed=1), teacher=teacher, per_device_train_batch_size=batch_size,
        max_steps=4, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05,
    )  # fmt: skip
    run.train()
    assert teacher.projection is not None
    ends = weights(run.model) | {"projection": teacher.projection.weight.detach()}
    save_file(ends, folder / f"{run.args.world_size}-{run.args.process_index}")


@pytest.mark.slow
def test_two_ranks_train_the_projection_of_one(tmp_path: Path) -> None:
    train_as_a_rank(tmp_path, 8)
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [sys.executable, "-m", *launch, "-m", "tests.test_distillation", str(tmp_path)],
        cwd=Path(__file__).parents[1], env=environment, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    alone, first, second = (load_file(tmp_path / name) for name in ("1-0", "2-0", "2-1"))
    assert_same(first, second)
    assert_same(first, alone, 1e-6)


if __name__ == "__main__":
    train_as_a_rank(Path(sys.argv[1]), 4)
