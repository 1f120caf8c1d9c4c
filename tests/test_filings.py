"""Filings: which tokens of a long document are read, what is left of its HTML, and the embedded passages."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.recipe import parse
from finllm_prune.run import run
from finllm_prune.settings import build
from finllm_prune.tasks import find_task
from finllm_prune.tasks.filings import Filings
from finllm_prune.tasks.markup import plain_text
from finllm_prune.tasks.task import BUILTIN
from tests import small
from tests.conftest import LABELS

ITEMS = [
    "business", "controls_procedures", "legal_proceedings", "market_for_equity", "market_risk", "mdna", "properties",
    "risk_factors",
]  # fmt: skip
LONG = "Profit rose again. " * 30 + "Sales fell at the end."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def builtin() -> dict[str, list[dict[str, Any]]]:
    files = {split: BUILTIN / "filings" / f"{split}.jsonl" for split in small.SPLITS}
    return {
        split: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for split, path in files.items()
    }


def ids_of(task: Filings, text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    rows = datasets.Dataset.from_dict({"text": [text], "label": [0]})
    tokens = task.tokenize(rows, tokenizer)[0]
    assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])
    return list(tokens["input_ids"])


def test_head_reads_the_first_tokens_and_head_tail_both_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer(LONG, verbose=False)["input_ids"]
    assert len(whole) > 64
    assert ids_of(Filings(max_length=20), LONG, tokenizer) == [*whole[:19], whole[-1]]
    both = ids_of(Filings(max_length=20, strategy="head_tail"), LONG, tokenizer)
    assert both == [*whole[:5], *whole[-15:]], "a quarter from the beginning, the rest from the end"
    more = ids_of(Filings(max_length=20, strategy="head_tail", head=0.8), LONG, tokenizer)
    assert more == [*whole[:16], *whole[-4:]]


@pytest.mark.parametrize("head", [0.001, 0.999])
def test_special_tokens_stay_at_both_ends(tokenizer: PreTrainedTokenizerFast, head: float) -> None:
    ids = ids_of(Filings(max_length=12, strategy="head_tail", head=head), LONG, tokenizer)
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_a_short_document_is_the_same_under_both_strategies(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Profit rose again."
    both = [ids_of(Filings(strategy=name), text, tokenizer) for name in ("head", "head_tail")]
    assert both[0] == both[1] == tokenizer(text)["input_ids"]


def test_no_more_tokens_than_the_model_has_positions_for(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("head", "head_tail"):
        assert len(ids_of(Filings(strategy=name, max_length=4096), LONG, tokenizer)) == tokenizer.model_max_length


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"strategy": "tail"}, r"^task\.strategy\S*: .*'head', 'head_tail' or 'windows', not 'tail'"),
        ({"head": 0}, r"^task\.head: the part taken from the beginning lies between 0 and 1, not at 0"),
        ({"head": 1.0}, r"^task\.head: "),
        ({"max_length": 2}, r"^task\.max_length: "),
    ],
)
def test_what_the_task_cannot_do_is_refused_by_its_key(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        build(find_task("filings"), settings, "task")


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<p>Item&nbsp;1A.</p><div>Risk&#160;Factors</div>", "Item 1A. Risk Factors"),
        ("M<b>arket</b> Risk &amp; more", "Market Risk & more"),
        ("<big>T</big>he <tt>c</tt>ost<s>s</s> o<wbr>f <ins>l</ins>oans", "The costs of loans"),
        (
            "All\n of it:<table><tr><td>Net\n sales</td><td>412</td></tr><tr><td>Loss</td></tr></table><p>Of the year.",
            "All of it:\nNet sales 412\nLoss\nOf the year.",
        ),
        ("<table><tr><td>cut <tr><td>off", "cut\noff"),
        ("of $<ix:nonFraction scale='6'>1,234</ix:nonFraction> million", "of $1,234 million"),
        ("<style>p {color: red}</style>Shown<script>var x = 'hidden';</script>", "Shown"),
        ("<ix:header><p>context</p></ix:header><p>Body", "Body"),
        ("one<br/>two<hr>three", "one two three"),
        ("a margin <5% and costs < sales", "a margin <5% and costs < sales"),
        ("fell <Q3 levels &amp; costs rose > 5%", "fell <Q3 levels & costs rose > 5%"),
        ("<p>a margin <5% and costs < sales", "a margin <5% and costs < sales"),
        ("<html><head><title>10-K</title><meta charset='ascii'><body>Item 1", "Item 1"),
        ("<html><head><title>10-K</title></head>Item 1", "Item 1"),
        ("<div style='DISPLAY : none'><p>context</p></div><p hidden>tag</p>Item <span style='color: red'>1", "Item 1"),
        ("<?xml version='1.0' encoding='ASCII'?><html xmlns='http://www.w3.org/1999/xhtml'><p>Café</p></html>", "Café"),
        ("<DOCUMENT><TYPE>10-K<TEXT><P>Item 1</P></TEXT></DOCUMENT>", "10-K Item 1"),
        ("<!-- nothing -->", ""),
        ("<div>" * 3000 + "deep" + "</div>" * 3000, "deep"),
    ],
)
def test_html_becomes_what_a_reader_sees(html: str, expected: str) -> None:
    assert plain_text(html) == expected


@given(st.text(st.characters(exclude_characters="&")).filter(lambda text: "<!" not in text and "<?" not in text))
@example("loss<p and <b-1")
def test_text_without_markup_loses_its_white_space_only(text: str) -> None:
    assert plain_text(text) == " ".join(text.split())


TAGS = [
    "<p>",
    "</p>",
    "<b>",
    "</b>",
    "<table>",
    "</table>",
    "<tr>",
    "</tr>",
    "<td>",
    "</td>",
    "<br>",
    "</body>",
    "<body>",
    "</x>",
]


@given(st.lists(st.sampled_from([*TAGS, "word "]), max_size=40))
def test_markup_out_of_order_loses_no_word(parts: list[str]) -> None:
    assert plain_text("<p>" + "".join(parts)).split() == ["word"] * parts.count("word ")


def folder_with(folder: Path, text: str) -> str:
    small.write_folder(folder)
    small.write_jsonl(folder / "test.jsonl", [*small.rows("test"), {"text": text, "label": "neutral"}])
    return str(folder)


def test_clean_is_a_choice_and_reaches_every_split(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "<p>So&nbsp;so.</p>")
    plain = Filings(dataset=folder).load()
    cleaned = Filings(dataset=folder, clean=True).load()
    assert plain.splits["test"]["text"][-1] == "<p>So&nbsp;so.</p>"
    assert cleaned.splits["test"]["text"][-1] == "So so."
    assert list(cleaned.splits["test"]["label"]) == list(plain.splits["test"]["label"])


def test_a_document_of_markup_alone_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "data", "<div><br/></div>")
    with pytest.raises(InputError, match=r"test\.jsonl, line \d+, has no text in column 'text'"):
        Filings(dataset=folder, clean=True).load()


def test_the_embedded_passages_are_enough_for_every_item(builtin: dict[str, list[dict[str, Any]]]) -> None:
    assert sum(len(rows) for rows in builtin.values()) >= 420
    for split, rows in builtin.items():
        assert {tuple(row) for row in rows} == {("text", "label", "company", "hard")}
        counts = Counter(row["label"] for row in rows)
        assert sorted(counts) == ITEMS, split
        assert set(counts.values()) == {len(rows) / len(ITEMS)}, "all items are equally frequent"
        assert any(row["hard"] for row in rows)
        assert all(60 <= len(row["text"].split()) <= 150 for row in rows)


def test_no_company_is_in_two_splits(builtin: dict[str, list[dict[str, Any]]]) -> None:
    companies = [{row["company"] for row in rows} for rows in builtin.values()]
    assert len(set.union(*companies)) == sum(len(names) for names in companies) >= 50


def test_no_two_embedded_passages_are_near_duplicates(builtin: dict[str, list[dict[str, Any]]]) -> None:
    """Two passages share at most two runs of eight words, numbers counted as equal: a customary phrase, no sentence."""
    holders: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for i, row in enumerate(row for rows in builtin.values() for row in rows):
        words = re.sub(r"[^\w\s]", " ", re.sub(r"\d+", "0", row["text"].lower())).split()
        for start in range(len(words) - 7):
            holders[tuple(words[start : start + 8])].add(i)
    shared = Counter((a, b) for held in holders.values() for a in held for b in held if a < b)
    assert max(shared.values(), default=0) <= 2


def test_the_embedded_passages_are_read_by_name() -> None:
    examples = Filings().load()
    assert examples.labels == ITEMS
    assert examples.source == "the passages of filings that finllm-prune embeds"
    assert [len(rows) for rows in examples.splits.values()] == [272, 56, 96]


@pytest.mark.parametrize("strategy", ["head", "head_tail"])
def test_a_run_from_html_to_a_smaller_model(
    tmp_path: Path, tiny_folder: small.TinyFolder, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    small.few_resamples(monkeypatch)
    data = tmp_path / "data"
    for split in small.SPLITS:
        content = [{**row, "text": f"<p>{row['text']}</p>" * 8} for row in small.rows(split)]
        small.write_jsonl(data / f"{split}.jsonl", content)
    content = {
        "model": str(tiny_folder()), "output": str(tmp_path / "out"),
        "task": {"name": "filings", "dataset": str(data), "max_length": 24, "strategy": strategy, "clean": True},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "criterion": "taylor", "sparsity": 0.5}]},
        "training": {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True},
    }  # fmt: skip
    recipe = parse(content)
    report = run(recipe)
    assert report is not None
    assert set(report.quality.metrics) == {"accuracy", "macro_f1", "micro_f1"}
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "compact")
    assert saved.config.intermediate_size == 32
    assert [saved.config.id2label[i] for i in range(3)] == LABELS
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["task"]["strategy"] == strategy
