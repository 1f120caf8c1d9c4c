"""Perturbations and slices: what of a text changes, what does not, and where texts go."""

from decimal import Decimal
from itertools import permutations
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finllm_prune.errors import InputError
from finllm_prune.evaluation.perturbations import PERTURBATIONS, Companies, Negations, Numbers
from finllm_prune.evaluation.slices import by_negation, of_values, slices
from finllm_prune.tasks import KEPT


def rows(*texts: str, **columns: list[object]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts), **columns})


@pytest.mark.parametrize(
    ("text", "doubled"),
    [
        ("Profit rose 5% to 12.50 from 10.", "Profit rose 10% to 25.00 from 20."),
        ("Sales of $1,250.5 million, 3bn and 7 m", "Sales of $2,501.0 million, 6bn and 14 m"),
        ("EUR 12,5 million", "EUR 25,0 million"),
        ("On 31 December 2023 and March 15, 2024", "On 31 December 2023 and March 15, 2024"),
        ("Form 10-K, Q3, 5G, Item 1.2.3, 007", "Form 10-K, Q3, 5G, Item 1.2.3, 007"),
        ("0.5 points, 0", "1.0 points, 0"),
        ("from 950 million to $1.1B, 5M, 25-bp and 2X", "from 1900 million to $2.2B, 10M, 50-bp and 4X"),
        ("a margin of 6-10%, -3% and $5M-10M", "a margin of 12-20%, -6% and $10M-20M"),
        ("von 999,5 auf 1.234,56 und 1.234.567", "von 1999,0 auf 2.469,12 und 2.469.134"),
        ("At 10:30 on 12/31/2023, 2023-12-31 and 31.12.2023", "At 10:30 on 12/31/2023, 2023-12-31 and 31.12.2023"),
        ("Margin 12%, Market 5, Decreased 12%, 5 Markets", "Margin 24%, Market 10, Decreased 24%, 10 Markets"),
        ("Sept. 5, 5 Dec, May 5-6, in May 5%, fiscal 2020-21", "Sept. 5, 5 Dec, May 5-6, in May 10%, fiscal 2020-21"),
        ("from 1950 million to EUR1800 million in 2023", "from 3900 million to EUR3600 million in 2023"),
        (
            "3M on COVID-19, 401K, Form 10K, Level 2B, Rule 10b-5",
            "3M on COVID-19, 401K, Form 10K, Level 2B, Rule 10b-5",
        ),
        ("1 000 000 and 5", "1 000 000 and 5"),
        ("1 000 000, 1,250 and 5", "1 000 000, 1,250 and 5"),
        ("Net sales 412 398 1,200", "Net sales 824 796 2,400"),
        ("12,50 and 3.5", "12,50 and 3.5"),
        ("1,23,456 and 5", "1,23,456 and 5"),
        ("between .5 and 2", "between .5 and 2"),
    ],
)
def test_numbers_are_multiplied_in_their_own_format(text: str, doubled: str) -> None:
    assert Numbers().change(text, 2.0) == doubled


@given(st.lists(st.integers(0, 1800), min_size=2, max_size=2, unique=True), st.integers(0, 9))
def test_what_was_more_is_not_less_afterwards(amounts: list[int], seed: int) -> None:
    (text,) = Numbers()(rows("from {} to {} units".format(*amounts)), seed)["text"]
    before, after = np.array(amounts), np.array([int(word) for word in text.split() if word.isdigit()])
    assert (before[0] < before[1]) == (after[0] < after[1]) or after[0] == after[1]


@given(st.lists(st.decimals(0, 10, places=1) | st.integers(0, 10), min_size=2, max_size=4), st.floats(1.1, 2.0))
@example([5, Decimal("5.4")], 1.1)
def test_rounding_turns_no_order_round(amounts: list[Decimal | int], factor: float) -> None:
    after = [Decimal(word) for word in Numbers().change(" and ".join(map(str, amounts)), factor).split(" and ")]
    assert all(x <= y for (a, x), (b, y) in permutations(zip(amounts, after, strict=True), 2) if a < b)


def test_what_is_compared_with_a_number_that_cannot_be_read_stays() -> None:
    pairs = ["It has 1 000 000.", "It has 20.", "It has 1 000 000.", "It has 20."]
    data = rows("Has it 10?", "Has it 10?", "Is it large?", "Is it large?", pair=pairs)
    found = Numbers()(data, 0)
    assert found["text"] == list(data["text"])
    assert found["pair"][:3] == pairs[:3]
    assert found["pair"][3] != pairs[3]


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("Profit was up and sales were down.", "Profit was not up and sales were down."),
        ("It will not pay, but it can grow.", "It will not pay, but it can not grow."),
        ("Profit rose.", "It is not true that Profit rose."),
        ("We can't meet, so it will wait.", "We can't meet, so it will not wait."),
        ("It could n't pay.", "It is not true that It could n't pay."),
    ],
)
def test_one_negation_is_put_in(text: str, negated: str) -> None:
    assert Negations().change(text) == negated


def test_companies_become_other_companies_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("Korvix\n\n")
    data = rows(
        "The Alder Creek Group bought Borealis Holdings; Alder Creek Group shares rose.",
        "Sales of Dunmore Freight fell.",
        "Korvix paid nothing.",
        "Nobody is named here.",
        **{f"{KEPT}company": [None, "Dunmore Freight", None, None]},
    )
    change = Companies(column="company", names=str(tmp_path / "names.txt"))
    one, two, three, four = change(data, 0)["text"]
    assert "Alder Creek Group" not in one
    assert "Borealis Holdings" not in one
    buyer, bought = one.removeprefix("The ").split(";")[0].split(" bought ")
    assert buyer != bought
    assert {buyer, bought} == {"Dunmore Freight", "Korvix"}
    assert one.endswith(f"; {buyer} shares rose.")
    assert "Dunmore" not in two
    assert "Korvix" not in three
    assert four == data[3]["text"]
    with pytest.raises(InputError, match=r"companies\.names"):
        Companies(names=str(tmp_path / "none.txt"))(data, 0)


def test_a_company_is_the_same_however_it_is_spelled() -> None:
    data = rows(
        "ALDER CREEK INC reports. Alder Creek Inc said that Alder\nCreek Inc grew.",
        "The Company sold Macy\u2019s Inc and Dunmore Freight Inc; In The Group all is well.",
        **{f"{KEPT}company": [["Borealis", "Korvix"], None]},
    )
    one, two = Companies(column="company")(data, 0)["text"]
    new = one.split(" reports. ")[0]
    assert new in ("Borealis", "Korvix", "Macy's Inc", "Dunmore Freight Inc")
    assert one == f"{new} reports. {new} said that {new} grew."
    assert two.startswith("The Company sold ")
    assert two.endswith("; In The Group all is well.")
    assert "Macy" not in two


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_text_changes_alike_whatever_lies_beside_it(name: str) -> None:
    text = "Alder Creek Group is worth 15 million, Borealis Holdings 20 and Cormorant Bank 30."
    change = PERTURBATIONS[name]()
    (alone,), (_, beside) = change(rows(text), 3)["text"], change(rows("Profit was up.", text), 3)["text"]
    assert alone == beside
    assert change(rows(text), 3) == change(rows(text), 3)


def test_a_pair_changes_with_its_text() -> None:
    texts = [
        "Alder Creek Group sold 10 ships to Borealis Holdings.",
        "Was Alder Creek Group paid?",
        "Was Alder Creek Group paid?",
    ]
    data = rows(
        *texts, pair=["Alder Creek Group", "Cormorant Bank paid Alder Creek Group 20.", "Alder Creek Group paid 30."]
    )
    found = Companies()(data, 1)
    seller, pair = found["text"][0].split(" sold ")[0], found["pair"][0]
    assert seller == pair == "Cormorant Bank", "the only name that the text and its pair do not hold"
    one, other = found["text"][1:]
    renamed = one.removeprefix("Was ").removesuffix(" paid?")
    assert one == other, "all pairs of a query ask the same"
    assert renamed == "Borealis Holdings"
    assert found["pair"][1:] == [f"Cormorant Bank paid {renamed} 20.", f"{renamed} paid 30."]
    numbers = Numbers()(data, 1)
    ten = int(numbers["text"][0].split()[4])
    assert ten > 10
    assert numbers["pair"][0] == data["pair"][0]
    assert [text.split()[-1] for text in numbers["pair"][1:]] != ["20.", "30."]
    negated = Negations()(data, 1)
    assert negated["pair"] == list(data["pair"])
    assert negated["text"] != list(data["text"])


def test_slices_hold_each_row_once() -> None:
    data = rows(
        "Up.", "Profit was not 5.", "One two three four.", "No.", "Sales rose 3 per cent in the year.", "It grew.",
        **{f"{KEPT}sector": ["a", "b", "a", None, "a", "b"], f"{KEPT}year": [2001, 2002, 2003, 2004, 2005, 2006]},
    )  # fmt: skip
    found = slices(["length", "numbers", "negation", "sector", "year"], data)
    for parts in found.values():
        assert sorted(np.concatenate(list(parts.values()))) == list(range(6))
    assert found["numbers"]["with"].tolist() == [1, 4]
    assert found["negation"]["with"].tolist() == [1, 3]
    assert {name: part.tolist() for name, part in found["sector"].items()} == {
        "a": [0, 2, 4],
        "b": [1, 5],
        "missing": [3],
    }
    assert list(found["length"]) == ["up to 1 words", "up to 4 words", "more than 4 words"]


def test_many_values_of_a_column_are_the_frequent_ones_and_the_others_or_thirds_of_numbers() -> None:
    names = [chr(97 + number) for number in range(20) for _ in range(20 - number)]
    data = rows(*names, **{f"{KEPT}name": names, f"{KEPT}size": list(np.arange(len(names)) * 1.5)})
    found = slices(["name", "size"], data)
    assert list(found["name"]) == [*"abcdefghij", "all others"]
    assert [len(part) for part in found["size"].values()] == [70, 70, 70]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_numbers_with_missing_cells_are_thirds_too_and_none_is_lost(missing: float | None) -> None:
    days = [missing, *range(20240101, 20240129), missing]
    found = of_values(days)
    assert {name: len(part) for name, part in found.items()} == {
        "up to 20240110": 10, "up to 20240119": 9, "more than 20240119": 9, "missing": 2,
    }  # fmt: skip
    assert found["missing"].tolist() == [0, 29]
    assert days[found["up to 20240110"][0]] == 20240101


def test_a_value_that_is_called_missing_is_none_that_is_missing() -> None:
    found = of_values(["missing", "a", None, "missing"])
    assert {name: part.tolist() for name, part in found.items()} == {"missing": [0, 3], "a": [1], "(missing)": [2]}


def test_an_apostrophe_may_be_typographic() -> None:
    assert list(by_negation(["We don\u2019t pay.", "We pay."])) == ["with", "without"]
