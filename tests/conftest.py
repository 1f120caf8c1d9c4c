"""Tiny real models of each family, and a tokenizer for them, made here: the fast tests download nothing."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import finllm_prune
from finllm_prune.cli import main

DATA = Path(finllm_prune.__file__).parent / "data" / "sentiment"
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
FAMILIES = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "deberta-v2", "modernbert", *DECODERS]
LABELS = ["negative", "neutral", "positive"]
Call = Callable[..., int]

torch.set_num_threads(1)
# A busy machine is no bug, and whether main is good is not left to chance: `make test-full` looks for new examples.
settings.register_profile("search", deadline=None, max_examples=50)
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first: at the end one worker would be alone with them."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    every = Counter(item.path for item in items)
    items.sort(key=lambda item: -slow[item.path] / every[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays: each Trainer collects the garbage of the whole process when it ends, a third of a second."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two calls of tiny models nobody waits for the threads of the first."""
    monkeypatch.setattr("finllm_prune.evaluation.latency.REST", 0.0)


def tiny_model(
    model_type: str = "bert",
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    labels: Sequence[str] = LABELS,
    **more: object,
) -> PreTrainedModel:
    """A random model of the real class: 4 heads (2 kv groups), 64 neurons, no dropout, so that runs can be compared exactly."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": hidden,
    }  # fmt: skip
    if model_type in DECODERS:
        # A window of 4 tokens in every other block, where the architecture has such blocks.
        sizes |= {"num_key_value_heads": 2, "head_dim": hidden // 4, "sliding_window": 4, "sliding_window_pattern": 2}
    sizes |= {
        "distilbert": {
            "dim": hidden, "hidden_dim": 64, "n_layers": layers, "n_heads": 4, "dropout": 0.0, "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
        "albert": {"classifier_dropout_prob": 0.0},
        "modernbert": {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
        "deberta-v2": {
            "relative_attention": True, "pos_att_type": "p2c|c2p", "share_att_key": True, "position_buckets": 8,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False,
        },
    }.get(model_type, {})  # fmt: skip
    torch.manual_seed(seed)
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    config = AutoConfig.for_model(
        model_type, max_position_embeddings=70, num_labels=len(labels), **names,
        **({"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | sizes | more),
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config)


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """Larger weights than those of a fresh model, and biases that are no zeros, so that every unit moves the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    """On three random texts, one of them with padding."""
    ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return model.eval()(input_ids=ids, attention_mask=mask).logits


class Clock:
    """In the place of ``time``: it goes on while somebody sleeps, and at no other time, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which latency is measured."""
    clock = Clock()
    monkeypatch.setattr("finllm_prune.evaluation.latency.time", clock)
    return clock


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Runs ``finllm-prune ARGUMENTS`` in this process and returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["finllm-prune", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    return run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece of 300 entries, trained on the embedded sentences."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [json.loads(line)["text"] for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    raw.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    )  # fmt: skip


@pytest.fixture
def tiny_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    """Saves a tiny model of a type with its tokenizer and returns the folder."""

    def save(model_type: str = "bert", **sizes: object) -> Path:
        folder = tmp_path / f"tiny-{model_type}"
        tiny_model(model_type, **sizes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
