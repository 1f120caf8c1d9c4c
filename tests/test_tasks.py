"""Tasks: the embedded sentences, data in every form, and one sentence for everything that is wrong with it."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.loading import label_order
from finllm_prune.prepare import prepare
from finllm_prune.recipe import parse
from finllm_prune.saved import evaluate_saved
from finllm_prune.tasks import Examples, find_task
from finllm_prune.tasks.sentiment import Sentiment
from tests import small
from tests.conftest import DATA, LABELS, tiny_model

FINBERT = ["positive", "negative", "neutral"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def builtin() -> dict[str, list[dict[str, Any]]]:
    files = {split: (DATA / f"{split}.jsonl").read_text(encoding="utf-8") for split in small.SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in files.items()}


def normalised(text: str) -> str:
    """Equal for sentences that differ in case, numbers and punctuation only."""
    return " ".join(re.sub(r"[^\w\s]", " ", re.sub(r"\d+", "0", text.lower())).split())


def test_the_embedded_sentences_are_enough_for_all_labels(builtin: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(len(rows) for rows in builtin.values()) >= 900
    for rows in builtin.values():
        counts = Counter(row["label"] for row in rows)
        assert sorted(counts) == LABELS
        assert min(counts.values()) >= 0.2 * len(rows)


def test_no_embedded_sentence_comes_twice(builtin: dict[str, list[dict[str, Any]]]) -> None:
    places: dict[str, list[str]] = {}
    for split, rows in builtin.items():
        for i, row in enumerate(rows):
            places.setdefault(normalised(row["text"]), []).append(f"{split}:{i}")
    assert {text: where for text, where in places.items() if len(where) > 1} == {}


def test_the_embedded_sentences_are_read_as_they_lie_there(builtin: dict[str, list[dict[str, Any]]]) -> None:
    examples = Sentiment().load()
    assert list(examples.splits) == ["train", "validation", "test"]
    assert examples.labels == LABELS
    for split, rows in builtin.items():
        assert list(examples.splits[split]["text"]) == [row["text"] for row in rows]
        assert [LABELS[i] for i in examples.splits[split]["label"]] == [row["label"] for row in rows]


def as_jsonl(path: Path, rows: datasets.Dataset) -> None:
    rows.to_json(path.with_suffix(".jsonl"))


def as_csv(path: Path, rows: datasets.Dataset) -> None:
    rows.to_csv(path.with_suffix(".csv"))


def as_parquet(path: Path, rows: datasets.Dataset) -> None:
    rows.to_parquet(path.with_suffix(".parquet"))


WRITERS: list[Callable[[Path, datasets.Dataset], None]] = [as_jsonl, as_csv, as_parquet]


@pytest.mark.parametrize(
    "writers", [*([writer] * 3 for writer in WRITERS), WRITERS], ids=["jsonl", "csv", "parquet", "mixed"]
)
def test_every_file_format_gives_the_same_rows(tmp_path: Path, writers: list[Any]) -> None:
    for split, write in zip(small.SPLITS, writers, strict=True):
        write(tmp_path / split, datasets.Dataset.from_list(small.rows(split)))
    same_as_small(Sentiment(dataset=str(tmp_path)).load())


def same_as_small(examples: Examples) -> None:
    assert examples.labels == LABELS
    for split in small.SPLITS:
        got = [
            {"text": text, "label": LABELS[label]}
            for text, label in zip(examples.splits[split]["text"], examples.splits[split]["label"], strict=True)
        ]
        assert got == small.rows(split)


def test_a_class_label_column_brings_its_names_in_its_own_order(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=FINBERT)})
    for split in small.SPLITS:
        as_parquet(tmp_path / split, datasets.Dataset.from_list(small.rows(split), features=features))
    examples = Sentiment(dataset=str(tmp_path)).load()
    assert examples.labels == FINBERT
    same_as_small(examples.reordered(LABELS))


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    for split in small.SPLITS:
        content = [{"sentence": row["text"], "tone": row["label"], "id": 1} for row in small.rows(split)]
        small.write_jsonl(tmp_path / f"{split}.jsonl", content)
    same_as_small(Sentiment(dataset=str(tmp_path), text_column="sentence", label_column="tone").load())


def test_indices_become_names_by_task_labels(tmp_path: Path) -> None:
    for split in small.SPLITS:
        content = [{**row, "label": FINBERT.index(row["label"])} for row in small.rows(split)]
        small.write_jsonl(tmp_path / f"{split}.jsonl", content)
    with pytest.raises(InputError, match=r"task\.labels: column 'label' .* holds 0 and the like, not names; list the"):
        Sentiment(dataset=str(tmp_path)).load()
    same_as_small(Sentiment(dataset=str(tmp_path), labels=FINBERT).load().reordered(LABELS))


def test_white_space_around_a_label_is_none_of_it(tmp_path: Path) -> None:
    for split in small.SPLITS:
        content = [
            {**row, "label": (row["label"], f" {row['label']}\n")[i % 2]} for i, row in enumerate(small.rows(split))
        ]
        small.write_jsonl(tmp_path / f"{split}.jsonl", content)
    same_as_small(Sentiment(dataset=str(tmp_path)).load())


def test_validation_is_made_from_train_where_it_is_missing(tmp_path: Path) -> None:
    folder = small.write_folder(tmp_path / "data")
    (folder / "validation.jsonl").unlink()
    first, second = (Sentiment(dataset=str(folder)).load() for _ in range(2))
    parts = [list(first.splits[split]["text"]) for split in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == sorted(row["text"] for row in small.rows("train"))
    assert 0 < len(parts[1]) < len(parts[0])
    assert first.fingerprint() == second.fingerprint(), "the same rows each time"


def test_train_rows_takes_a_fixed_sample_of_train_only(tmp_path: Path) -> None:
    folder = small.write_folder(tmp_path / "data")
    task = Sentiment(dataset=str(folder), train_rows=10)
    examples = task.load()
    texts = list(examples.splits["train"]["text"])
    assert len(set(texts)) == 10
    assert set(texts) < {row["text"] for row in small.rows("train")}
    assert list(task.load().splits["train"]["text"]) == texts
    assert len(examples.splits["test"]) == len(small.rows("test"))


def test_a_sample_without_one_class_keeps_the_labels_of_the_data(tmp_path: Path) -> None:
    examples = Sentiment(dataset=str(small.write_folder(tmp_path / "data")), train_rows=1).load()
    assert examples.labels == LABELS


@pytest.mark.parametrize("train_rows", [0, -1, 25])
def test_a_sample_that_cannot_be_taken(tmp_path: Path, train_rows: int) -> None:
    folder = small.write_folder(tmp_path / "data")
    with pytest.raises(InputError, match=rf"^task\.train_rows: {train_rows} of 24 rows cannot be taken$"):
        Sentiment(dataset=str(folder), train_rows=train_rows).load()


def append(name: str, row: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        split = name.removesuffix(".jsonl")
        small.write_jsonl(folder / name, [*small.rows(split), row])

    return change


def put(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.glob(f"{name.partition('.')[0]}.*"):
            path.unlink()
        (folder / name).write_text(content, encoding="utf-8")

    return change


COMMA = "text,label\nProfit rose, sales fell,positive\nThe meeting,neutral\n"
BAD_DATA = [
    (append("test.jsonl", {"text": "So so.", "label": "mixed"}), "test.jsonl, line 10, has the unknown label 'mixed'; known"),
    (append("train.jsonl", {"text": "So so.", "label": None}), "train.jsonl, line 25, has the unknown label None; known are"),
    (append("train.jsonl", {"text": "So so.", "label": ""}), "train.jsonl, line 25, has the unknown label ''; known are neg"),
    (append("train.jsonl", {"text": "So so.", "label": " \n"}), "train.jsonl, line 25, has the unknown label ' \\n'; known"),
    (append("test.jsonl", {"text": "So so.", "label": "Positive"}), "line 10, has the unknown label 'Positive'; known are"),
    (append("train.jsonl", {"text": "", "label": "neutral"}), "train.jsonl, line 25, has no text in column 'text'; mend"),
    (append("test.jsonl", {"text": " \n", "label": "neutral"}), "test.jsonl, line 10, has no text in column 'text'; mend"),
    (append("test.jsonl", {"text": None, "label": "neutral"}), "test.jsonl, line 10, has no text in column 'text'; mend"),
    (put("test.jsonl", ""), "test.jsonl cannot be read as jsonl (it is empty); mend it"),
    (put("test.csv", "text,label\n"), "test.csv cannot be read as csv"),
    (put("train.jsonl", '{"text": "a"'), "train.jsonl cannot be read as jsonl (JSON parse error"),
    (put("train.parquet", "PAR1"), "train.parquet cannot be read as parquet"),
    (put("train.csv", COMMA), "train.csv: its rows have more fields than its header; put texts with a comma in quotes"),
    (put("test.jsonl", '{"text": "So so.", "label": ["neutral"]}\n'), "line 1, has the unknown label ['neutral']"),
    (put("train.jsonl", '{"text": "So so.", "label": ["neutral"]}\n'), "holds ['neutral'] and the like, not names; list"),
    (put("train.jsonl", '{"text": "So so.", "label": "neutral"}\n'), "have the same label (neutral); there is nothing to"),
    (put("test.jsonl", '{"text": "So so.", "tone": "neutral"}\n'), "there is no column 'label' (task.label_column); its col"),
    (put("train.jsonl", '{"line": "So so.", "label": "a"}\n{"line": "So.", "label": "b"}\n'), "no column 'text' (task.text"),
    (lambda folder: (folder / "test.jsonl").unlink(), "needs the splits train and test; it has train, validation"),
    (lambda folder: (folder / "train.jsonl").unlink(), "needs the splits train and test; it has validation, test"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no train, validation or test .parquet, .jsonl or"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), BAD_DATA)
def test_bad_data_is_one_sentence(tmp_path: Path, change: Callable[[Path], None], expected: str) -> None:
    folder = small.write_folder(tmp_path / "data")
    change(folder)
    with pytest.raises(InputError) as caught:
        Sentiment(dataset=str(folder)).load()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_row_is_named_as_it_lies_in_the_file_also_where_rows_are_drawn(tmp_path: Path) -> None:
    folder = small.write_folder(tmp_path / "data")
    (folder / "validation.jsonl").unlink()
    append("train.jsonl", {"text": "", "label": "neutral"})(folder)
    with pytest.raises(InputError, match=r"train\.jsonl, line 25, has no text"):
        Sentiment(dataset=str(folder), train_rows=4).load()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/such/folder", "there is no folder '/no/such/folder'; name a folder, a Hub id, or builtin"),
        ("./absent", "there is no folder './absent'; name a folder"),
        ("data/of/mine", "there is no folder 'data/of/mine'; name a folder"),
        ("some/where", "'some/where' is neither a local folder nor a data set that the Hub gave"),
    ],
)
def test_a_data_set_that_is_not_there(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=r"^task\.dataset: ") as caught:
        Sentiment(dataset=name).load()
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("labels", [[], ["positive"], ["positive", "negative", "positive"]])
def test_labels_that_tell_nothing_apart(labels: list[str]) -> None:
    with pytest.raises(InputError, match=r"^task\.labels: at least two different class names are needed"):
        Sentiment(labels=labels).load()


@pytest.mark.parametrize("length", [2, 0, -1])
def test_a_length_that_holds_no_text(length: int) -> None:
    with pytest.raises(InputError, match=r"^task\.max_length: a text needs at least 3 tokens"):
        Sentiment(max_length=length)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"^task\.name: unknown task 'ner'; known: filings, instructions, reranking, sentiment$"
    ):
        find_task("ner")
    assert find_task("sentiment") is Sentiment


def test_the_fingerprint_is_of_every_text_label_and_split_and_not_of_the_order_of_labels(tmp_path: Path) -> None:
    def fingerprint(name: str, split: str = "test", **change: str) -> str:
        folder = small.write_folder(tmp_path / name)
        content = small.rows(split)
        content[-1] = content[-1] | change
        small.write_jsonl(folder / f"{split}.jsonl", content)
        return Sentiment(dataset=str(folder)).load().fingerprint()

    plain = fingerprint("plain")
    assert fingerprint("again") == plain
    others = [
        fingerprint("text", text="The report is on the web site."),
        fingerprint("label", label="positive"),
        fingerprint("train", split="train", text="The table is on page five of the report."),
        fingerprint("validation", split="validation", text="The table is on page five of the report."),
    ]
    moved = small.write_folder(tmp_path / "moved")
    small.write_jsonl(moved / "train.jsonl", small.rows("train")[:-1])
    small.write_jsonl(moved / "validation.jsonl", [small.rows("train")[-1], *small.rows("validation")])
    others.append(Sentiment(dataset=str(moved)).load().fingerprint())
    assert len({plain, *others}) == 6
    examples = Sentiment(dataset=str(tmp_path / "plain")).load()
    assert examples.reordered(FINBERT).fingerprint() == plain


def test_tokens_are_cut_and_padding_is_masked(tokenizer: PreTrainedTokenizerFast) -> None:
    task = Sentiment(max_length=12)
    rows = datasets.Dataset.from_dict({"text": ["Sales rose.", "Sales rose again " * 9], "label": [2, 0]})
    tokens = task.tokenize(rows, tokenizer)
    lengths = [len(ids) for ids in tokens["input_ids"]]
    assert lengths[0] < lengths[1] == 12
    batch = task.collator(tokenizer)(list(tokens))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["labels"].tolist() == [2, 0]


# The order of labels belongs to the checkpoint: FinBERT says positive, negative, neutral.


def save_with_labels(folder: Path, tokenizer: PreTrainedTokenizerFast, order: list[str]) -> Path:
    """The same tiny model under another order of its labels: rows of the head and names move together."""
    model = tiny_model(seed=3)
    index = [LABELS.index(name) for name in order]
    with torch.no_grad():
        model.classifier.weight.copy_(20 * model.classifier.weight[index])
        model.classifier.bias.copy_(model.classifier.bias[index])
    model.config.id2label = dict(enumerate(order))
    model.config.label2id = {name: i for i, name in enumerate(order)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_order_of_a_checkpoint_is_adopted_only_where_its_classes_are_the_same() -> None:
    def config(*names: str) -> Any:
        return AutoConfig.for_model("bert", id2label=dict(enumerate(names)), num_labels=len(names))

    assert label_order(config(*FINBERT), LABELS) == FINBERT
    assert label_order(config("Positive", "NEGATIVE", "Neutral"), LABELS) == FINBERT
    assert label_order(config("LABEL_0", "LABEL_1", "LABEL_2"), LABELS) == LABELS
    assert label_order(config("positive", "negative"), LABELS) == LABELS
    folded = ["Positive", *LABELS]
    assert label_order(config(*FINBERT), folded) == folded
    assert label_order(config(*folded), sorted(folded, reverse=True), must_match="some/model") == folded
    with pytest.raises(
        InputError, match=r"predicts positive, negative, neutral, but the data has Positive, negative, ne"
    ):
        label_order(config(*FINBERT), folded, must_match="some/model")
    with pytest.raises(
        InputError, match=r"some/model predicts label_0, label_1, but the data has negative, neutral, pos"
    ):
        label_order(config("LABEL_0", "LABEL_1"), LABELS, must_match="some/model")


def test_a_run_goes_on_in_the_order_of_its_checkpoint(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_with_labels(tmp_path / "finbert", tokenizer, FINBERT)
    data = small.write_folder(tmp_path / "data")
    recipe = {
        "model": str(folder), "task": {"name": "sentiment", "dataset": str(data)}, "output": str(tmp_path / "out"),
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]},
        "training": {"use_cpu": True},
    }  # fmt: skip
    ready = prepare(parse(recipe), resume=False, overwrite=False)
    assert ready.examples.labels == FINBERT
    assert ready.model.config.id2label == dict(enumerate(FINBERT))
    assert [FINBERT[i] for i in ready.tokens["test"]["labels"]] == [row["label"] for row in small.rows("test")]
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(ready.model.classifier.weight, saved.classifier.weight), "the trained head is kept"


def test_an_evaluation_gives_each_checkpoint_its_own_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.few_resamples(monkeypatch)
    data = str(small.write_folder(tmp_path / "data"))
    ours, other = (
        save_with_labels(tmp_path / name, tokenizer, order) for name, order in (("ours", LABELS), ("other", FINBERT))
    )
    model = AutoModelForSequenceClassification.from_pretrained(other)
    right = []
    for row in small.rows("test"):
        with torch.inference_mode():
            logits = model(**tokenizer(row["text"], return_tensors="pt", return_token_type_ids=False)).logits
        right.append(FINBERT[int(logits.argmax())] == row["label"])
    assert 0 < sum(right) < len(right), "a model that is always wrong, or always right, would prove nothing"
    figures, _ = evaluate_saved(str(other), "sentiment", data, baseline=str(ours))
    assert figures["agreement"] == 1.0
    assert figures["metrics"]["accuracy"]["pruned"] == pytest.approx(sum(right) / len(right))
    assert figures["metrics"]["accuracy"]["dense"] == figures["metrics"]["accuracy"]["pruned"]


def test_an_evaluation_refuses_a_model_of_other_classes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_with_labels(tmp_path / "model", tokenizer, LABELS)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "hawkish", "1": "neutral", "2": "dovish"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="predicts hawkish, neutral, dovish, but the data has negative, neutral, positive"
    ):
        evaluate_saved(str(folder), "sentiment", str(small.write_folder(tmp_path / "data")), baseline=None)


def test_an_evaluation_on_some_of_the_classes_says_how_the_others_are_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = save_with_labels(tmp_path / "model", tokenizer, LABELS)
    data = small.write_folder(tmp_path / "data")
    for file in data.iterdir():
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["label"] != "neutral"]
        file.write_text("\n".join([*kept, ""]))
    with pytest.raises(InputError, match=r"the data has negative, positive; list the model's classes in task\.labels"):
        evaluate_saved(str(folder), "sentiment", str(data))


def test_an_evaluation_of_longer_texts_than_the_model_reads_is_one_sentence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_with_labels(tmp_path / "model", tokenizer, LABELS)
    data = small.write_folder(tmp_path / "data")
    (data / "test.jsonl").write_text(json.dumps({"text": "Profit rose again. " * 60, "label": "positive"}) + "\n" * 2)
    with (data / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "Profit fell.", "label": "negative"}) + "\n")
    evaluate_saved(str(folder), "sentiment", str(data), max_length=200)
    assert f"tokenizer reads {tokenizer.model_max_length} tokens at most, and 200 were asked for" in caplog.text
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 4096}))
    with pytest.raises(InputError, match=r"^task\.max_length: a text has 200 tokens, and the model reads at most 70"):
        evaluate_saved(str(folder), "sentiment", str(data), max_length=200)
