"""Instructions: the completion alone is learned, its likelihood is what transformers says, and a whole run on Qwen3."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, pipeline

from finllm_prune.checkpoints import verify
from finllm_prune.errors import InputError
from finllm_prune.export import export_delta
from finllm_prune.families import find_family
from finllm_prune.inference import answer, logits_of
from finllm_prune.judges import CompletionJudge
from finllm_prune.pruning import Cubic, Neuron, Pruner, Rule, Taylor
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.saved import evaluate_saved
from finllm_prune.settings import build
from finllm_prune.tasks.completions import completion_loss
from finllm_prune.tasks.instructions import Instructions
from finllm_prune.training import Distillation, PruningTrainer, Teacher
from tests import small
from tests.causal import CHAT, byte_tokenizer, causal
from tests.test_suite import Page
from tests.test_trainer import assert_same

ROWS = [
    {"prompt": "Did profit rise?", "completion": "Yes, by a third."},
    {"prompt": "Which way did sales go, and why did they go there?", "completion": "Down."},
    {"prompt": "Who meets on Tuesday?", "completion": "The board meets on Tuesday, as in each month."},
    {"prompt": "Outlook?", "completion": "Weak demand, so a lower margin."},
]
SAID = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Did profit rise?"},
    {"role": "assistant", "content": "It did."},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    for split in ("train", "validation", "test"):
        small.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


def tokens(folder: Path, split: str = "train", chat: str | None = CHAT, **changes: Any) -> datasets.Dataset:
    task = Instructions(dataset=str(folder), **changes)
    return task.tokenize(task.load().splits[split], byte_tokenizer(chat))


@pytest.mark.parametrize("chat", [CHAT, None], ids=["chat", "plain"])
def test_the_completion_alone_is_learned_behind_the_tokens_of_its_prompt(tmp_path: Path, chat: str | None) -> None:
    tokenizer = byte_tokenizer(chat)
    learned = tokens(write(tmp_path), chat=chat)
    (judged,) = zip(*tokens(tmp_path, "test", chat)["input_ids"], strict=True)
    assert list(judged) == list(learned["input_ids"]), "what is judged is what is learned"
    for row, given in zip(learned, ROWS, strict=True):
        prompt, completion = given.values()
        if chat is not None:
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert row["input_ids"] == tokenizer(f"{prompt}{completion}<|im_end|>")["input_ids"]
        asked = tokenizer(prompt)["input_ids"]
        assert row["labels"] == [-100] * len(asked) + row["input_ids"][len(asked) :]


def test_trls_forms_and_a_template_ask_the_same(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "What of this?\nSales rose.\nAnswer:"}]
    forms: dict[str, list[dict[str, Any]]] = {"texts": [], "turns": [], "messages": [], "template": []}
    for label in ("positive", "negative"):
        said = [{"role": "assistant", "content": label}]
        forms["texts"].append({"prompt": asked[0]["content"], "completion": label})
        forms["turns"].append({"prompt": asked, "completion": said})
        forms["messages"].append({"messages": asked + said})
        forms["template"].append({"text": "Sales rose.", "label": label})
    found = []
    for name, rows in forms.items():
        more = {"template": "What of this?\n{text}\nAnswer:", "labels": ["positive", "negative"]}
        found.append(tokens(write(tmp_path / name, rows), **(more if name == "template" else {}))[:])
    assert found[0] == found[1] == found[2] == found[3]
    closed = tokens(tmp_path / "texts", "test", labels=["positive", "negative"])
    assert closed["labels"][:] == [0, 1]
    assert closed["input_ids"][0][0] == found[0]["input_ids"][0] != closed["input_ids"][0][1]


def test_earlier_turns_are_asked_and_the_last_answer_is_learned(tmp_path: Path) -> None:
    folder = write(tmp_path, [{"messages": [*SAID, {"role": "assistant", "content": "Orders rose."}]}] * 2)
    for chat, rest in ((CHAT, "Orders rose.<|im_end|>"), (None, " Orders rose.<|im_end|>")):
        tokenizer, row = byte_tokenizer(chat), tokens(folder, chat=chat)[0]
        learned = [i for i in row["labels"] if i != -100]
        assert tokenizer.decode(learned) == rest
        asked = tokenizer.decode(row["input_ids"][: -len(learned)])
        if chat is None:
            lines = "System: Be brief.\nUser: Did profit rise?\nAssistant: It did.\nUser: Why?\nAssistant:"
            assert asked == lines
        else:
            assert asked == tokenizer.apply_chat_template(SAID, add_generation_prompt=True, tokenize=False)


def test_a_long_text_loses_its_end_and_its_question_and_answer_stay(tmp_path: Path) -> None:
    rows = [{"text": "Profit rose. " + "and sales " * 99, "label": label} for label in ("up", "down")]
    row = tokens(write(tmp_path, rows), max_length=80, template="News: {text}\nUp or down?")[0]
    assert len(row["input_ids"]) == 80
    text = byte_tokenizer().decode(row["input_ids"])
    assert text.startswith("<|im_start|>user\nNews: Profit rose. and sales")
    assert text.endswith("\nUp or down?<|im_end|>\n<|im_start|>assistant\nup<|im_end|>")


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_transformers_own_packed_or_not(tmp_path: Path, model_type: str, packing: bool) -> None:
    rows, tokenizer, model = tokens(write(tmp_path)), byte_tokenizer(), causal(model_type)
    sequences = [torch.tensor(ids) for ids in rows["input_ids"]]
    labels = [torch.tensor(values) for values in rows["labels"]]
    pad = torch.nn.utils.rnn.pad_sequence
    own = model(
        input_ids=pad(sequences, True), attention_mask=pad([torch.ones_like(ids) for ids in sequences], True),
        labels=pad(labels, True, -100),
    ).loss  # fmt: skip
    collator = Instructions(packing=packing).collator(tokenizer)
    batch = collator(list(rows))
    assert len(batch["input_ids"]) == (1 if packing else len(rows))
    logits = answer(model, batch, collator.gather)["logits"]
    assert logits.shape == (sum(int((each != -100).sum()) for each in labels), 300)
    torch.testing.assert_close(completion_loss(logits, batch["labels"]), own)


def test_a_row_is_judged_by_the_likelihood_of_its_completion(tmp_path: Path) -> None:
    task, tokenizer, model = Instructions(dataset=str(write(tmp_path))), byte_tokenizer(), causal()
    examples = task.load()
    found = logits_of(model, task.tokenize(examples.splits["test"], tokenizer), task.collator(tokenizer))
    judge = task.judge(examples)
    assert isinstance(judge, CompletionJudge)
    answers = judge.answers(found)
    total, count, right = 0.0, 0, 0
    for row, likelihood in zip(tokens(tmp_path), found[:, 0], strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.inference_mode():
            out = model(input_ids=ids, labels=labels)
        learned = int((labels != -100).sum())
        assert float(likelihood) == pytest.approx(-float(out.loss) * learned, rel=1e-4)
        right += int((out.logits[0, :-1].argmax(-1) == labels[0, 1:]).sum())
        total, count = total + float(out.loss) * learned, count + learned
    assert judge.value("perplexity", answers) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert judge.value("token_accuracy", answers) == right / count
    draws = np.array([[0, 0, 3, 2], [1, 2, 2, 1]])
    each = [judge.value("perplexity", answers, units) for units in draws]
    assert judge.values("perplexity", answers, draws).tolist() == each
    assert judge.same(answers, answers).tolist() == [1.0] * 4
    assert judge.paired_test(answers, answers)[1] == 1.0
    other = answers.copy()
    other[:, 3] += 1
    assert judge.same(answers, other).tolist() == pytest.approx((1 - 1 / answers[:, 1]).tolist())
    other[:, 3:][other[:, 3:] >= 0] = 7
    assert judge.collapsed(other)
    assert not judge.collapsed(answers)


def trainer(folder: Path, data: Path, **changes: Any) -> PruningTrainer:
    """Prunes a tiny Qwen3 while it learns from a teacher with other weights."""
    task, tokenizer = Instructions(dataset=str(data), packing=changes.pop("packing", False)), byte_tokenizer()
    hidden = changes.pop("hidden", 0.1)
    model, teacher = causal(), causal()
    with torch.no_grad():
        teacher.get_input_embeddings().weight.mul_(0.5)
    settings = {
        "output_dir": str(folder), "max_steps": 6, "save_steps": 3, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    }  # fmt: skip
    rule = Rule("mlp", 0.5, Neuron(), Taylor())
    examples = task.load()
    return PruningTrainer(
        model, TrainingArguments(**(settings | changes)),
        pruner=Pruner(find_family("qwen3").groups(model, [rule]), Cubic()),
        teacher=Teacher(teacher, Distillation(alpha=0.5, hidden=hidden), [0, 1]),
        train_dataset=task.tokenize(examples.splits["train"], tokenizer), data_collator=task.collator(tokenizer),
        task_loss=task.loss(examples),
    )  # fmt: skip


def weights(trained: PruningTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in trained.model.state_dict().items()}


def test_all_tokens_of_a_step_count_alike_in_however_many_batches(tmp_path: Path) -> None:
    shapes = [{"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}]
    shapes.append({"per_device_train_batch_size": 4, "packing": True})
    ends = []
    for number, shape in enumerate(shapes):
        fixed = {"max_steps": 1, "save_steps": 9, "optim": "sgd", "hidden": 0.0}  # hidden states count by texts
        trained = trainer(tmp_path / str(number), write(tmp_path / "data"), **fixed, **shape)
        trained.train()
        ends.append(weights(trained))
    for other in ends[1:]:
        for name, value in ends[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    whole = trainer(tmp_path / "whole", data)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = trainer(tmp_path / "resumed", data, resume_from_checkpoint=checkpoint)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(weights(resumed), weights(whole))
    assert whole.pruner is not None
    assert whole.pruner.sparsity() == 0.5


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS, {"prompt": "Why?", "completion": " "}], r"test\.jsonl, line 5, has no completion"),
        ([*ROWS, {"prompt": "", "completion": "So."}], r"line 5, has no text in column 'prompt'"),
        ([{"messages": SAID}], r"line 1, has no completion: .* no messages that end with the assistant's"),
        ([{"text": "Sales rose.", "label": "up"}], r"there is no column 'prompt' \(task\.text_column\)"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    write(tmp_path)
    small.write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(InputError, match=said):
        Instructions(dataset=str(tmp_path)).load()


def recipe(model: Path, data: Path, out: Path) -> dict[str, Any]:
    return {
        "model": str(model), "output": str(out), "task": {"name": "instructions", "dataset": str(data), "max_length": 96},
        "dense": {"checkpoint": str(model)},
        "distillation": {"alpha": 0.5, "hidden": 0.1},
        "pruning": {"rules": [
            {"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.25},
            {"target": "attention", "structure": "head", "criterion": "taylor", "sparsity": 0.5},
        ]},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_strategy": "epoch", "use_cpu": True,
            "disable_tqdm": True, "report_to": "none",
        },
        "export": ["masked", "compact", "ragged", "packed", "ragged-remote"], "recording": False,
        "gates": {"perplexity_retention": 1e6, "token_accuracy": 0.0},
    }  # fmt: skip


def test_a_run_on_qwen3_is_proved_and_writes_with_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    base, data, out = tmp_path / "base", write(tmp_path / "data"), tmp_path / "out"
    model = causal()
    model.generation_config.update(eos_token_id=[2, 0], repetition_penalty=1.5)
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    report = run(parse(recipe(base, data, out)))
    assert report is not None
    assert report.passed()
    figures = json.loads((out / "report.json").read_text())
    assert figures["perplexity"]["dense"] > 1
    assert figures["pipeline_tag"] == "text-generation"
    for name in ("masked", "compact", "ragged", "packed", "ragged-remote"):
        assert verify(out / name)["format"] == name
        saved = AutoModelForCausalLM.from_pretrained(out / name)
        assert saved.generation_config.eos_token_id == [2, 0]
        assert saved.generation_config.repetition_penalty == 1.5
        assert len(saved.model.layers[0].self_attn.k_proj.weight) == (16 if name == "masked" else 8)
    compact = AutoModelForCausalLM.from_pretrained(out / "compact")
    assert (compact.config.num_key_value_heads, compact.config.num_attention_heads) == (1, 2)
    assert compact.lm_head.weight is compact.model.embed_tokens.weight
    masked = AutoModelForCausalLM.from_pretrained(out / "masked")
    asked = AutoTokenizer.from_pretrained(out / "compact").apply_chat_template(
        SAID, return_tensors="pt", return_dict=True
    )
    torch.testing.assert_close(compact(**asked).logits, masked(**asked).logits, rtol=1e-4, atol=1e-5)
    written = pipeline("text-generation", model=str(out / "compact"))(SAID, max_new_tokens=5, do_sample=False)
    assert written[0]["generated_text"][-1]["role"] == "assistant"
    figures_again, _ = evaluate_saved(str(out / "compact"))
    assert figures_again["perplexity"]["value"] == pytest.approx(figures["perplexity"]["pruned"], rel=1e-5)
    _, counts = export_delta(str(base), out, tmp_path / "delta")
    assert sum(counts.values()) == len(list(compact.parameters())), "what is tied lies there once"
    card = (out / "README.md").read_text()
    assert 'pipeline("text-generation", model="out/ragged-remote")' in card
    page = " ".join(Page((out / "report.html").read_text()).text.split())
    assert "by more than 0.01 of log-likelihood of a token" in card, "which is no share"
    assert "than dense in log-likelihood of a token" in page
    assert "worse by more than 0.01 (one-sided" in page


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft still asks for it
def test_adapters_beside_a_head_that_is_tied_to_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.few_resamples(monkeypatch)
    base, data, out = tmp_path / "base", write(tmp_path / "data"), tmp_path / "out"
    causal().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    peft = {"r": 4, "base_dtype": "bfloat16", "keep_adapter": True}
    plain = recipe(base, data, out) | {"peft": peft, "export": ["masked", "compact"]}
    plain["training"] |= {"bf16": True}
    plain["pruning"]["oneshot"] = {"name": "activations", "rows": 2}
    with pytest.raises(InputError, match=r"peft\.target_modules: the head of a language model"):
        run(parse(plain | {"peft": {"target_modules": ["q_proj", "lm_head"]}}))
    report = run(parse(plain))
    assert report is not None
    dense, compact = causal(), AutoModelForCausalLM.from_pretrained(out / "compact")
    assert torch.equal(compact.lm_head.weight, dense.lm_head.weight.bfloat16().float())
    assert compact.lm_head.weight is compact.model.embed_tokens.weight
    assert (compact.config.num_key_value_heads, compact.config.intermediate_size) == (1, 48)
    for name in ("masked", "compact", "lora/base"):
        assert verify(out / name)
    beside = AutoModelForCausalLM.from_pretrained(out / "lora" / "base")
    asked = {"input_ids": torch.arange(5, 45).view(4, 10)}
    assert not torch.allclose(beside(**asked).logits, compact(**asked).logits, atol=1e-4)
    both = PeftModel.from_pretrained(beside, str(out / "lora" / "adapter"))
    torch.testing.assert_close(both(**asked).logits, compact(**asked).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"template": "no place"}, r"task\.template: it holds \{text\} once"),
        ({"class_weights": "balanced"}, r"task\.class_weights: a completion is a text"),
    ],
)
def test_keys_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(Instructions, changes, "task")
