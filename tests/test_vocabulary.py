"""A trimmed vocabulary: what uses kept tokens is as before, nothing becomes unencodable, and every id is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from finllm_prune.errors import InputError, ProofError
from finllm_prune.hub.base_model import locate
from finllm_prune.vocabulary import Trim, held_out, trim, trim_json, trim_tokenizer
from tests.conftest import DATA, FAMILIES, tiny_model

ALL = [json.loads(line)["text"] for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
CORPUS, OTHERS = ALL[:30], ALL[60:160]
WORDS = sorted({word for text in CORPUS for word in text.split()})
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def word_piece() -> tuple[Tokenizer, trainers.Trainer]:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return raw, trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIAL, show_progress=False)


def byte_level() -> tuple[Tokenizer, trainers.Trainer]:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return raw, trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )


def byte_fallback() -> tuple[Tokenizer, trainers.Trainer]:
    """As Llama 2 and Gemma: characters, and bytes for those that have no entry."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    return raw, trainers.BpeTrainer(vocab_size=1100, special_tokens=special, show_progress=False)


def unigram() -> tuple[Tokenizer, trainers.Trainer]:
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return raw, trainers.UnigramTrainer(vocab_size=900, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)


MAKERS = {"word_piece": word_piece, "byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram}


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Padding at 1 as in RoBERTa, an added token that the model does not know, and ids in every part of the JSON."""
    raw, trainer = MAKERS[kind]()
    raw.train_from_iterator(ALL[:400], trainer)
    if kind == "byte_fallback":  # the trainer takes its bytes for special tokens, which they are not in real ones
        data = json.loads(raw.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
        raw = Tokenizer.from_str(json.dumps(data))
    raw.add_special_tokens(["<mask>"])
    raw.add_tokens(["EBITDA"])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    raw.enable_padding(pad_id=1, pad_token="<pad>")
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names)


class Case:
    """A tokenizer, its trimmed form, and a tiny model in both forms."""

    def __init__(self, kind: str) -> None:
        self.whole = trained(kind)
        sizes = {"vocab_size": len(self.whole) + 3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
        self.before, self.after = (tiny_model("roberta", layers=1, **sizes) for _ in range(2))
        self.trimmed = trim(self.after, self.whole, CORPUS)
        self.small, self.old = self.trimmed.tokenizer, self.trimmed.old


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits
    return out


def test_the_corpus_reads_as_before_and_the_vocabulary_is_smaller(case: Case) -> None:
    assert len(case.small) == len(case.old) < 0.9 * len(case.whole)
    assert list(case.old) == sorted(case.old)
    for text in CORPUS:
        before, after = case.whole(text, truncation=True)["input_ids"], case.small(text, truncation=True)["input_ids"]
        assert [case.old[i] for i in after] == before
        assert torch.equal(logits(case.after, after), logits(case.before, before))
    changed = held_out(case.whole, case.trimmed, CORPUS)
    assert (changed.changed, changed.unknown_after) == (0, changed.unknown)
    assert changed.tokens == changed.tokens_after > 0


@given(words=st.lists(st.sampled_from(WORDS), max_size=12), glue=st.sampled_from([" ", "", "-", "EBITDA", "<mask>"]))
def test_any_text_of_kept_tokens_has_the_same_ids_and_logits(case: Case, words: list[str], glue: str) -> None:
    text = glue.join(words)
    before, after = case.whole(text, truncation=True)["input_ids"], case.small(text, truncation=True)["input_ids"]
    if set(case.whole(text)["input_ids"]) <= set(case.old):
        assert [case.old[i] for i in after] == before
        assert torch.equal(logits(case.after, after), logits(case.before, before))


@given(text=st.text(max_size=40) | st.lists(st.sampled_from(" ".join(OTHERS).split())).map(" ".join))
def test_any_text_still_encodes_with_no_more_unknown_tokens(case: Case, text: str) -> None:
    before, after = case.whole(text)["input_ids"], case.small(text)["input_ids"]
    unknown = [ids.count(t.unk_token_id) for t, ids in ((case.whole, before), (case.small, after))]
    assert unknown[1] <= unknown[0]
    skip = {"skip_special_tokens": True}
    if case.whole.backend_tokenizer.decoder is not None and not unknown[0]:
        assert case.small.decode(after, **skip) == case.whole.decode(before, **skip)


def test_every_place_that_names_an_id_is_told(case: Case, tmp_path: Path) -> None:
    case.small.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    small = AutoTokenizer.from_pretrained(tmp_path)
    assert small.get_vocab() == case.small.get_vocab()
    assert sorted(small.get_vocab().values()) == list(range(len(case.old)))
    for token in ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "EBITDA"):
        assert case.old[small.convert_tokens_to_ids(token)] == case.whole.convert_tokens_to_ids(token)
    assert {t["content"]: t["id"] for t in data["added_tokens"]}["EBITDA"] == len(case.old) - 1
    assert small.pad_token_id == case.after.config.pad_token_id == 1
    assert case.after.get_input_embeddings().padding_idx == 1
    config = case.after.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (len(case.old), 0, 2)
    assert small(CORPUS[0])["input_ids"] == case.small(CORPUS[0])["input_ids"]


def test_a_held_out_text_counts_each_token_that_is_gone() -> None:
    raw = Tokenizer(
        models.WordPiece({"<unk>": 0, "a": 1, "b": 2, "##b": 3, "##a": 4, "ab": 5, "aab": 6}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>")
    trimmed = trim(tiny_model(vocab_size=7, pad_token_id=0), whole, ["ab a b"])
    assert whole.convert_ids_to_tokens(list(trimmed.old)) == ["<unk>", "a", "b", "##b", "##a", "ab"]
    change = held_out(whole, trimmed, ["aab ab c", "aab"])
    assert (change.texts, change.tokens, change.changed, change.tokens_after) == (2, 4, 2, 8)
    assert (change.unknown, change.unknown_after) == (1, 1)
    assert str(change) == "2 of 4 held-out tokens change (50.00 %), 100.00 % more tokens, 1 unknown (before: 1)"


def test_a_token_that_occurs_too_seldom_goes() -> None:
    whole = trained("word_piece")
    sizes = [len(trim(tiny_model(vocab_size=len(whole)), whole, ALL, count).old) for count in (1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    with pytest.raises(InputError, match=r"min_count: no text keeps all of its tokens.*lower min_count"):
        trim(tiny_model(vocab_size=len(whole)), whole, CORPUS, 10**6)
    with pytest.raises(InputError, match=r"vocabulary\.min_count: .* not 0 times"):
        Trim(min_count=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_gives_the_same_logits_from_its_files(
    model_type: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(model_type, layers=1)
    trimmed = trim(model, tokenizer, CORPUS[:5])
    assert model.config.vocab_size == len(trimmed.old) < 300
    assert trimmed.bytes["after"] < trimmed.bytes["before"]
    model.save_pretrained(tmp_path)
    trimmed.tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer takes any tokenizer beside a Qwen2 model for a byte-level one.
    again = type(tokenizer).from_pretrained(tmp_path)
    trimmed.prove(type(model).from_pretrained(tmp_path), again)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.flip(0))
    with pytest.raises(ProofError, match="gives other logits"):
        trimmed.prove(model, trimmed.tokenizer)


@pytest.mark.parametrize(
    ("model_type", "tied"),
    [(name, True) for name in FAMILIES if name not in ("mistral", "qwen2", "qwen3", "gemma", "gemma2")]
    + [(name, False) for name in ("modernbert", "llama", "gemma3_text")],
)
def test_the_head_of_a_language_model_is_cut_alike(
    model_type: str, tied: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(**(tiny_model(model_type, layers=1).config.to_dict() | {"tie_word_embeddings": tied}))
    auto = AutoModelForCausalLM if model_type in ("llama", "gemma3_text") else AutoModelForMaskedLM
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():  # biases of a head begin as zeros
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    trimmed = trim(model, tokenizer, CORPUS[:5])
    head = model.get_output_embeddings()
    assert head.weight.shape[0] == len(trimmed.old)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    trimmed.prove(auto.from_pretrained(tmp_path), trimmed.tokenizer)


def stock(name: str) -> PreTrainedTokenizerBase:
    """transformers' own classes, which build their own backend from a tokenizer.json."""
    specials = {
        "WordPiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        "Roberta": ["<s>", "<pad>", "</s>", "<unk>"],
    }
    if name == "bert":
        raw, _ = word_piece()
        special = specials["WordPiece"]
        raw.train_from_iterator(
            ALL[:200], trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        )
        return BertTokenizer(vocab=raw.get_vocab())
    if name == "roberta":
        raw, _ = byte_level()
        raw.train_from_iterator(
            ALL[:200],
            trainers.BpeTrainer(
                vocab_size=600, special_tokens=specials["Roberta"], show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )  # fmt: skip
        model = json.loads(raw.to_str())["model"]
        return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    if name == "llama":
        raw, _ = byte_fallback()
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        raw.train_from_iterator(
            ALL[:200], trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
        )
        model = json.loads(raw.to_str())["model"]
        return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], pad_token="</s>")
    raw, _ = unigram()
    special = specials["Roberta"] if name == "xlm-roberta" else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    unknown = special[3]
    raw.train_from_iterator(
        ALL[:200],
        trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token=unknown, show_progress=False),
    )
    vocab = [tuple(entry) for entry in json.loads(raw.to_str())["model"]["vocab"]]
    return (XLMRobertaTokenizer if name == "xlm-roberta" else DebertaV2Tokenizer)(vocab=vocab)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "xlm-roberta", "deberta-v2"])
def test_the_classes_of_transformers_come_back_from_their_files(name: str, tmp_path: Path) -> None:
    whole = stock(name)
    used = {i for text in CORPUS for i in whole(text)["input_ids"]}
    small, old = trim_tokenizer(whole, used)
    assert type(small) is type(whole)
    assert len(old) < len(whole)
    small.save_pretrained(tmp_path)
    small = AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        assert [old[i] for i in small(text)["input_ids"]] == whole(text)["input_ids"]
        pair = [old[i] for i in small(text, CORPUS[0])["input_ids"]]
        assert pair == whole(text, CORPUS[0])["input_ids"]
    assert {key: old[small.convert_tokens_to_ids(token)] for key, token in small.special_tokens_map.items()} == {
        key: whole.convert_tokens_to_ids(token) for key, token in whole.special_tokens_map.items()
    }


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("</s>", 2), ("<s>", 0)),
        processors.RobertaProcessing(("</s>", 2), ("<mask>", 900)),
        processors.Sequence([
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<mask> $A </s>", special_tokens=[("<mask>", 900), ("</s>", 2)]),
        ]),
    ],
)  # fmt: skip
def test_every_post_processor_and_the_padding_take_the_new_ids(processor: processors.PostProcessor) -> None:
    whole = Tokenizer.from_str(trained("byte_level").backend_tokenizer.to_str())
    assert whole.token_to_id("<mask>") == 900
    whole.post_processor = processor
    whole.enable_padding(pad_id=900, pad_token="<mask>")
    data, old = trim_json(json.loads(whole.to_str()), {whole.token_to_id("Ġthe")})
    small = Tokenizer.from_str(json.dumps(data))
    assert small.padding["pad_id"] == small.token_to_id("<mask>") == len(old) - 2
    before, after = (tokenizer.encode_batch([" the the", "x"]) for tokenizer in (whole, small))
    assert [[old[i] for i in row.ids] for row in after] == [row.ids for row in before]


def test_merges_of_a_token_stay_with_all_their_parts() -> None:
    model = {
        "type": "BPE", "continuing_subword_prefix": None, "merges": [["a", "b"], ["c", "d"], ["ab", "cd"], ["b", "c"]],
        "vocab": {token: i for i, token in enumerate(["a", "b", "c", "d", "ab", "cd", "abcd", "bc"])},
    }  # fmt: skip
    empty = {"added_tokens": [], "post_processor": None, "padding": None}
    data, old = trim_json({"model": model} | empty, {6})
    assert data["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    assert old == (0, 1, 2, 3, 4, 5, 6)


def test_what_cannot_be_trimmed_is_one_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "profit": 1}, unk_token="<unk>"))
    with pytest.raises(InputError, match=r"a WordLevel tokenizer has no smaller pieces .* keep its vocabulary whole"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"), {1})
    with pytest.raises(InputError, match="the tokenizer knows 300 tokens, the model 200; they do not fit"):
        trim(tiny_model(vocab_size=200), tokenizer, ALL)


@pytest.mark.slow
def test_minilm_keeps_its_logits_at_half_its_size(record_property: Callable[[str, object], None]) -> None:
    location, _ = locate("sentence-transformers/all-MiniLM-L6-v2")
    tokenizer, model = AutoTokenizer.from_pretrained(location), AutoModel.from_pretrained(location)
    trimmed = trim(model, tokenizer, ALL)
    assert len(trimmed.old) < 7000
    assert trimmed.bytes["after"] < 0.6 * trimmed.bytes["before"]
    unseen = [json.loads(line)["text"] for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    change = held_out(tokenizer, trimmed, unseen)
    record_property("vocabulary", f"{len(trimmed.old)} of {trimmed.whole} tokens, {trimmed.bytes}, {change}")
    assert change.changed < 0.1 * change.tokens
    assert change.unknown_after == change.unknown == 0
