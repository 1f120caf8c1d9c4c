"""One test or more for each trap of the design that concerns the Pruner alone; the numbers are the design's."""

import ast
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM, PreTrainedModel

import finllm_prune
from finllm_prune.errors import InputError
from finllm_prune.evaluation import removed
from finllm_prune.pruning import (
    CRITERIA,
    Block,
    Criterion,
    Cubic,
    Group,
    Magnitude,
    Movement,
    Pruner,
    Rule,
    Site,
    Slot,
    Unstructured,
)
from finllm_prune.pruning.budgets import kth_largest, select
from tests.conftest import DECODERS, FAMILIES, tiny_model
from tests.pruning.runs import SHARES, make_batches, make_optimizer, make_pruner, make_rule, train

SOURCES = sorted(Path(finllm_prune.__file__).parent.rglob("*.py"))


def layer_pruner(weight: Tensor, criterion: Criterion, schedule: Cubic, sparsity: float = 0.5) -> Pruner:
    """A pruner of one weight, whose gradient the test writes itself."""
    parameter = nn.Parameter(weight)
    parameter.grad = torch.zeros_like(weight)
    rule = Rule("encoder", sparsity, Unstructured(), criterion)
    return Pruner([Group("layer", rule, [Slot("layer.weight", parameter, Site("layer"))])], schedule)


def parameter_of(pruner: Pruner) -> nn.Parameter:
    return pruner.groups[0].slots[0].parameter


# 1. Scores in bf16: 1.0 + 1e-3 stays 1.0.


@pytest.mark.parametrize("criterion", CRITERIA)
def test_1_scores_and_moments_of_a_bf16_model_are_fp32(criterion: str):
    model = tiny_model(layers=1).to(torch.bfloat16)
    pruner, batches = make_pruner(model, make_rule(criterion=criterion)), make_batches(10)
    train(model, pruner, make_optimizer(model), batches, range(5))
    state = {key: tensor for key, tensor in pruner.state_dict().items() if "/state/" in key}
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    for group in pruner.groups:
        score = group.rule.criterion.score(
            group, {k.rpartition("/")[2]: v for k, v in state.items() if group.name in k}
        )
        assert score.dtype == torch.float32


def test_1_scores_of_a_bf16_model_make_steps_that_bf16_would_swallow():
    pruner = layer_pruner(
        torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16), Movement(travel=10.0, initial=1.0), Cubic()
    )
    before = pruner.state_dict()["layer/state/scores"]
    parameter_of(pruner).grad = -torch.ones(1, 4, dtype=torch.bfloat16)
    pruner.before_step(1e-4)  # so the scores move by travel * 1e-4 = 1e-3
    after = pruner.state_dict()["layer/state/scores"]
    assert (after - before).flatten().tolist() == pytest.approx([1e-3] * 4, rel=1e-2)
    assert torch.equal(after[0, 2:].bfloat16(), before[0, 2:].bfloat16())


def test_1_parked_values_of_a_bf16_model_come_back_exactly():
    model = tiny_model(layers=1).to(torch.bfloat16)
    whole = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pruner = make_pruner(model, make_rule(criterion="random"), schedule=Cubic(0.0, 0.5, 1.0))
    for step in range(4):  # no optimizer: whatever changes is the pruner's doing
        pruner.before_step((step + 1) / 8)
        assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())
        pruner.after_step()
        assert pruner.sparsity() > 0.2


# 2. Adam's moments move a zeroed weight again.


@pytest.mark.parametrize("structure", ["unstructured", "block", "neuron", "head"])
def test_2_the_momentum_of_adamw_moves_no_pruned_weight(structure: str):
    model, batches = tiny_model(layers=1), make_batches(20)
    pruner, optimizer = make_pruner(model, make_rule(structure)), make_optimizer(model)
    moved = 0
    for step, batch in enumerate(batches):
        model(**batch).loss.backward()
        pruner.before_step((step + 1) / len(batches))
        frozen = pruner.frozen
        optimizer.step()
        slots = [(group, slot) for group in pruner.groups for slot in group.slots]
        moved += sum(int(slot.weight[group.pruned(slot)].count_nonzero()) for group, slot in slots if frozen)
        pruner.after_step()
        for group, slot in slots:
            assert not slot.weight[group.pruned(slot)].any(), f"step {step + 1}, {slot.name}"
        optimizer.zero_grad()
    assert moved > 0, "AdamW moved no cut weight, so this run could not have failed"


# 3. Schedules in absolute steps never prune on small tasks.


@pytest.mark.parametrize("criterion", CRITERIA)
def test_3_ten_steps_and_a_thousand_reach_the_same_sparsity(criterion: str):
    reached = []
    for steps in (10, 1000):
        generator = torch.Generator().manual_seed(0)
        pruner = layer_pruner(torch.randn(10, 20, generator=generator), CRITERIA[criterion](), Cubic(), 0.9)
        for step in range(steps):
            parameter_of(pruner).grad = torch.randn(10, 20, generator=generator)
            pruner.before_step((step + 1) / steps)
            pruner.after_step()
        assert pruner.frozen
        reached.append(pruner.sparsity())
    assert reached == pytest.approx([0.9, 0.9])


def test_3_ten_steps_and_a_thousand_are_equally_sparse_on_the_way():
    ways = []
    for steps in (10, 1000):
        pruner = layer_pruner(torch.arange(200.0).view(10, 20), Magnitude(), Cubic(0.1, 0.7, 0.9, updates=1000), 0.9)
        ways.append([])
        for step in range(steps):
            pruner.before_step((step + 1) / steps)
            pruner.after_step()
            if (step + 1) * 10 % steps == 0:
                ways[-1].append(pruner.sparsity())
    assert ways[0] == ways[1]
    assert len(set(ways[0])) > 5


# 4. All-equal scores make top-k arbitrary.


@pytest.mark.parametrize("budget", SHARES)
def test_4_equal_scores_cut_nothing_and_warn(budget: str, caplog: pytest.LogCaptureFixture):
    model, rule = tiny_model(layers=1), make_rule(criterion="movement", budget=budget)
    pruner = make_pruner(model, Rule(rule.target, 0.5, rule.structure, Movement(initial=0.0), rule.budget))
    with caplog.at_level(logging.WARNING):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pruner.before_step(0.5)
        pruner.after_step()
    assert "No cut at progress 0.500: all Movement scores of a matrix are equal." in caplog.messages
    assert pruner.sparsity() == 0.0
    assert all(mask.all() for mask in pruner.masks().values())
    assert not pruner.frozen


def test_4_scores_that_are_still_equal_at_the_end_are_an_error():
    pruner = layer_pruner(torch.ones(3, 4), Movement(initial=0.0), Cubic())
    pruner.before_step(0.95)
    with pytest.raises(InputError, match="all Movement scores of target encoder are still equal at the end"):
        pruner.after_step()


def test_4_finish_with_scores_that_never_moved_is_an_error():
    pruner = layer_pruner(torch.ones(3, 4), Movement(initial=0.0), Cubic())
    with pytest.raises(InputError, match="are still equal at the end"):
        pruner.finish()


def test_4_scores_that_have_moved_cut_from_a_start_of_zeros(caplog: pytest.LogCaptureFixture):
    pruner = layer_pruner(torch.ones(1, 4), Movement(initial=0.0), Cubic())
    parameter_of(pruner).grad = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    pruner.before_step(0.95)
    pruner.after_step()
    assert pruner.masks()["layer"].tolist() == [[False, True, False, True]]
    assert not caplog.messages


def test_4_ties_are_cut_in_the_order_of_their_index():
    pruner = layer_pruner(torch.tensor([[1.0, 2.0, 1.0, 1.0, 1.0, 2.0]]), Magnitude(), Cubic())
    pruner.finish()
    assert pruner.masks()["layer"].tolist() == [[True, True, False, False, False, True]]


# 9. A pruned neuron's bias leaks through the activation.


@pytest.mark.parametrize("budget", SHARES)
def test_9_the_output_of_a_block_is_that_of_a_physically_smaller_block(budget: str):
    model, batches = tiny_model(layers=2), make_batches(8)
    for parameter in model.parameters():
        parameter.data += 0.05  # no bias starts at zero
    pruner = make_pruner(model, make_rule("neuron", "movement", budget, 0.6))
    train(model, pruner, make_optimizer(model), batches)
    pruner.finish()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for layer, (name, mask) in zip(model.bert.encoder.layer, pruner.masks().items(), strict=True):
        up, down = layer.intermediate.dense, layer.output.dense
        assert 0 < mask.sum() < 64, name
        with torch.no_grad():
            hidden = layer.intermediate(x)
            smaller = functional.linear(
                functional.gelu(functional.linear(x, up.weight[mask], up.bias[mask])), down.weight[:, mask], down.bias
            )
            assert not hidden[:, ~mask].any(), "a cut neuron is active"
            torch.testing.assert_close(down(hidden), smaller, rtol=0, atol=1e-5)


# 10. At least one head and one neuron per layer.


@pytest.mark.parametrize("budget", SHARES)
@pytest.mark.parametrize("structure", ["head", "neuron"])
def test_10_the_weakest_layer_keeps_its_best_head_and_neuron(structure: str, budget: str):
    model = tiny_model(layers=3)
    for parameter in model.bert.encoder.layer[1].parameters():
        parameter.data *= 1e-4
    pruner = make_pruner(model, make_rule(structure, "magnitude", budget, sparsity=0.5))
    pruner.finish()
    kept = [int(mask.sum()) for mask in pruner.masks().values()]
    units = pruner.groups[0].mask.numel()
    assert sum(kept) == 3 * units // 2
    assert kept[1] == (1 if budget == "global" else units // 2)
    assert all(layer.attention.self.value.weight.any() for layer in model.bert.encoder.layer)
    assert all(layer.output.dense.weight.any() for layer in model.bert.encoder.layer)


@pytest.mark.parametrize("criterion", ["movement", "soft_movement"])
def test_10_a_step_on_the_way_empties_no_layer_either(criterion: str):
    model, batches = tiny_model(layers=2), make_batches(10)
    pruner = make_pruner(model, make_rule("head", criterion, "global", 0.999))
    optimizer = make_optimizer(model)
    for step in range(10):
        train(model, pruner, optimizer, batches, [step])
        assert all(mask.any() for mask in pruner.masks().values()), f"step {step + 1}"


def test_10_soft_movement_keeps_its_best_unit_where_none_is_above_the_threshold():
    weight = torch.tensor([[1.0, 3.0, 2.0, 1.5]])
    pruner = layer_pruner(weight, CRITERIA["soft_movement"](travel=50.0, initial=0.0), Cubic(0.0, 0.4, 1.0))
    parameter_of(pruner).grad = torch.tensor([[1.0, 1e-3, 2.0, 3.0]])  # against the scores of all, of one the least
    for progress in (0.2, 0.4, 0.6):
        pruner.before_step(progress)
        pruner.after_step()
        parameter_of(pruner).grad = torch.tensor([[1.0, 1e-9, 2.0, 3.0]])
    scores = pruner.state_dict()["layer/state/scores"]
    assert (torch.sigmoid(scores) < 0.1).all()
    assert pruner.masks()["layer"].sum() == 1
    assert pruner.masks()["layer"].flatten()[scores.argmax()]


# 11. Thresholds come from one deterministic search over all scores, not from the order in which they lie.


@pytest.mark.parametrize("n", [1000, 140_000])
def test_11_the_threshold_does_not_depend_on_order_or_partition(n: int):
    generator = torch.Generator().manual_seed(0)
    scores = torch.exp(3.0 * torch.randn(n, generator=generator))
    order = torch.randperm(n, generator=generator)
    for k in (1, n // 100, n // 2, n - 1):
        expected = scores.kthvalue(n - k + 1).values
        for parts in ([scores], [scores[order]], list(scores.chunk(7)), list(scores[order].view(10, -1).split(3))):
            assert kth_largest(parts, k) == expected


def test_11_a_permuted_tensor_gets_the_permuted_mask():
    n = 140_000
    generator = torch.Generator().manual_seed(0)
    scores, order = torch.randperm(n, generator=generator).float(), torch.randperm(n, generator=generator)
    assert torch.equal(select([scores[order]], n // 3)[0], select([scores], n // 3)[0][order])


# 12. Embeddings and heads are no target; tied weights are counted once.


@pytest.mark.parametrize("family", FAMILIES)
def test_12_the_targets_are_the_matrices_of_the_blocks_and_nothing_else(family: str):
    model = tiny_model(family)
    targets = {slot.name for group in make_pruner(model, make_rule()).groups for slot in group.slots}
    blocks = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and not any(word in name for word in ("embed", "pooler", "classifier", "head.", "score"))
    }
    assert targets == blocks
    assert len(targets) == {"albert": 6, "modernbert": 8}.get(family, 14 if family in DECODERS else 12)


def tied_model() -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_model().config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    return model


def test_12_a_tied_output_layer_is_no_target_and_is_counted_once():
    model = tied_model()
    pruner = make_pruner(model, make_rule(criterion="magnitude", sparsity=0.5))
    tied = model.cls.predictions.decoder.weight
    assert all(slot.parameter is not tied for group in pruner.groups for slot in group.slots)
    pruner.finish()
    assert tied.count_nonzero() >= tied.numel() - tied.shape[1]  # all but the row of the padding token
    zeros = sum(int((slot.parameter == 0).sum()) for group in pruner.groups for slot in group.slots)
    dense = tied_model()
    parameters = {id(parameter): int(parameter.count_nonzero()) for parameter in dense.parameters()}
    assert removed(dense, model)["all_parameters"] == pytest.approx(zeros / sum(parameters.values()))


def test_12_a_weight_that_two_layers_share_is_not_cut_twice():
    model = tiny_model()
    one, two = model.bert.encoder.layer
    two.intermediate.dense.weight = one.intermediate.dense.weight
    with pytest.raises(InputError, match=r"layer\.1\.intermediate\.dense\.weight is cut by two rules"):
        make_pruner(model, make_rule())


# 13. Infinite gradients and skipped steps must not reach the scores.


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("criterion", ["movement", "soft_movement"])
@pytest.mark.parametrize("first", [True, False])
def test_13_a_step_that_a_scaler_skips_changes_neither_scores_nor_moments_nor_weights(
    criterion: str, bad: float, first: bool
):
    model, batches = tiny_model(layers=1), make_batches(10)
    schedule = Cubic(begin=0.1, end=0.7, freeze=0.9, updates=2)  # no new cut in the bad step
    pruner, optimizer = make_pruner(model, make_rule(criterion=criterion), schedule=schedule), make_optimizer(model)
    done = 0 if first else 6
    train(model, pruner, optimizer, batches, range(done))
    state = pruner.state_dict()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert (pruner.sparsity() > 0) != first

    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batches[done]).loss).backward()
    pruner.groups[3].slots[0].parameter.grad[0, 0] = bad
    scaler.unscale_(optimizer)
    pruner.before_step((done + 1) / 10)
    scaler.step(optimizer)
    pruner.after_step()

    for key, tensor in pruner.state_dict().items():
        if key not in ("progress", "skipped"):
            assert torch.equal(tensor.nan_to_num(-1.0), state[key].nan_to_num(-1.0)), key
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert float(pruner.skipped) == 1.0

    optimizer.zero_grad()
    train(model, pruner, optimizer, batches, range(done + 1, 10))
    assert float(pruner.skipped) == 1.0
    assert pruner.sparsity() == pytest.approx(0.5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_13_opposite_infinities_do_not_cancel():
    pruner = layer_pruner(torch.ones(1, 4), Movement(), Cubic())
    before = pruner.state_dict()["layer/state/scores"]
    parameter_of(pruner).grad = torch.tensor([[math.inf, -math.inf, 1.0, 1.0]])
    pruner.before_step(0.05)
    assert torch.equal(pruner.state_dict()["layer/state/scores"], before)
    assert float(pruner.skipped) == 1.0


def test_13_finite_fp16_gradients_are_no_bad_step_though_their_sum_is_beyond_fp16():
    pruner = layer_pruner(torch.ones(64, 64, dtype=torch.float16), Movement(), Cubic())
    before = pruner.state_dict()["layer/state/scores"]
    parameter_of(pruner).grad = torch.full((64, 64), 100.0, dtype=torch.float16)
    pruner.before_step(0.05)
    assert float(pruner.skipped) == 0.0
    assert (pruner.state_dict()["layer/state/scores"] < before).all()


@pytest.mark.parametrize("criterion", ["magnitude", "second_order"])
def test_13_weights_that_have_diverged_are_told_in_a_sentence(criterion: str):
    model = tiny_model(layers=1)
    pruner, optimizer = make_pruner(model, make_rule(criterion=criterion)), torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(InputError, match=r"scores of bert\S+ are infinite or NaN at 10% of the run.*learning_rate"):
        train(model, pruner, optimizer, make_batches(10))


# 15. Reported sparsity names its denominator.


def test_15_each_sparsity_has_the_denominator_that_it_names():
    dense, model = tiny_model(), tiny_model()
    pruner = make_pruner(model, Rule("mlp", 0.75, Unstructured(), Magnitude()))
    pruner.finish()
    mlp, encoder = 2 * 2 * 64 * 32, 2 * (2 * 64 * 32 + 4 * 32 * 32)
    everything = sum(int(parameter.count_nonzero()) for parameter in dense.parameters())
    assert pruner.sparsity() == 0.75
    assert removed(dense, model) == pytest.approx(
        {"encoder_linear": 0.75 * mlp / encoder, "all_parameters": 0.75 * mlp / everything}
    )
    assert removed(dense, dense) == {"encoder_linear": 0.0, "all_parameters": 0.0}


def test_15_sparsity_weighs_groups_by_their_weights_and_not_by_their_units():
    model = tiny_model(layers=1)
    pruner = make_pruner(
        model, Rule("attention", 0.5, Unstructured(), Magnitude()), Rule("mlp", 0.75, Block(16, 16), Magnitude())
    )
    pruner.finish()
    assert pruner.sparsity() == (0.5 * 4 * 32 * 32 + 0.75 * 2 * 64 * 32) / (4 * 32 * 32 + 2 * 64 * 32)


def test_15_biases_that_go_with_a_neuron_do_not_count():
    model = tiny_model()
    pruner = make_pruner(model, make_rule("neuron", "magnitude", sparsity=0.25))
    pruner.finish()
    matrices = [slot.parameter for group in pruner.groups for slot in group.slots if slot.parameter.ndim == 2]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert pruner.sparsity() == zeros / sum(matrix.numel() for matrix in matrices) == 0.25


# 16. Nothing is ever pickled.

PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def pickling(source: str) -> list[str]:
    """What in a source text pickles: imports of picklers, and torch's and numpy's own ways to do so."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found += [module] if module.partition(".")[0] in PICKLERS else []
            found += [f"{module}.{a.name}" for a in node.names if module == "torch" and a.name in ("load", "save")]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            found += [name] if name in ("torch.load", "torch.save", "pd.read_pickle") else []
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "import os, dill", "from joblib import dump", "from torch import save", "import torch\ntorch.load(p)",
     "np.load(path, allow_pickle=True)"],
)  # fmt: skip
def test_16_the_search_for_pickles_finds_them(source: str):
    assert pickling(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(SOURCES[0].parent).as_posix())
def test_16_no_source_file_pickles(path: Path):
    assert pickling(path.read_text(encoding="utf-8")) == []
