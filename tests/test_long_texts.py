"""Long texts: the tokens at their ends are those of the whole, and memory does not grow with the file."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finllm_prune import prepare
from finllm_prune.errors import InputError
from finllm_prune.loading import refuse_too_long
from finllm_prune.recipe import parse
from finllm_prune.tasks import ends
from finllm_prune.tasks.ends import both_ends, first_tokens
from tests import small
from tests.conftest import tiny_model
from tests.scripts import script

words = st.sampled_from(["profit", "fell", "by", "12.5%", "EUR", "unheard-of", "x" * 40, "\n\n", "      ", "é"])
texts = st.lists(words, max_size=60).map(" ".join)


@given(
    text=texts, limit=st.integers(3, 16), head=st.sampled_from([0.1, 0.5, 0.9]), looked_at=st.sampled_from([1, 4, 8])
)
@example(text="word" * 300, limit=8, head=0.5, looked_at=4)
@example(text=" " * 300 + "profit fell", limit=8, head=0.5, looked_at=4)
def test_the_ends_alone_give_the_tokens_of_the_whole(
    tokenizer: PreTrainedTokenizerFast, text: str, limit: int, head: float, looked_at: int
) -> None:
    whole = tokenizer(text, verbose=False)["input_ids"]
    first = min(max(1, round(head * limit)), limit - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ends, "_CHARACTERS", looked_at)
        assert (
            first_tokens([text], limit, tokenizer) == tokenizer([text], truncation=True, max_length=limit)["input_ids"]
        )
        expected = whole if len(whole) <= limit else whole[:first] + whole[first - limit :]
        assert both_ends([text], limit, head, tokenizer) == [expected]


def test_what_lies_between_is_not_read(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    encode = ends._encode
    monkeypatch.setattr(ends, "_encode", lambda texts, *more: read.append(sum(map(len, texts))) or encode(texts, *more))
    text = "Profit rose again. " * 5000
    first_tokens([text], 20, tokenizer)
    both_ends([text], 20, 0.5, tokenizer)
    assert max(read) <= 2 * 20 * 8


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "albert", "electra", "modernbert", "llama"])
def test_a_text_with_more_tokens_than_positions_that_were_learned_is_refused(model_type: str) -> None:
    model = tiny_model(model_type, layers=1).eval()

    def rows(tokens: int, windows: bool) -> datasets.Dataset:
        ids = torch.randint(4, 300, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        return datasets.Dataset.from_dict({"input_ids": [ids, ids[:3]] if not windows else [[ids[:3], ids], [ids[:2]]]})

    if model_type in ("modernbert", "llama"):  # they turn: there is no table that could end
        refuse_too_long(model, [rows(90, False)])
        model(torch.tensor([rows(90, False)["input_ids"][0]]))
        return
    most = 69 if model_type == "roberta" else 70
    for windows in (False, True):
        refuse_too_long(model, [rows(most, windows)])
        with pytest.raises(
            InputError, match=rf"^task\.max_length: a text has {most + 1} tokens, .* set max_length to {most} "
        ):
            refuse_too_long(model, [rows(3, windows), rows(most + 1, windows)])
    model(torch.tensor([rows(most, False)["input_ids"][0]]))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor([rows(most + 1, False)["input_ids"][0]]))


def test_a_run_refuses_it_before_training(tmp_path: Path, tiny_folder: small.TinyFolder) -> None:
    model = tiny_folder(layers=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(model)
    for split in small.SPLITS:
        small.write_jsonl(
            tmp_path / f"{split}.jsonl", [row | {"text": "Profit rose. " * 40} for row in small.rows(split)]
        )
    content = {
        "model": str(model), "task": {"name": "sentiment", "dataset": str(tmp_path), "max_length": 100},
        "pruning": {"rules": [{"target": "mlp", "structure": "neuron", "sparsity": 0.5}]}, "output": str(tmp_path / "out"),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"^task\.max_length: a text has 100 tokens, and the model reads at most 70"):
        prepare.read(parse(content))


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("strategy", ["head_tail", "windows"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with script("bench_reading", monkeypatch) as measure:
        sizes = ["--megabytes", "40", "120", "--max-length", "32"]
        measure(
            *sizes, "--strategies", strategy, "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")
        )
    small, large = json.loads((tmp_path / "out").read_text())
    for read in (small, large):
        documents = read["documents"]
        assert read["bad"] == -(-round(0.8 * documents) // 100), "one training document in a hundred has no text"
        assert read["rows"] == sum(round(part * documents) for part in (0.8, 0.1, 0.1)) - read["bad"], (
            "every row is counted"
        )
    # The reader of jsonl takes 10 MB at a time, and the small file is four times as large as that.
    assert large["peak"] - small["peak"] < 0.2 * (large["bytes"] - small["bytes"]), (small, large)
