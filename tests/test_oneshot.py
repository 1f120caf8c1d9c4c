"""One shot on whole models: what the blocks see, what a recipe gives, exact resume, and the sentences of bad recipes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedModel,
)

from finllm_prune.checkpoints import verify
from finllm_prune.errors import InputError
from finllm_prune.families import Family, find_family
from finllm_prune.pruning import (
    NM,
    Activations,
    Calibrated,
    Cubic,
    Global,
    Head,
    Layer,
    Magnitude,
    Neuron,
    OneShot,
    Pruner,
    Rule,
    SparseGPT,
    Wanda,
)
from finllm_prune.recipe import Recipe, parse
from finllm_prune.run import run
from finllm_prune.training import prune_once, refuse_no_chain, sample_batches
from tests import small
from tests.conftest import FAMILIES, tiny_model
from tests.test_trainer import assert_same, rows, trainer, weights

CHAINS = [name for name in FAMILIES if name != "albert"]  # its blocks share one set of weights: refused
METHODS: list[OneShot] = [Magnitude(), Wanda(), SparseGPT()]


def padded(batches: int = 3, pad: int = 0) -> list[dict[str, Tensor]]:
    """Batches of rows of 4 to 9 tokens, with ``pad`` in the places of the padding."""
    g = torch.Generator().manual_seed(7)
    made = []
    for _ in range(batches):
        ids = torch.randint(5, 300, (4, 9), generator=g)
        mask = (torch.arange(9) < torch.randint(4, 10, (4, 1), generator=g)).long()
        made.append({"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask})
    return made


def pruned(
    model: PreTrainedModel, family: Family, method: OneShot, batches: list[dict[str, Tensor]], rule: Rule | None = None
) -> Pruner:
    rule = rule or Rule("encoder", 0.5, criterion=Magnitude())
    pruner = Pruner(family.groups(model, [rule]), Cubic())
    prune_once(model, family, pruner, method, batches)
    return pruner


@torch.no_grad()
def seen_by_hooks(model: PreTrainedModel, block: str, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The real tokens that each linear layer of a block gets in plain forwards of the whole model."""
    seen: dict[str, list[Tensor]] = {}

    def keep(path: str, inputs: Tensor) -> None:
        if inputs.shape[:2] == batch["input_ids"].shape:  # DeBERTa sends its relative positions through the same layers
            seen.setdefault(path, []).append(inputs)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, path=path: keep(path, args[0]))
        for path, module in model.named_modules()
        if path.startswith(block) and isinstance(module, torch.nn.Linear)
    ]
    model.eval()
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    real = torch.cat([batch["attention_mask"].bool().view(-1) for batch in batches])
    return {path: torch.cat([x.flatten(0, 1) for x in inputs])[real] for path, inputs in seen.items()}


class Spy(SparseGPT):
    """SparseGPT that remembers the statistics that it is given."""

    seen: list[Tensor] = []  # noqa: RUF012

    def prune(self, weight: Tensor, statistics: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        self.seen.append(statistics)
        return super().prune(weight, statistics, *args)


@pytest.mark.parametrize("model_type", CHAINS)
def test_each_block_is_calibrated_on_what_it_gets_once_the_blocks_before_are_pruned(model_type: str) -> None:
    model, family = tiny_model(model_type, layers=3), find_family(model_type)
    dense = type(model)(model.config)
    dense.load_state_dict(model.state_dict())
    Spy.seen = []
    pruner = pruned(model, family, Spy(), padded())
    given = {group.name: statistics for group, statistics in zip(pruner.groups, Spy.seen, strict=True)}
    for index in range(3):
        block = f"{family.root(model)}.{index}."
        mixed = type(model)(model.config)
        mixed.load_state_dict(
            {
                key: value
                if any(key.startswith(f"{family.root(model)}.{i}.") for i in range(index))
                else dense.state_dict()[key]
                for key, value in model.state_dict().items()
            }
        )
        expected = seen_by_hooks(mixed, block, padded())
        assert expected.keys() == {name for name in given if name.startswith(block)}
        for path, inputs in expected.items():
            torch.testing.assert_close(given[path], inputs.T @ inputs, rtol=1e-4, atol=1e-4)


class Live(TorchDispatchMode):
    """The bytes of the tensors that were made inside and are still held: how many they were at most."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        self.held: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (held := StorageWeakRef(tensor.untyped_storage())) not in self.model:
                self.held[held] = tensor.untyped_storage().nbytes()
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.most = max(self.most, sum(self.held.values()))
        return made


@pytest.mark.parametrize("method", [SparseGPT(), Wanda(), Activations()])
@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_a_deeper_model_takes_no_more_memory_but_for_its_masks(method: Calibrated, model_type: str) -> None:
    family, most, masks = find_family(model_type), [], []
    rules = [Rule("encoder", 0.5, criterion=Magnitude())]
    if isinstance(method, Activations):
        rules = [Rule("mlp", 0.5, Neuron(), Magnitude()), Rule("attention", 0.5, Head(), Magnitude())]
    for layers in (2, 4):
        model = tiny_model(
            model_type, layers=layers, hidden=16, intermediate_size=32, use_cache=False
        )  # as the Trainer sets it
        pruner = Pruner(family.groups(model, rules), Cubic())
        with Live(model) as live:
            prune_once(model, family, pruner, method, padded())
        assert pruner.frozen
        most.append(live.most)
        slots = [slot for group in pruner.groups for slot in group.slots]
        masks.append(sum(mask.nbytes for mask in pruner.masks().values()))
        masks[-1] += sum(slot.lines.nbytes for slot in slots if slot.lines is not None)
    assert most[1] - most[0] == masks[1] - masks[0]


class Heavy(Wanda):
    """Remembers a megabyte of each matrix, beside which everything else in a tiny model is light."""

    def statistics(self, inputs: Tensor) -> Tensor:
        return inputs.float().square().sum().expand(2**18).clone()

    def prune(self, weight: Tensor, statistics: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        assert torch.equal(statistics, statistics[:1].expand(2**18))
        return super().prune(weight, torch.ones(weight.shape[1]), *args)


@pytest.mark.parametrize(("model_type", "matrices"), [("bert", 6), ("llama", 7)])
def test_at_any_time_the_statistics_of_one_block_are_held_and_those_of_one_matrix_that_are_added(
    model_type: str, matrices: int
) -> None:
    model, family = tiny_model(model_type, layers=3), find_family(model_type)
    pruner = Pruner(family.groups(model, [Rule("encoder", 0.5, criterion=Magnitude())]), Cubic())
    with Live(model) as live:
        prune_once(model, family, pruner, Heavy(), padded())
    assert matrices + 1 <= live.most / 2**20 < matrices + 1.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", CHAINS)
def test_every_family_takes_every_method(method: OneShot, model_type: str) -> None:
    model = tiny_model(model_type)
    model.train()
    pruner = pruned(model, find_family(model_type), method, padded())
    assert model.training
    assert pruner.frozen
    assert pruner.holds()
    assert pruner.sparsity() == 0.5
    if isinstance(method, Wanda):
        assert all(bool((mask.sum(1) == mask.shape[1] // 2).all()) for mask in pruner.masks().values())


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()])
def test_padding_does_not_count(method: Calibrated) -> None:
    plain, other = (pruned(tiny_model(), find_family("bert"), method, padded(pad=pad)) for pad in (0, 250))
    assert plain.mask_hash() == other.mask_hash()
    alone = [
        {key: value[row : row + 1, : int(batch["attention_mask"][row].sum())] for key, value in batch.items()}
        for batch in padded()
        for row in range(4)
    ]
    never = pruned(tiny_model(), find_family("bert"), method, alone).masks()
    differ = [float((mask != never[name]).float().mean()) for name, mask in plain.masks().items()]
    assert max(differ) < 0.005, "only rounding may decide otherwise"


def test_heads_and_neurons_of_an_encoder_go_by_what_they_say_and_whole_layers_are_refused() -> None:
    model, family = tiny_model(), find_family("bert")
    rules = [Rule("mlp", 0.5, Neuron(), Magnitude()), Rule("attention", 0.5, Head(), Magnitude())]
    first = family.layers(model)[0].output.dense
    neurons = seen_by_hooks(model, "bert.encoder.layer.0", padded())["bert.encoder.layer.0.output.dense"]
    pruner = Pruner(family.groups(model, rules), Cubic())
    prune_once(model, family, pruner, Activations(), padded())
    assert pruner.sparsity() == 0.5
    alive = (first.weight != 0).any(0).nonzero().flatten().tolist()
    assert len(set(alive) & set(neurons.abs().mean(0).topk(32).indices.tolist())) >= 28, "heads before it are cut first"
    with pytest.raises(InputError, match="whole layers are chosen by `finllm-prune oneshot`"):
        refuse_no_chain(model, family, family.groups(model, [Rule("encoder", 0.5, Layer(), Magnitude())]))


def test_the_n_m_of_a_structure_reaches_the_method() -> None:
    for method in (Wanda(), SparseGPT()):
        rule = Rule("encoder", 0.5, structure=NM())
        pruner = pruned(tiny_model(), find_family("bert"), method, padded(), rule)
        assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in pruner.masks().values())


def test_magnitude_takes_the_budget_of_its_rule() -> None:
    rule = Rule("encoder", 0.5, criterion=Magnitude(), budget=Global())
    pruner = pruned(tiny_model(), find_family("bert"), Magnitude(), [], rule)
    kept = [int(mask.sum()) / mask.numel() for mask in pruner.masks().values()]
    assert max(kept) > min(kept)
    assert pruner.sparsity() == pytest.approx(0.5, abs=1e-4)


def test_sparsegpt_keeps_the_outputs_closest_to_the_dense_models() -> None:
    batches = padded(8)

    def logits(model: PreTrainedModel) -> Tensor:
        with torch.no_grad():
            return torch.cat([model.eval()(**batch).logits for batch in batches])

    expected, errors = logits(tiny_model()), []
    for method in (SparseGPT(), Wanda(), Magnitude()):
        model = tiny_model()
        pruned(model, find_family("bert"), method, batches)
        errors.append(float((logits(model) - expected).norm()))
    assert errors[0] < min(errors[1:])


@pytest.mark.parametrize("method", METHODS)
def test_the_masks_stay_and_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, method: OneShot) -> None:
    rules = [Rule("encoder", 0.5, criterion=Magnitude())]
    whole = trainer(tmp_path / "whole", rules, max_steps=6, save_strategy="steps", save_steps=3)
    assert whole.pruner is not None
    batches = sample_batches(rows(), getattr(method, "rows", 0), whole.data_collator, seed=1)
    prune_once(whole.model, find_family("bert"), whole.pruner, method, batches)
    before, start = whole.pruner.mask_hash(), weights(whole.model)
    whole.train()
    assert whole.pruner.mask_hash() == before
    assert whole.pruner.holds()
    assert any(not torch.equal(value, start[name]) for name, value in weights(whole.model).items())
    assert {entry["sparsity"] for entry in whole.state.log_history if "sparsity" in entry} == {0.5}
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = trainer(tmp_path / "resumed", rules, max_steps=6, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert resumed.pruner is not None
    assert resumed.pruner.mask_hash() == before
    assert_same(weights(resumed.model), weights(whole.model))


def test_calibration_rows_are_the_same_random_sample_each_time(tmp_path: Path) -> None:
    run = trainer(tmp_path, None)
    batches = sample_batches(rows(), 20, run.data_collator, 1, 8)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 4]
    again = sample_batches(rows(), 20, run.data_collator, 1, 8)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(torch.cat([b["input_ids"] for b in batches]), torch.tensor(rows()["input_ids"][:20]))
    assert sum(len(b["input_ids"]) for b in sample_batches(rows(), 128, run.data_collator, 1)) == 96


def test_blocks_that_share_their_weights_are_refused() -> None:
    model, family = tiny_model("albert"), find_family("albert")
    groups = family.groups(model, [Rule("encoder", 0.5, criterion=Magnitude())])
    with pytest.raises(InputError, match=r"albert runs 1 sets of weights as 2 blocks.*oneshot: magnitude"):
        refuse_no_chain(model, family, groups)


def recipe(model: Path, folder: Path, oneshot: Any, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "task": {"name": "sentiment", "dataset": str(small.write_folder(folder / "data"))},
        "pruning": {"oneshot": oneshot, "rules": [{"target": "encoder", "sparsity": 0.6}]},
        "dense": {"training": {"max_steps": 2}},
        "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
        "export": ["masked"],
        "output": str(folder / "out"),
    } | changes


@pytest.mark.parametrize(
    ("oneshot", "training"),
    [
        ({"name": "wanda", "rows": 10}, {"max_steps": 2}),
        ({"name": "sparsegpt", "rows": 16, "block": 16, "damp": 0.02}, {"num_train_epochs": 0}),
    ],
)
def test_a_recipe_prunes_once_and_the_result_loads_with_plain_transformers(
    tmp_path: Path,
    tiny_folder: small.TinyFolder,
    monkeypatch: pytest.MonkeyPatch,
    oneshot: dict[str, Any],
    training: dict[str, Any],
) -> None:
    small.few_resamples(monkeypatch)
    data = recipe(tiny_folder(), tmp_path, oneshot, training={"use_cpu": True, "disable_tqdm": True, **training})
    written = parse(data)
    assert parse(written.resolved) == written
    report = run(written)
    assert report is not None
    assert report.sparsity["targeted"] == pytest.approx(0.6, abs=0.01)
    verify(tmp_path / "out" / "masked")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "masked")
    for linear in find_family("bert").linears(loaded).values():
        rows_off = (linear.weight == 0).sum(1) - 0.6 * linear.weight.shape[1]
        assert float(rows_off.abs().max() if oneshot["name"] == "wanda" else rows_off.mean().abs()) <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"60 % by {oneshot['name']}" in card
    assert f"in one shot before training, calibrated on {oneshot['rows']} training rows" in card
    if "num_train_epochs" in training:
        dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense")
        assert torch.equal(dense.classifier.weight, loaded.classifier.weight)


BAD = [
    ({"name": "wanda", "rows": 0}, {}, "pruning.oneshot.rows: wanda, sparsegpt and activations need"),
    ({"name": "sparsegpt", "rows": 0}, {}, "pruning.oneshot.rows: wanda, sparsegpt and activations need"),
    ({"name": "wanda", "damp": 0.1}, {}, "pruning.oneshot.damp: unknown key; known: rows"),
    ("wandb", {}, "pruning.oneshot: unknown name 'wandb'; did you mean 'wanda'?"),
    ("wanda", {"budget": "global"}, "pruning.rules.0.budget: oneshot wanda shares its sparsity within each matrix"),
    ("sparsegpt", {"budget": "global"}, "pruning.rules.0.budget: oneshot sparsegpt shares its sparsity within each"),
    ("magnitude", {"structure": "block"}, "pruning.rules.0.structure: pruning.oneshot cuts single weights"),
    (
        "wanda",
        {"structure": "neuron", "target": "mlp"},
        "pruning.rules.0.structure: pruning.oneshot cuts single weights",
    ),
]


@pytest.mark.parametrize(("oneshot", "rule", "expected"), BAD)
def test_a_bad_recipe_is_one_sentence(tmp_path: Path, oneshot: Any, rule: dict[str, Any], expected: str) -> None:
    data = recipe(tmp_path, tmp_path, oneshot)
    data["pruning"]["rules"][0] |= rule
    with pytest.raises(InputError) as caught:
        parse(data)
    assert str(caught.value).startswith(expected)


def test_an_override_sets_the_method(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(recipe(tmp_path, tmp_path, None)))
    assert Recipe.load(path).pruning.oneshot is None
    loaded = Recipe.load(path, ["pruning.oneshot=wanda", "pruning.oneshot.rows=7"])
    assert loaded.pruning.oneshot == Wanda(rows=7)
    assert [rule.criterion for rule in loaded.pruning.rules] == [Magnitude()]


def test_what_is_no_chain_of_blocks_is_refused() -> None:
    model, family = tiny_model(), find_family("bert")
    groups = family.groups(model, [Rule("encoder", 0.5)])
    refuse_no_chain(model, family, groups)
    model.config.num_hidden_layers = 4
    with pytest.raises(InputError, match="runs 2 sets of weights as 4 blocks"):
        refuse_no_chain(model, family, groups)


def test_no_batch_is_one_sentence() -> None:
    with pytest.raises(InputError, match="there is no calibration data; give at least one batch"):
        pruned(tiny_model(), find_family("bert"), Wanda(), [])


@pytest.mark.parametrize("convolution", [0, 3])
def test_a_convolution_between_blocks_is_refused_and_relative_positions_are_not(convolution: int) -> None:
    """DeBERTa sends its relative positions through query and key too, and its largest models have a convolution."""
    family = find_family("deberta-v2")
    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8,
        conv_kernel_size=convolution, conv_act="gelu",
    )  # fmt: skip
    model = DebertaV2ForSequenceClassification(config)
    if convolution:
        with pytest.raises(InputError, match="something lies between two blocks"):
            pruned(model, family, SparseGPT(), padded())
        assert not model.deberta.encoder.layer[0]._forward_pre_hooks
    else:
        assert pruned(model, family, SparseGPT(), padded()).sparsity() == 0.5
