"""Long texts: the tokens at their ends are those of the whole, and memory does not grow with the file."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from finllm_prune.tasks import ends
from finllm_prune.tasks.ends import both_ends, first_tokens
from tests import small

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


MEASURED = """
import sys, threading, time
import datasets
from transformers import AutoTokenizer
from finllm_prune.tasks.filings import Filings

def held():  # pages of mapped files are the kernel's to take back, so they are not counted
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while running:
        peaks.append(held())
        time.sleep(0.005)

datasets.disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
task = Filings(dataset=sys.argv[2], clean=True, strategy=sys.argv[3], deduplicate=True, max_length=32, bad_rows="skip")
before, peaks, running = held(), [], True
watcher = threading.Thread(target=watch)
watcher.start()
examples = task.load()
rows = sum(len(task.tokenize(rows, tokenizer)) for rows in examples.splits.values())
examples.fingerprint()
running = False
watcher.join()
print(rows, sum(examples.facts["bad_rows"].get("train", {}).values()), max(peaks) - before)
"""


def write_large(folder: Path, documents: int) -> None:
    """Documents of 20 kB; one in a hundred of the training documents has no text."""
    random.seed(0)
    for split, part in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        folder.mkdir(exist_ok=True)
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(round(part * documents)):
                text = f"<p>{split} {i}</p>" + " ".join(random.choices(("profit", "loss", "item", "&amp;"), k=3500))
                row = {
                    "text": "" if split == "train" and i % 100 == 0 else text,
                    "label": small.rows("train")[i % 3]["label"],
                }
                file.write(json.dumps(row) + "\n")


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("strategy", ["head_tail"])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    peaks = {}
    for documents in (2000, 4000):
        write_large(folder := tmp_path / str(documents), documents)
        command = [sys.executable, "-c", MEASURED, tmp_path / "tokenizer", folder, strategy]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        rows, bad, peaks[documents] = map(int, done.stdout.split())
        assert (rows, bad) == (documents - documents // 125, documents // 125), "every row is counted"
    sizes = [sum(file.stat().st_size for file in (tmp_path / name).iterdir()) / 1024 for name in ("2000", "4000")]
    # The reader of jsonl takes 10 MB at a time, and the small file is three times as large as that.
    assert peaks[4000] - peaks[2000] < 0.75 * (sizes[1] - sizes[0]), peaks
