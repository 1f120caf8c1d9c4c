"""Whatever lies in a recipe, a checkpoint or a data set: a result, or one of our own errors; never a wrong model unnoticed."""

import copy
import csv
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.checkpoints import delta, find_format, verify
from finllm_prune.checkpoints.manifest import MANIFEST, sha256
from finllm_prune.checkpoints.quantizer import WEIGHTS
from finllm_prune.errors import InputError, ProofError
from finllm_prune.recipe import Recipe, parse
from finllm_prune.settings import set_override
from finllm_prune.tasks import find_task, read_texts
from tests.conftest import logits, tiny_model
from tests.test_packed import sparse

RECIPE: dict[str, Any] = {
    "model": {"name": "org/name", "keep_layers": [0, 1], "license": "mit"},
    "task": {"name": "sentiment", "labels": ["a", "b"], "max_length": 16, "split": {"by": "date"}, "mask": {"word": "X"}},
    "pruning": {
        "schedule": {"name": "cubic", "begin": 0.1, "end": 0.5, "freeze": 0.7},
        "rules": [
            {"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5, "budget": "global"},
            {"target": "attention", "structure": {"name": "n:m", "n": 2, "m": 4}, "sparsity": 0.5, "regularizer": None},
        ],
        "oneshot": None, "fill": False, "target": None,
    },
    "dense": {"checkpoint": None, "training": {"max_steps": 3}},
    "vocabulary": {"texts": "train"},
    "distillation": {"teacher": "dense", "alpha": 0.9},
    "recovery": {"keep_moments": True, "max_steps": 2},
    "recording": {},
    "training": {"learning_rate": 1e-3, "report_to": "none", "lr_scheduler_kwargs": {"num_cycles": 1}},
    "export": ["masked", "compact"],
    "gates": {"accuracy": 0.5},
    "hub": {"repo_id": "org/name", "private": True},
    "output": "out",
}  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
    | st.sampled_from(["movement", "cubic", "n:m", "target", "l0", "builtin", "../..", "\0", "hf_x", 10**30, -1, 0, 1, 0.5])
)  # fmt: skip
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.just("name"), inner, max_size=3)
    ),
    max_leaves=5,
)


def places(data: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into plain data."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else []
    return [above] * bool(above) + [path for key, value in inside for path in places(value, (*above, key))]


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def ours(act: Callable[[], Any]) -> Any:
    """What it returns; None where it says in a sentence what is wrong."""
    try:
        return act()
    except (InputError, ProofError):
        return None


@given(st.sampled_from(places(RECIPE)), JUNK)
def test_a_changed_recipe_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    recipe = ours(lambda: parse(changed(RECIPE, path, value)))
    if recipe is not None:
        assert parse(recipe.resolved).resolved == recipe.resolved, "what is written down is what runs"


@given(JUNK)
def test_anything_is_read_or_refused(value: Any) -> None:
    ours(lambda: parse(value))


@given(st.binary(max_size=60) | st.text(max_size=60, alphabet="{}[]&*!:,-?|>'\"%@` \nab0\t").map(str.encode))
def test_any_file_is_a_recipe_or_not(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        ours(lambda: Recipe.load(path))


@given(st.sampled_from(places(RECIPE)), st.text(max_size=10))
def test_an_override_is_applied_or_refused(path: tuple[Any, ...], value: str) -> None:
    data = copy.deepcopy(RECIPE)
    ours(lambda: set_override(data, f"{'.'.join(map(str, path))}={value}"))
    ours(lambda: set_override(data, f"{value}=1"))
    ours(lambda: parse(data))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "packed"
    find_format("packed")(sparse(), tokenizer, folder)
    return folder


class Kept:
    """Files that are as they were in the end."""

    def __init__(self, folder: Path, *names: str):
        self.files = {folder / name: (folder / name).read_bytes() for name in names}

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for path, content in self.files.items():
            path.write_bytes(content)


FEW = settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(st.data())
def test_a_changed_byte_of_any_file_is_found(saved: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(path for path in saved.iterdir() if path.name != MANIFEST)))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with Kept(saved, path.name):
        path.write_bytes(content)
        with pytest.raises(ProofError, match="is not the file that was proved"):
            verify(saved)


@FEW
@given(st.data())
def test_a_changed_manifest_is_no_traceback(saved: Path, data: st.DataObject) -> None:
    with Kept(saved, MANIFEST):
        manifest = json.loads((saved / MANIFEST).read_text())
        path = data.draw(st.sampled_from([p for p in places(manifest) if len(p) < 3 or p[-1] in (0, 1)]))
        (saved / MANIFEST).write_text(json.dumps(changed(manifest, path, data.draw(JUNK)), default=str))
        ours(lambda: verify(saved))


@FEW
@given(st.data())
def test_a_changed_config_that_was_hashed_anew_is_no_wrong_model(saved: Path, data: st.DataObject) -> None:
    """As somebody would do who wants to be believed: only the logits can tell."""
    with Kept(saved, MANIFEST, "config.json"):
        config = json.loads((saved / "config.json").read_text())
        inner = [p for p in places(config) if p[0] in ("quantization_config", "transformers_weights", "hidden_size")]
        path = data.draw(st.sampled_from(inner + places(config)))
        (saved / "config.json").write_text(json.dumps(changed(config, path, data.draw(JUNK)), default=str))
        hash_anew(saved, "config.json")
        ours(lambda: verify(saved))


@FEW
@given(st.data())
def test_changed_tensors_that_were_hashed_anew_are_refused_or_the_same_model(saved: Path, data: st.DataObject) -> None:
    right = logits(AutoModelForSequenceClassification.from_pretrained(saved))
    with Kept(saved, MANIFEST, WEIGHTS):
        state = load_file(saved / WEIGHTS)
        name = data.draw(st.sampled_from(sorted(name for name in state if "weight_" in name)))
        tensor = state[name]
        state[name] = data.draw(
            st.sampled_from(
                [
                    tensor[:-1].clone(),
                    tensor.flip(0),
                    tensor.to(torch.int16),
                    tensor[:0].clone(),
                    tensor[None],
                    tensor * 0,
                ]
            )
        )
        save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
        hash_anew(saved, WEIGHTS)
        if ours(lambda: verify(saved)) is not None:
            got = logits(AutoModelForSequenceClassification.from_pretrained(saved))
            torch.testing.assert_close(got, right, rtol=0, atol=1e-4)


@FEW
@given(st.data())
def test_bytes_that_were_hashed_anew_are_refused_or_the_same_model(saved: Path, data: st.DataObject) -> None:
    with Kept(saved, MANIFEST, WEIGHTS):
        content = bytearray((saved / WEIGHTS).read_bytes())
        header = int.from_bytes(content[:8], "little")
        content[data.draw(st.integers(0, header + 16))] = data.draw(st.integers(0, 255))
        (saved / WEIGHTS).write_bytes(content)
        hash_anew(saved, WEIGHTS)
        ours(lambda: verify(saved))


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def difference(tmp_path_factory: pytest.TempPathFactory, base: PreTrainedModel) -> Path:
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
        model.bert.encoder.layer[1].output.dense.weight[0] = 1
    folder = tmp_path_factory.mktemp("fuzz") / "delta"
    delta.write(base, model, folder)
    return folder


@FEW
@given(st.data())
def test_a_damaged_delta_leaves_its_base_as_it_is(difference: Path, base: PreTrainedModel, data: st.DataObject) -> None:
    before = delta.base_sha256(base)
    with Kept(difference, MANIFEST, delta.WEIGHTS):
        if data.draw(st.booleans()):
            manifest = json.loads((difference / MANIFEST).read_text())
            path = data.draw(st.sampled_from(places(manifest)))
            (difference / MANIFEST).write_text(json.dumps(changed(manifest, path, data.draw(JUNK)), default=str))
        else:
            content = bytearray((difference / delta.WEIGHTS).read_bytes())
            place = data.draw(st.integers(0, 300) | st.integers(0, len(content) - 1))
            content[place] ^= data.draw(st.integers(1, 255))
            (difference / delta.WEIGHTS).write_bytes(content)
            hash_anew(difference, delta.WEIGHTS)
        applied = ours(lambda: delta.apply(base, difference))
        if applied is not None:
            applied.remove()
    assert delta.base_sha256(base) == before


def hash_anew(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"][name] = sha256(folder / name)
    manifest.pop("sums", None)
    (folder / MANIFEST).write_text(json.dumps(manifest))


CELL = SCALARS.map(str) | st.text(max_size=10) | st.sampled_from(["Profit rose.", "up", '"', "\ud800", "=1+1", "a,b"])


def as_csv(rows: list[list[str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([["text", "label"], *rows])
    return out.getvalue().encode(errors="surrogatepass")


FILES = {
    ".csv": st.lists(st.lists(CELL, max_size=3), max_size=5).map(as_csv),
    ".jsonl": st.lists(
        st.dictionaries(st.sampled_from(["text", "label", "x"]), JUNK, max_size=3) | JUNK, max_size=4
    ).map(lambda rows: "\n".join(json.dumps(row, default=str, skipkeys=True) for row in rows).encode()),
    ".parquet": st.binary(max_size=40).map(lambda data: b"PAR1" + data + b"PAR1"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", FILES)
@FEW
@given(data=st.data())
def test_any_data_set_is_read_or_refused(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    for split in ("train", "test"):
        content = data.draw(FILES[suffix] | st.binary(max_size=50))
        (tmp_path / f"{split}{suffix}").write_bytes(content)
    for choice in ("refuse", "skip"):
        task = find_task("sentiment")(dataset=str(tmp_path), bad_rows=choice)  # type: ignore[call-arg]
        examples = ours(task.load)
        if examples is not None:
            texts = [text for split in examples.splits for text in examples.texts(split)]
            assert all(isinstance(text, str) and text.strip() for text in texts)
    ours(lambda: read_texts(str(tmp_path / f"train{suffix}"), "--texts"))
