"""``finllm-prune oneshot``: language models pruned block by block, from disk to disk, and what is said of them is so."""

import itertools
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.checkpoints import verify, zero_counts
from finllm_prune.errors import InputError
from finllm_prune.families import find_family
from finllm_prune.hub.card import rewrite_card
from finllm_prune.hub.parcel import pack
from finllm_prune.loading import load_tokenizer
from finllm_prune.oneshot import OneShotRecipe, oneshot
from finllm_prune.oneshot.blocks import influence, perplexity_without
from finllm_prune.oneshot.recipe import parse
from finllm_prune.oneshot.streamed import Memory, Streamed
from finllm_prune.oneshot.texts import Calibration, Windows, batches
from finllm_prune.pages.finished import Finished
from finllm_prune.pruning import NM, Calibrated, Cubic, Magnitude, Pruner, Rule, SparseGPT, Wanda
from finllm_prune.training import prune_once
from tests import small
from tests.conftest import DECODERS, Call, tiny_model

ROOT = Path(__file__).parents[1]
FULL = [pytest.param(name, marks=[] if name in ("qwen3", "gemma3_text") else pytest.mark.full) for name in DECODERS]


@pytest.fixture
def decoder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    """Saves a tiny language model of a type and returns the folder."""

    def save(model_type: str = "llama", layers: int = 3, **more: object) -> Path:
        # Qwen2's class of tokenizers adds a token of its own to any vocabulary.
        config = tiny_model(model_type, layers=layers, vocab_size=310, **more).config
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.1)
        model.save_pretrained(tmp_path / model_type)
        tokenizer.save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return save


def recipe(model: Path, name: str, *rules: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "pruning": {"oneshot": name, "rules": list(rules)},
        "calibration": None if name == "magnitude" else {"rows": 6, "tokens": 24},
        "evaluate": {"perplexity": False},
        "output": str(model.parent / f"{model.name}-{name}"),
    } | changes


def whole(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        total += float(model(input_ids=ids, labels=ids).loss) * (len(window) - 1)
        count += len(window) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("method", [Wanda(rows=6), SparseGPT(rows=6, block=16)])
def test_the_streamed_way_and_the_model_in_memory_are_equal_to_the_bit(
    decoder: Any, tokenizer: PreTrainedTokenizerFast, method: Calibrated
) -> None:
    folder, name = decoder(), type(method).__name__.lower()
    chosen = {"name": name} | ({"block": 16} if isinstance(method, SparseGPT) else {})
    oneshot(parse(recipe(folder, name, {"target": "encoder", "structure": "n:m", "sparsity": 0.5}) | {
        "pruning": {"oneshot": chosen, "rules": [{"target": "encoder", "structure": "n:m", "sparsity": 0.5}]},
    }))  # fmt: skip
    model, family = whole(folder), find_family("llama")
    rows = Calibration(rows=6, tokens=24).read(tokenizer, "calibration")
    pruner = Pruner(family.groups(model, [Rule("encoder", 0.5, NM(), Magnitude())]), Cubic())
    prune_once(model, family, pruner, method, batches(rows, Memory().tokens))
    written = whole(folder.parent / f"llama-{name}" / "masked").state_dict()
    assert all(torch.equal(value, written[key]) for key, value in model.state_dict().items())
    assert pruner.sparsity() == 0.5


@pytest.mark.parametrize("model_type", FULL)
def test_what_is_reported_is_what_plain_transformers_finds_in_the_files(
    decoder: Any, model_type: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finllm_prune.oneshot.run.compare", small.quick_compare())
    folder = decoder(model_type, layers=3)
    data = recipe(
        folder, "activations",
        {"target": "mlp", "structure": "neuron", "sparsity": 0.25},
        {"target": "attention", "structure": "head", "sparsity": 0.5},
        {"target": "encoder", "structure": "layer", "sparsity": 0.34},
        evaluate={"perplexity": {"tokens": 40, "rows": 5}, "labels": {"rows": 6, "tokens": 60}},
        export=["compact", "packed"],
    )  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    assert call("oneshot", path, f"output={tmp_path / 'out'}", "memory.tokens=100") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    windows = Windows(tokens=40, rows=5).read(load_tokenizer(str(folder)), "evaluate.perplexity")
    masked, compact = (whole(tmp_path / "out" / name) for name in ("masked", "compact"))
    assert report["perplexity"]["dense"] == pytest.approx(perplexity(whole(folder), windows), rel=1e-5)
    for model in (masked, compact):
        assert report["perplexity"]["pruned"] == pytest.approx(perplexity(model, windows), rel=1e-5)
    for name in ("masked", "compact", "packed"):
        assert verify(tmp_path / "out" / name)["format"] == name
    found = zero_counts(masked)
    sizes = {path: masked.get_submodule(path).weight.numel() for path in found}
    assert report["sparsity"]["encoder_linear"] == sum(found.values()) / sum(sizes.values())
    assert report["dropped_blocks"] == [
        i for i in range(3) if all(found[path] == sizes[path] for path in found if f"layers.{i}." in path)
    ]
    assert len(report["dropped_blocks"]) == 1
    shape = compact.config
    assert (shape.num_hidden_layers, shape.intermediate_size, shape.num_key_value_heads) == (2, 48, 1)
    assert all(word in (tmp_path / "out" / "README.md").read_text() for word in ("activations", "25 % in structure"))
    again = OneShotRecipe.load(tmp_path / "out" / "recipe.yaml")
    assert parse(again.resolved) == again
    assert call("oneshot", path, f"output={tmp_path / 'out'}") == 2
    for ask in (rewrite_card, Finished.read):  # pages of a run
        with pytest.raises(InputError, match="is the output of finllm-prune oneshot"):
            ask(tmp_path / "out")
    with pytest.raises(InputError, match=r"no gates were asked of this model, .* --allow-failed-gates"):
        pack(tmp_path / "out", "org/name")
    files = pack(tmp_path / "out", "org/name", allow_failed_gates=True).files
    assert b"**NO GATES were asked of this model" in files["README.md"]  # type: ignore[operator]


@torch.no_grad()
def test_labels_are_guessed_by_their_likelihood(decoder: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = decoder("llama", layers=2)
    labels = {
        "task": "sentiment",
        "rows": 4,
        "prompt": "News: {text} It is",
        "answers": {"neutral": " not worth a word"},
    }
    loaded = parse(recipe(folder, "magnitude", {"target": "mlp", "sparsity": 0.5}, evaluate={"labels": labels}))
    ask = loaded.evaluate.labels
    assert ask is not None
    examples = ask.load()
    asked, model = ask.asked(examples, tokenizer), Streamed(folder, Memory(tokens=64))
    passes = model.begin(asked.batches(64))
    for index, layer in model.blocks("test"):
        for step in passes:
            step.hidden = step.run(index, layer)
    got, plain = ask.logits(asked, asked.log_likelihoods(model, passes)), whole(folder)
    for row, text in enumerate(examples.splits["test"]["text"][:4]):
        prompt = tokenizer(f"News: {text} It is")["input_ids"][:-1]  # without the token that ends a text
        for column, label in enumerate(examples.labels):
            said = ask.answers.get(label, f" {label}")
            words = tokenizer(said, add_special_tokens=False)["input_ids"]
            logits = plain(input_ids=torch.tensor([prompt + words])).logits[0].log_softmax(-1)
            expected = sum(logits[len(prompt) - 1 + i, word] for i, word in enumerate(words))
            assert float(got[row, column]) == pytest.approx(float(expected), abs=1e-4)
    assert max(asked.last) > min(asked.last)


@torch.no_grad()
def test_heads_and_neurons_are_chosen_by_what_they_say(decoder: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = decoder("qwen3", layers=1)
    rules = [
        {"target": "mlp", "structure": "neuron", "sparsity": 0.5},
        {"target": "attention", "structure": "head", "sparsity": 0.5},
    ]
    oneshot(parse(recipe(folder, "activations", *rules)))
    model, seen = whole(folder), {}
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[0].get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0])
        )
    for row in Calibration(rows=6, tokens=24).read(tokenizer, "calibration"):
        model(input_ids=torch.tensor([row]))
    groups = torch.cat(seen["self_attn.o_proj"]).unflatten(1, (2, -1)).square().sum((0, 2)).sqrt()
    neurons = torch.cat(seen["mlp.down_proj"]).abs().mean(0)
    pruned = whole(folder.parent / "qwen3-activations" / "masked").model.layers[0]
    stay = (pruned.self_attn.o_proj.weight != 0).any(0).view(2, -1).any(1)
    assert stay.tolist() == (groups == groups.max()).tolist()
    alive = (pruned.mlp.down_proj.weight != 0).any(0)
    assert set(alive.nonzero().flatten().tolist()) == set(neurons.topk(32).indices.tolist())
    assert torch.equal(pruned.mlp.gate_proj.weight[alive], model.model.layers[0].mlp.gate_proj.weight[alive])


@torch.no_grad()
def test_blocks_are_worth_what_they_change_or_what_the_model_loses_without_them(decoder: Any) -> None:
    folder = decoder("gemma2", layers=3)
    streamed, model = Streamed(folder, Memory()), whole(folder)
    rows = torch.randint(5, 300, (4, 12)).tolist()
    changed = influence(streamed, streamed.begin(batches(rows, 24)))
    states: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(input_ids=torch.tensor(rows))
    expected = [1 - nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states)]
    torch.testing.assert_close(changed, torch.stack(expected), rtol=1e-3, atol=1e-6)
    lost = perplexity_without(streamed, rows, streamed.begin(batches(rows, 24)))
    for block in range(3):
        zeroed = whole(folder)
        for module in zeroed.model.layers[block].modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
        assert float(lost[block]) == pytest.approx(perplexity(zeroed, rows), rel=1e-4)
    by = {"oneshot": {"name": "activations", "blocks": "perplexity"}}
    rules = [{"target": "encoder", "structure": "layer", "sparsity": 0.34}]
    assert len(oneshot(parse(recipe(folder, "activations", pruning=by | {"rules": rules}))).dropped) == 1


def test_never_two_blocks_have_weights(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = decoder("llama", layers=4)
    loaded: list[list[weakref.ref[nn.Parameter]]] = []
    plain = Streamed._weights

    def watched(self: Streamed, names: dict[str, str]) -> Any:
        """Whoever asks for weights finds those of before gone; what has weights is what was asked for."""
        assert not [ref for refs in loaded for ref in refs if ref() is not None]
        assert all(parameter.is_meta for parameter in self.model.parameters())
        manager = plain(self, names)

        class Watching:
            def __enter__(self_) -> None:
                manager.__enter__()
                loaded.append([weakref.ref(self.model.get_parameter(name)) for name in names])
                assert sum(not p.is_meta for p in self.model.parameters()) == len(names)

            def __exit__(self_, *error: Any) -> Any:
                return manager.__exit__(*error)

        return Watching()

    monkeypatch.setattr(Streamed, "_weights", watched)
    rules = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
    oneshot(
        parse(
            recipe(
                folder, "activations", *rules, evaluate={"perplexity": {"tokens": 30, "rows": 3}}, export=["compact"]
            )
        )
    )
    block = 9  # tensors
    assert sum(len(refs) == block for refs in loaded) == 4 * 6, "dense, prune, pruned, widths, compact, proof"
    assert max(map(len, loaded)) == block


def test_half_precision_a_file_for_all_and_a_head_of_its_own(decoder: Any) -> None:
    folder = decoder("qwen2", tie_word_embeddings=False)
    whole(folder).to(torch.bfloat16).save_pretrained(folder)
    rules = [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]
    report = oneshot(parse(recipe(folder, "activations", *rules, export=["compact", "packed"])))
    small = whole(folder.parent / "qwen2-activations" / "compact")
    assert small.dtype == torch.bfloat16
    assert small.config.intermediate_size == 32
    assert small.lm_head.weight is not small.model.embed_tokens.weight
    assert report.bytes["compact"] < report.bytes["masked"]


CUT = {"target": "encoder", "sparsity": 0.5}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"calibration": None}, "calibration: wanda looks at texts; add calibration"),
    ({"pruning": {"oneshot": "wanda", "rules": [{"target": "mlp"}]}}, "pruning.rules.0.sparsity: this key is missing"),
    ({"pruning": {"rules": [CUT]}}, "pruning.oneshot: this key is missing; name a method"),
    ({"pruning": {"oneshot": {"name": "wanda", "rows": 3}, "rules": [CUT]}}, "pruning.oneshot.rows: set calibration.rows"),
    (
        {"pruning": {"oneshot": "sparsegpt", "rules": [{**CUT, "target": "mlp", "structure": "neuron"}]}},
        "pruning.rules.0.structure: pruning.oneshot cuts single weights",
    ),
    ({"pruning": {"oneshot": "activations", "rules": [CUT]}}, "pruning.rules.0.structure: oneshot activations cuts neurons"),
    ({"pruning": {"oneshot": "magnitude", "rules": [CUT]}}, "calibration: magnitude looks at no text"),
    ({"task": "sentiment"}, "task: oneshot trains nothing"),
    ({"export": ["compact"]}, "export: no rule removes whole neurons"),
    ({"export": ["onnx"]}, "export: onnx holds classifiers"),
    ({"evaluate": {"perplexity": False, "labels": {"prompt": "?"}}}, "evaluate.labels.prompt: {text} is missing"),
    ({"evaluate": {"perplexity": False, "labels": {"task": "reranking", "tokens": 60}}}, "evaluate.labels.task.name: "),
    ({"evaluate": {"perplexity": False, "labels": {"task": "instructions", "tokens": 60}}}, "evaluate.labels.task.name: "),
    ({"evaluate": {"perplexity": {"tokens": 100}}}, "evaluate.perplexity.tokens: the model reads at most 70 tokens"),
    ({"calibration": {"dataset": "/nowhere", "tokens": 24}}, "calibration.dataset: there is no folder '/nowhere'"),
    ({"memory": {"device": "abacus"}}, "memory.device: there is no 'abacus' here"),
]  # fmt: skip


def test_a_bad_recipe_is_one_sentence(decoder: Any) -> None:
    folder = decoder(layers=2)
    for changes, expected in BAD:
        with pytest.raises(InputError) as caught:
            oneshot(parse(recipe(folder, "wanda", CUT) | changes))
        assert str(caught.value).startswith(expected)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_model("bert").config, r"is no causal language model but a .*use `finllm-prune run`"),
        (AutoConfig.for_model("qwen3_moe", num_experts=4), "is a mixture of experts"),
        (AutoConfig.for_model("gpt2", architectures=["GPT2ForCausalLM"]), "no family is known for model_type 'gpt2'"),
    ],
)
def test_a_model_that_cannot_be_streamed_is_refused(tmp_path: Path, config: Any, expected: str) -> None:
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=expected):
        oneshot(parse(recipe(tmp_path / "model", "wanda", CUT)))


def test_tokens_that_the_model_does_not_know_are_refused(decoder: Any) -> None:
    folder = decoder(layers=1)
    config = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | {"vocab_size": 200}))
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the tokenizer of .* has token \d+, and the model 200 of them"):
        oneshot(parse(recipe(folder, "wanda", CUT)))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "oneshot").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_are_read(path: Path) -> None:
    assert OneShotRecipe.load(path).evaluate.perplexity is not None
