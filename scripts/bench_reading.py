"""Memory and time of reading filings: cleaned, looked through for copies, cut or taken in windows, tokenized.

    python scripts/bench_reading.py [--megabytes 100 1000] [--strategies head_tail windows]

HTML documents of random words as jsonl, eight tenths of them to train on, a hundredth of these without text; each reading is
a process of its own. Its memory is what it holds at most beyond what it held before: anonymous pages, as Linux counts them, for
those of mapped files are the kernel's to take back. TMPDIR needs room for about twice the data.
"""

import argparse
import html
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

WORDS = ("profit", "loss", "item", "&", "2024", "goodwill", "tested", "annually", "for", "impairment")
LABELS = ("business", "risk_factors", "mdna")
MAX_WINDOWS = 8


def write(folder: Path, documents: int, words: int, seed: int = 0) -> int:
    """A folder of ``documents`` filings; the bytes that it takes."""
    chosen = random.Random(seed)
    folder.mkdir(parents=True)
    for split, part in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for i in range(round(part * documents)):
                text = f"<p>{split} {i}</p><p>{html.escape(' '.join(chosen.choices(WORDS, k=words)))}</p>"
                empty = split == "train" and i % 100 == 0
                file.write(json.dumps({"text": "" if empty else text, "label": LABELS[i % 3]}) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def read(folder: Path, strategy: str, tokenizer: str, max_length: int) -> dict[str, Any]:
    """In this process: ``rows`` tokenized, ``bad`` ones counted, ``seconds``, and ``peak``, bytes of memory."""
    import datasets
    from transformers import AutoTokenizer

    from finllm_prune.tasks.filings import Filings

    datasets.disable_progress_bars()
    asked = {"windows": {"stride": 16, "max_windows": MAX_WINDOWS}}.get(strategy, {})
    task = Filings(
        dataset=str(folder), clean=True, strategy=strategy, deduplicate=True, max_length=max_length, bad_rows="skip", **asked
    )  # fmt: skip
    words = AutoTokenizer.from_pretrained(tokenizer)
    before, peaks, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peaks.append(held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        examples = task.load()
        rows = sum(len(task.tokenize(rows, words)) for rows in examples.splits.values())
        examples.fingerprint()
    finally:
        done.set()
        watcher.join()
    bad = sum(sum(Counter(kinds).values()) for kinds in examples.facts["bad_rows"].values())
    return {"rows": rows, "bad": bad, "seconds": time.perf_counter() - start, "peak": max(peaks) - before}


def held() -> int:
    """The anonymous bytes of this process."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=float, default=[100, 1000], help="sizes of the data")
    parser.add_argument("--words", type=int, default=3500, help="of a document: some 25 kB")
    parser.add_argument("--strategies", nargs="+", default=["head_tail"], choices=["head", "head_tail", "windows"])
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a document, or of a window")
    parser.add_argument("--tokenizer", help="a folder; MiniLM's where none is given")
    parser.add_argument("--out", type=Path, help="a file for the figures as JSON")
    args = parser.parse_args()
    if args.tokenizer is None:
        from finllm_prune.hub.base_model import locate

        args.tokenizer = str(locate("sentence-transformers/all-MiniLM-L6-v2")[0])
    rows = []
    print("| data, MB | documents | strategy | rows | left out | seconds | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as place:
            each = write(Path(place) / "one", 100, args.words) / 100
            size = write(folder := Path(place) / "data", documents := round(megabytes * 1e6 / each), args.words)
            for strategy in args.strategies:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    found = process.submit(read, folder, strategy, args.tokenizer, args.max_length).result()
                rows.append({"bytes": size, "documents": documents, "strategy": strategy, **found})
                print(
                    f"| {size / 1e6:.0f} | {documents} | {strategy} | {found['rows']} | {found['bad']} "
                    f"| {found['seconds']:.0f} | {found['peak'] / 1e6:.0f} |", flush=True
                )  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
