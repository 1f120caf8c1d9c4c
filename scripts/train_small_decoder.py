"""A small language model of financial text, from scratch in minutes on a CPU: something to try `finllm-prune oneshot` on.

    python scripts/train_small_decoder.py --data FOLDER --out DIR [--minutes 5]

FOLDER holds a folder of filings with a train split (.parquet, .jsonl or .csv, its texts in the column `text`), and may hold
BEIR corpora (corpus.jsonl or corpus.jsonl.gz) in other folders. A byte-level BPE of 4,096 tokens and a Llama of 4 blocks
(128 wide, 4 heads in 2 kv groups, 384 neurons, tied head) are trained on the train texts alone, in windows of 128 tokens, by
the plain Trainer. The minutes are of processor time, on one thread, so that a busy machine trains the same model: a few steps
are timed first, and what fits is the length of the training.
"""

import argparse
import copy
import gzip
import json
import random
import tempfile
import time
from pathlib import Path

import datasets
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from finllm_prune.tasks.files import read_file, split_files

WINDOW, BATCH, END = 128, 4, "<|endoftext|>"


def texts(folder: Path, most: int) -> list[str]:
    """Of the train splits and corpora below a folder; of a corpus, documents of so many characters in all."""
    found = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        for corpus in sorted(place.glob("corpus.jsonl*")):
            with gzip.open(corpus, "rt") if corpus.suffix == ".gz" else corpus.open() as file:
                documents = [json.loads(line)["text"] for line in file]
            random.Random(0).shuffle(documents)
            while documents and most > 0:
                most -= len(documents[-1])
                found.append(documents.pop())
        files = split_files(place)
        if "train" in files:
            found += read_file(files["train"], "train")["text"]
    return [text for text in found if text.strip()]


def tokenizer_for(text: list[str], size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def windows(text: list[str], tokenizer: PreTrainedTokenizerFast) -> datasets.Dataset:
    """All texts, end to end, in windows of equal length."""
    ids = [t for each in tokenizer(text, verbose=False)["input_ids"] for t in [*each, tokenizer.eos_token_id]]
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    rows = [ids[start : start + WINDOW] for start in starts]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def seconds_per_step(model: LlamaForCausalLM, steps: int = 5) -> float:
    """Of processor time; the first step, which warms up, is left out."""

    trial = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trial.parameters())

    def step() -> float:
        ids = torch.randint(model.config.vocab_size, (BATCH, WINDOW))
        begun = time.process_time()
        trial(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - begun

    return sum([step() for _ in range(steps)][1:]) / (steps - 1)


def main() -> None:
    """Train it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of processor time")
    parser.add_argument("--characters", type=int, default=3_000_000, help="of corpora, beside all train splits")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    set_seed(0)
    text = texts(arguments.data, arguments.characters)
    tokenizer = tokenizer_for(text)
    rows = windows(text, tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    steps = max(10, int(60 * arguments.minutes / seconds_per_step(model)))
    print(f"{len(text)} texts, {len(rows)} windows, {model.num_parameters():,} parameters, {steps} steps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=2e-3, weight_decay=0.1,
            lr_scheduler_type="cosine", warmup_steps=0.05, adam_beta2=0.98, save_strategy="no", logging_steps=100,
            report_to=[], use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, disable_tqdm=True,
        )  # fmt: skip
        result = Trainer(model, training, train_dataset=rows, data_collator=default_data_collator).train()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"loss {result.training_loss:.3f}, {time.process_time() / 60:.1f} minutes of processor time: {arguments.out}")


if __name__ == "__main__":
    main()
