"""Masks: whole names go, and nothing else."""

import re
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.tasks.beir import Retrieval
from finllm_prune.tasks.masking import Mask, Masker, normalise_numbers
from finllm_prune.tasks.queries import masked_texts
from finllm_prune.tasks.sentiment import Sentiment
from tests import small

names = st.lists(st.text(st.sampled_from("abB .&-'\u2019"), min_size=1, max_size=5), max_size=5)
texts = st.text(st.sampled_from("abAB .&-,'\u2019\n\u00a0"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(names=names, text=texts)
def test_no_whole_name_is_left_and_the_rest_stays(names: list[str], text: str) -> None:
    masked = Masker(names, "\u2588")(text)
    spellings = {form for name in names if name.strip() for form in (name.strip(), name.strip().upper())}
    patterns = {name: re.sub("['\u2019]", "['\u2019]", r"\s+".join(map(re.escape, name.split()))) for name in spellings}
    for name, pattern in patterns.items():
        begins, ends = (r"(?<!\w)" if name[0].isalnum() else "", r"(?!\w)" if name[-1].isalnum() else "")
        assert re.search(begins + pattern + ends, masked) is None
    # What lies between the masks stands in the text, in this order, and only whole names lie between that.
    pieces = [re.escape(piece) for piece in masked.split("\u2588")]
    one = "(?:" + "|".join(sorted(patterns.values())) + ")"
    assert re.fullmatch(one.join(pieces), text)


def test_names_go_as_written_and_in_capitals() -> None:
    mask = Masker(["Apple", "Apple Inc.", "MMM", "AT&T"], "COMPANY")
    assert mask("Apple Inc. and APPLE's rival AT&T rose; apple pie, Applebee and mmm did not.") == (
        "COMPANY and COMPANY's rival COMPANY rose; apple pie, Applebee and mmm did not."
    )
    assert mask("$MMM: (MMM)") == "$COMPANY: (COMPANY)"


def test_a_legal_form_may_be_left_out() -> None:
    mask = Mask(column="company").masker(
        ["Nokia Oyj", "Apple, Inc.", "AT&T", "Ferro Co., Ltd.", "Co Inc", "Bank of Oslo ASA"]
    )
    assert mask("Nokia Oyj, NOKIA and Nokia's rival Apple") == "COMPANY, COMPANY and COMPANY's rival COMPANY"
    assert (
        mask("Apple, Inc. and AT&T bought Ferro and BANK OF OSLO") == "COMPANY and COMPANY bought COMPANY and COMPANY"
    )
    assert mask("a Bank in Oslo of the AG") == "a Bank in Oslo of the AG"


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("JPMorgan Chase & Co.", "JPMorgan Chase"),
        ("Eli Lilly and Company", "Eli Lilly"),
        ("Merck & Co., Inc.", "Merck"),
        ("Brand Co", "Brand"),
        ("Enterprise Products Partners L.P.", "Enterprise Products Partners"),
        ("Barclays P.L.C.", "Barclays"),
        ("Xylo, L.L.C.", "Xylo"),
        ("Xylo L.L.P", "Xylo"),
    ],
)
def test_all_of_a_legal_form_may_be_left_out(name: str, short: str) -> None:
    mask = Mask(column="company").masker([name])
    assert mask(f"{short} and {name} rose") == "COMPANY and COMPANY rose"


@pytest.mark.parametrize("name", ["The Limited, Inc.", "The Company", "On AG", "& Co."])
def test_what_is_left_of_a_name_without_its_legal_form_is_a_name(name: str) -> None:
    mask = Mask(column="company").masker([name])
    assert mask(f"The board & THE bank, On time: {name} rose") == "The board & THE bank, On time: COMPANY rose"


def test_a_name_goes_over_white_space_and_with_either_apostrophe() -> None:
    mask = Masker(["Wells  Fargo", "Wells", "Macy's", "L\u2019Oreal"], "COMPANY")
    text = "Wells\nFargo, WELLS \u00a0 FARGO or Wells Fargot"
    assert mask(text) == "COMPANY, COMPANY or COMPANY Fargot"
    assert mask("\u2019Macy\u2019s\u2019 and L'Oreal") == "\u2019COMPANY\u2019 and COMPANY"


def test_numbers_become_zeros() -> None:
    assert normalise_numbers("Up 12.5 % to EUR1,250,000 in Q3 2024.") == "Up 0 % to EUR0 in Q0 0."


def test_names_of_a_column_and_of_a_file_go_from_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    for split in small.SPLITS:
        content = [{**row, "text": f"Acme and NVX: {row['text']} 7", "company": "Acme"} for row in small.rows(split)]
        content[0] |= {"text": "Bolt rose, 12 beats Acme.", "company": None}
        small.write_jsonl(folder / f"{split}.jsonl", content)
    listed = tmp_path / "names.txt"
    listed.write_text("NVX\n\nBolt\n")
    mask = Mask(column="company", names=str(listed), word="firm")
    examples = Sentiment(dataset=str(folder), mask=mask, normalise_numbers=True).load()
    first, second = examples.splits["test"]["text"][:2]
    assert first == "firm rose, 0 beats firm."
    assert second == f"firm and firm: {small.rows('test')[1]['text']} 0"
    assert examples.facts["masked"] == {"train": 24, "validation": 3, "test": 9}
    with pytest.raises(InputError, match=r"no column 'firm' \(task\.mask\.column\)"):
        Sentiment(dataset=str(folder), mask=Mask(column="firm")).load()


def test_a_column_may_hold_lists_of_names_and_has_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in small.SPLITS:
        content = [
            {**row, "text": f"Acme or Bolt: {row['text']}", "about": ["Acme Inc", "Bolt"], "year": 1}
            for row in small.rows(split)
        ]
        small.write_jsonl(tmp_path / "data" / f"{split}.jsonl", content)
    examples = Sentiment(dataset=str(tmp_path / "data"), mask=Mask(column="about")).load()
    assert examples.splits["test"]["text"][0].startswith("COMPANY or COMPANY: ")
    with pytest.raises(InputError, match=r"^task\.mask\.column: no row holds a name as text in column 'year'; name"):
        Sentiment(dataset=str(tmp_path / "data"), mask=Mask(column="year")).load()


def test_a_column_of_queries_may_hold_lists_of_names() -> None:
    columns = {"q": {"_id": "q", "about": ["Acme Inc"], "year": 1}}
    data = Retrieval({"p": "Acme rose"}, {"q": "Acme?"}, {}, {}, columns, "here", {}, [], {})
    masked, counts = masked_texts(data, Mask(column="about"), numbers=False)
    assert (masked.queries, masked.passages) == ({"q": "COMPANY?"}, {"p": "COMPANY rose"})
    assert counts == {"queries": 1, "passages": 1}
    with pytest.raises(InputError, match=r"^task\.mask\.column: no row holds a name"):
        masked_texts(data, Mask(column="year"), numbers=False)


def test_a_mask_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^task\.mask: name a column of names, or a file"):
        Mask()
    with pytest.raises(InputError, match=r"^task\.mask\.names: .* is no readable UTF-8 file"):
        Mask(names=str(tmp_path / "absent.txt")).listed()
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(InputError, match=r"^task\.mask\.names: .* holds no name"):
        Mask(names=str(tmp_path / "empty.txt")).listed()


def test_a_file_of_names_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeffAcme\nGlobex\n", encoding="utf-8")
    assert Mask(names=str(tmp_path / "names.txt")).masker([])("Acme and Globex rose") == "COMPANY and COMPANY rose"
