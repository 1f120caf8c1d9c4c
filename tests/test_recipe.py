"""Recipes: what is read, and the one sentence for everything that is wrong."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.pruning import BUDGETS, CRITERIA, SCHEDULES, STRUCTURES, Constant, Global, Movement, Neuron
from finllm_prune.recipe import Recipe, parse

GOOD: dict[str, Any] = {
    "model": "some/model",
    "task": {"name": "sentiment", "dataset": "builtin"},
    "pruning": {
        "schedule": {"name": "cubic", "begin": 0.1, "end": 0.7, "freeze": 0.9},
        "rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}],
    },
    "training": {"learning_rate": 2e-4, "num_train_epochs": 1},
    "gates": {"agreement": 0.5},
    "output": "outputs/some",
}
RULE = "pruning.rules.0"
REMOVED = object()


def changed(key: str, value: Any) -> dict[str, Any]:
    """GOOD with another value at a dotted key, or without it."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    place: Any = data
    for part in parents:
        place = place[part]
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return data


def written(folder: Path, content: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def sentence(path: Path, *overrides: str) -> str:
    """The one sentence that a bad recipe gives; it begins with the file."""
    with pytest.raises(InputError) as caught:
        Recipe.load(path, overrides)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


UNKNOWN_KEYS = [
    ("modle", 1, "modle: unknown key; did you mean 'model'?"),
    ("model", {"name": "x", "licence": "mit"}, "model.licence: unknown key; did you mean 'license'?"),
    ("task.max_lenght", 64, "task.max_lenght: unknown key; did you mean 'max_length'?"),
    ("pruning.rule", [], "pruning.rule: unknown key; did you mean 'rules'?"),
    ("pruning.schedule.start", 0.1, "pruning.schedule.start: unknown key; known: begin, end, freeze, updates"),
    (f"{RULE}.sparcity", 0.5, f"{RULE}.sparcity: unknown key; did you mean 'sparsity'?"),
    (f"{RULE}.structure", {"name": "block", "row": 8}, f"{RULE}.structure.row: unknown key; did you mean 'rows'?"),
    (f"{RULE}.criterion", {"name": "movement", "lr": 1.0}, f"{RULE}.criterion.lr: unknown key; known: travel, initial"),
    (f"{RULE}.budget", {"name": "global", "per": 1}, f"{RULE}.budget.per: unknown key"),
    ("dense", {"checkpiont": "x"}, "dense.checkpiont: unknown key; did you mean 'checkpoint'?"),
    ("dense", {"training": {"sed": 1}}, "dense.training.sed: unknown key; did you mean 'seed'?"),
    ("distillation", {"temprature": 2.0}, "distillation.temprature: unknown key; did you mean 'temperature'?"),
    ("training.learning_rat", 1e-4, "training.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ("resolved", {}, "resolved: unknown key"),
]
WRONG_TYPES = [
    ("model", 5, "model: keys and values are expected here, not 5"),
    ("model", {"name": 5}, "model.name: input should be a valid string, not 5"),
    ("model", {"name": "x", "keep_layers": ["first"]}, "model.keep_layers.0: input should be a valid integer"),
    ("task", ["sentiment"], "task: keys and values are expected here"),
    ("task.max_length", "long", "task.max_length: input should be a valid integer"),
    ("task.labels", "negative", "task.labels: input should be a valid list"),
    ("pruning", "movement", "pruning: keys and values are expected here"),
    ("pruning.rules", {"target": "mlp"}, "pruning.rules: a list of at least one rule is needed, as {target: mlp"),
    ("pruning.rules", [], "pruning.rules: a list of at least one rule is needed"),
    (RULE, "mlp", f"{RULE}: keys and values are expected here, not 'mlp'"),
    (f"{RULE}.sparsity", "half", f"{RULE}.sparsity: input should be a valid number"),
    (f"{RULE}.target", 1, f"{RULE}.target: input should be a valid string, not 1"),
    (f"{RULE}.structure", 3, f"{RULE}.structure: keys and values are expected here"),
    (
        f"{RULE}.criterion",
        {"name": "movement", "travel": "far"},
        f"{RULE}.criterion.travel: input should be a valid nu",
    ),
    ("pruning.schedule.begin", "early", "pruning.schedule.begin: input should be a valid number"),
    ("pruning.schedule.updates", 1.5, "pruning.schedule.updates: input should be a valid integer"),
    ("dense", {"training": 3}, "dense.training: input should be a valid dictionary, not 3"),
    ("distillation", {"layers": "all"}, "distillation.layers: input should be 'uniform' or 'dynamic', not 'all'"),
    ("distillation", {"alpha": "most"}, "distillation.alpha: input should be a valid number"),
    ("training", "fast", "training: keys and values are expected here"),
    ("training.learning_rate", "fast", "training.learning_rate: input should be a valid number"),
    ("training.seed", 1.5, "training.seed: input should be a valid integer"),
    ("training.bf16", "perhaps", "training.bf16: input should be a valid boolean"),
    ("export", "masked", "export: input should be a valid list, not 'masked'"),
    ("gates", {"agreement": "high"}, "gates.agreement: input should be a valid number"),
    ("output", 7, "output: input should be a valid string, not 7"),
]
WRONG_VALUES = [
    (
        "task.name",
        "sentimant",
        "task.name: unknown task 'sentimant'; known: filings, instructions, reranking, sentiment",
    ),
    ("pruning.schedule.name", "cubical", "pruning.schedule: unknown name 'cubical'; did you mean 'cubic'?"),
    (f"{RULE}.structure", "neurons", f"{RULE}.structure: unknown name 'neurons'; did you mean 'neuron'?"),
    (f"{RULE}.criterion", "movment", f"{RULE}.criterion: unknown name 'movment'; did you mean 'movement'?"),
    (f"{RULE}.criterion", {"travel": 1.0}, f"{RULE}.criterion: unknown name"),
    (f"{RULE}.criterion", {"name": ["movement"]}, f"{RULE}.criterion: unknown name"),
    (f"{RULE}.budget", "total", f"{RULE}.budget: unknown name 'total'; known: uniform, global"),
    ("export", ["maskd"], "export: unknown format 'maskd'; known: masked, "),
    ("gates", {"f1": 0.9}, "gates.f1: there is no such gate; known: accuracy, macro_f1"),
    (f"{RULE}.sparsity", 0.0, "pruning.rules: sparsity must lie between 0 and 1 (exclusive), not 0.0"),
    (f"{RULE}.sparsity", 1.0, "pruning.rules: sparsity must lie between 0 and 1 (exclusive), not 1.0"),
    (f"{RULE}.sparsity", 90, "pruning.rules: sparsity must lie between 0 and 1 (exclusive), not 90.0"),
    (f"{RULE}.structure", {"name": "block", "rows": 0}, "structure block: rows and cols must be at least 1"),
    (f"{RULE}.criterion", {"name": "movement", "travel": 0}, "travel must be above 0"),
    ("pruning.schedule.begin", 0.7, "pruning.schedule: it must hold that 0 <= begin < end <= freeze <= 1"),
    ("pruning.schedule.begin", 0.8, "got begin=0.8, end=0.7, freeze=0.9"),
    ("pruning.schedule.freeze", 0.5, "got begin=0.1, end=0.7, freeze=0.5"),
    ("pruning.schedule.freeze", 1.5, "as fractions of the run"),
    ("pruning.schedule.updates", 0, "pruning.schedule: updates must be at least 1, not 0"),
    ("distillation", {"alpha": 1.5}, "distillation: alpha must lie in 0..1"),
    ("distillation", {"temperature": 0}, "temperature above 0"),
    ("distillation", {"relations": -1}, "hidden and relations must not be negative"),
    ("distillation", {"layers": "dynamic", "hidden": 0}, "distillation.layers: dynamic matches layers by their hidden"),
    ("training.output_dir", "x", "training.output_dir: this is set by output; remove the key"),
    ("training.resume_from_checkpoint", "x", "this is set by --resume; remove the key"),
    ("dense", {"training": {"push_to_hub": True}}, "dense.training.push_to_hub: this is set by"),
    (
        "pruning.rules",
        [{"target": "mlp", "sparsity": 0.5}],
        "drop compact from export, or add a rule with structure: neu",
    ),
    ("output", "", "output: '.' is no folder that can be made anew; name one"),
    ("output", "..", "output: '..' is no folder that can be made anew; name one"),
]
MISSING = [
    ("model", "model: this key is missing; see recipes/quickstart.yaml"),
    ("task", "task: this key is missing"),
    ("task.name", "task.name: this key is missing; name a task, as sentiment"),
    ("pruning", "pruning: this key is missing"),
    ("pruning.rules", "pruning.rules: a list of at least one rule is needed"),
    (f"{RULE}.target", f"{RULE}.target: this key is missing"),
    (f"{RULE}.sparsity", f"{RULE}.sparsity: this key is missing"),
    ("output", "output: this key is missing"),
]


@pytest.mark.parametrize(("key", "value", "expected"), UNKNOWN_KEYS + WRONG_TYPES + WRONG_VALUES)
def test_a_bad_value_is_one_sentence_with_file_key_and_remedy(
    tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    assert expected in sentence(written(tmp_path, changed(key, value)))


@pytest.mark.parametrize(("key", "expected"), MISSING)
def test_a_missing_key_is_named(tmp_path: Path, key: str, expected: str) -> None:
    assert expected in sentence(written(tmp_path, changed(key, REMOVED)))


def test_a_model_needs_its_name(tmp_path: Path) -> None:
    assert "model.name" in sentence(written(tmp_path, changed("model", {"license": "mit"})))


def test_a_latency_gate_without_a_compact_model_is_refused(tmp_path: Path) -> None:
    data = changed("export", ["masked"]) | {"gates": {"latency_ratio": 0.5}}
    assert "gates.latency_ratio" in sentence(written(tmp_path, data))


@pytest.mark.parametrize(
    "content",
    ["model: [", "a: b: c", "\tmodel: x", "{[1]: 2}", "output: 2024-13-01", "!!python/object:os.system {}"],
)
def test_what_is_not_yaml_says_where(tmp_path: Path, content: str) -> None:
    assert sentence(written(tmp_path, content)).startswith(" is not a readable YAML file: ")


@pytest.mark.parametrize("content", ["", "just text", "- a\n- b\n", "1: one\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    assert "the recipe: keys and values are expected here" in sentence(written(tmp_path, content))


def test_a_file_that_is_missing_or_no_text(tmp_path: Path) -> None:
    assert sentence(tmp_path / "absent.yaml") == ": there is no such recipe"
    (tmp_path / "folder").mkdir()
    assert "is not a readable YAML file" in sentence(tmp_path / "folder")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    assert "is not a readable YAML file" in sentence(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.learning_rate", "override 'training.learning_rate': write it as key.sub=value"),
        ("=3", "override '=3': write it as key.sub=value"),
        ("", "override '': write it as key.sub=value"),
        ("training.seed=[", "override 'training.seed=[': its value is not YAML"),
        ("output=2024-13-01", "override 'output=2024-13-01': its value is not YAML"),
        ("pruning.rules.1.sparsity=0.9", "'1' is no index of a list of 1"),
        ("pruning.rules.-1.sparsity=0.9", "'-1' is no index of a list of 1"),
        ("pruning.rules.²=0.9", "'²' is no index of a list of 1"),
        ("pruning.rules.first.sparsity=0.9", "'first' is no index of a list of 1"),
        ("pruning.rules.0.sparsity.x=0.9", "pruning.rules.0.sparsity holds a value, not keys"),
        ("training.sed=1", "training.sed: unknown key; did you mean 'seed'?"),
        ("pruning.rules.0.sparsity=2", "sparsity must lie between 0 and 1"),
    ],
)
def test_a_bad_override_names_itself(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in sentence(written(tmp_path, GOOD), override)


def test_overrides_reach_every_place(tmp_path: Path) -> None:
    recipe = Recipe.load(
        written(tmp_path, GOOD),
        [
            "model.license=mit",
            "pruning.schedule=constant",
            "pruning.schedule.begin=0.2",
            "pruning.rules.0.criterion.travel=3",
            "pruning.rules.0.criterion.name=movement",
            "pruning.rules.0.structure.name=neuron",
            "pruning.rules.0.budget=global",
            "dense.training.seed=7",
            "training.seed=8",
            "export=[masked]",
            "export.0=compact",
            "gates={}",
            "output=elsewhere",
        ],
    )
    assert (recipe.model.name, recipe.model.license) == ("some/model", "mit")
    assert recipe.pruning.schedule == Constant(begin=0.2)
    [rule] = recipe.pruning.rules
    assert (rule.structure, rule.criterion, rule.budget) == (Neuron(), Movement(travel=3.0), Global())
    assert (recipe.dense.training, recipe.training["seed"]) == ({"seed": 7}, 8)
    assert (recipe.export, recipe.gates, recipe.output) == (["compact"], {}, Path("elsewhere"))
    assert Recipe.load(tmp_path / "mine.yaml").pruning.rules[0].sparsity == 0.5, "the file itself is not changed"


def test_a_whole_list_can_be_given_as_yaml(tmp_path: Path) -> None:
    rules = "pruning.rules=[{target: mlp, structure: neuron, criterion: movement, sparsity: 0.25}]"
    assert Recipe.load(written(tmp_path, GOOD), [rules]).pruning.rules[0].sparsity == 0.25


def test_distillation_is_on_by_default_and_can_be_switched_off(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    on = Recipe.load(path).distillation
    assert on is not None
    assert on.hidden > 0
    assert Recipe.load(path, ["distillation=null"]).distillation is None


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path) -> None:
    content = yaml.safe_dump(changed("training.learning_rate", REMOVED)) + "distillation: {hidden: 1e-1}\n"
    recipe = Recipe.load(written(tmp_path, content), ["training.learning_rate=1e-4", f"{RULE}.sparsity=5e-1"])
    assert yaml.safe_load("1e-4") == "1e-4", "the trap that this is about"
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.pruning.rules[0].sparsity == 0.5
    assert recipe.distillation is not None
    assert recipe.distillation.hidden == 0.1


def test_the_resolved_recipe_holds_every_default() -> None:
    resolved = parse(GOOD).resolved
    assert resolved["pruning"]["rules"][0]["criterion"] == {
        "name": "movement", "travel": 1.0, "initial": 1.0, "moments": "whole", "sensitivity": 1.0,
    }  # fmt: skip
    assert resolved["export"] == ["masked", "compact"]
    assert resolved["task"]["max_length"] == 128


fractions = st.floats(0.0, 1.0, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    spans=st.lists(fractions, min_size=3, max_size=3, unique=True).map(sorted),
    criterion=st.sampled_from(sorted(CRITERIA)),
    budget=st.sampled_from(sorted(BUDGETS)),
    structure=st.sampled_from(sorted(STRUCTURES)),
    sparsity=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
    rate=st.floats(1e-12, 1.0),
    name=st.text(min_size=1).filter(lambda text: text.isprintable()),
    distilled=st.booleans(),
    gates=st.dictionaries(st.sampled_from(["accuracy", "mcc_retention"]), st.floats(-1, 1)),
)
def test_the_resolved_recipe_is_the_same_recipe(
    schedule: str, spans: list[float], criterion: str, budget: str, structure: str, sparsity: float, rate: float,
    name: str, distilled: bool, gates: dict[str, float],
) -> None:  # fmt: skip
    rule = {"target": "mlp", "structure": structure, "criterion": criterion, "budget": budget, "sparsity": sparsity}
    if structure == "n:m":
        rule |= {"sparsity": 0.5, "budget": "uniform"}  # the only sparsity that 2:4 has, and no budget with knobs
    if rule["budget"] == "sensitivity":
        rule["sparsity"] = min(sparsity, 0.9)  # the highest level that is tried
    data = copy.deepcopy(GOOD) | {"model": name, "export": ["masked"], "gates": gates}
    data["pruning"] = {
        "schedule": {"name": schedule, "begin": spans[0], "end": spans[1], "freeze": spans[2]},
        "rules": [rule],
    }
    data["training"]["learning_rate"] = rate
    data["distillation"] = {"alpha": spans[0]} if distilled else None
    recipe = parse(data)
    assert parse(yaml.safe_load(yaml.safe_dump(recipe.resolved, sort_keys=False))) == recipe


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=4) | st.text(max_size=8)
    | st.sampled_from(["movement", "mlp", "cubic", "global", "neuron", "masked", "sentiment", "dense", "1e-4", "auto"])
)  # fmt: skip
keys = st.text(max_size=6) | st.sampled_from([
    *GOOD, "name", "dataset", "rules", "schedule", "begin", "end", "target", "sparsity", "criterion", "budget", "structure",
    "dense", "distillation", "export", "checkpoint", "alpha", "teacher", "seed", "accuracy",
])  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def recipe_or_input_error(read: Callable[[], Recipe]) -> None:
    """Any other exception fails the test; what is accepted can be saved beside the weights."""
    with contextlib.suppress(InputError):
        assert yaml.safe_dump(read().resolved)


@settings(max_examples=150, deadline=None)
@given(data=anything)
def test_any_data_is_a_recipe_or_an_input_error(data: Any) -> None:
    recipe_or_input_error(lambda: parse(data))


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(parse(GOOD).resolved)), anything, min_size=1, max_size=2))
def test_any_data_within_a_good_recipe(changes: dict[str, Any]) -> None:
    recipe_or_input_error(lambda: parse(copy.deepcopy(GOOD) | changes))


@settings(max_examples=150, deadline=None)
@given(rule=st.dictionaries(st.sampled_from(["target", "sparsity", "criterion", "budget", "structure"]), anything))
def test_any_data_within_a_rule(rule: dict[str, Any]) -> None:
    whole = {"target": "mlp", "structure": "neuron", "sparsity": 0.5} | rule
    recipe_or_input_error(lambda: parse(changed(RULE, whole)))


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from([f.name for f in dataclasses.fields(TrainingArguments) if f.init]), value=anything)
def test_any_data_within_the_training_arguments(key: str, value: Any) -> None:
    recipe_or_input_error(lambda: parse(changed("training", {key: value})))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(max_size=20) | st.builds("{}.{}={}".format, st.sampled_from(sorted(GOOD)), keys, st.text(max_size=6))
)
def test_any_override_is_taken_or_an_input_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = written(tmp_path_factory.getbasetemp(), GOOD)
    recipe_or_input_error(lambda: Recipe.load(path, [text]))
