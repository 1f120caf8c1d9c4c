"""Causal language models as rerankers: one output says what yes and no said, and CrossEncoder asks as we do."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.prepare import read
from finllm_prune.recipe import Recipe
from finllm_prune.tasks.reranking import Reranking
from finllm_prune.tasks.yes_no import Prompt, from_causal
from tests.conftest import loud
from tests.rankings import write_set


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's; yes and no are one token each."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["yes no"] * 9 + [Prompt().template] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|endoftext|>", eos_token="<|im_end|>")


def causal(model_type: str = "qwen3", **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=True, **more,
    )  # fmt: skip
    return loud(AutoModelForCausalLM.from_config(config))


@pytest.fixture
def saved(tmp_path: Path, words: PreTrainedTokenizerFast) -> Path:
    causal().save_pretrained(tmp_path / "causal")
    words.save_pretrained(tmp_path / "causal")
    return tmp_path / "causal"


QUERY, PASSAGES = "which rule holds?", ["the levy is booked at once", "no", "a lease may be settled in cash, or later"]


def asked(task: Reranking, tokenizer: PreTrainedTokenizerFast, passages: list[str]) -> list[list[int]]:
    return task._encode([QUERY] * len(passages), passages, tokenizer)["input_ids"]


def test_the_one_output_is_the_log_odds_of_yes(saved: Path, words: PreTrainedTokenizerFast) -> None:
    task = Reranking(max_length=500)
    model = task.auto_class.from_pretrained(str(saved), dtype=torch.float32, **task.head_config(["relevance"])).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    task.fit_tokenizer(tokenizer, AutoConfig.from_pretrained(saved))
    yes, no = (words.convert_tokens_to_ids(answer) for answer in ("yes", "no"))
    for passage, ids in zip(PASSAGES, asked(task, tokenizer, PASSAGES), strict=True):
        template = Prompt()
        text = template.template.format(instruction=template.instruction, query=QUERY, passage=passage)
        assert ids == words(text)["input_ids"]
        with torch.inference_mode():
            logits = causal()(torch.tensor([ids])).logits[0, -1]
            score = model(torch.tensor([ids])).logits
        torch.testing.assert_close(score, (logits[yes] - logits[no]).reshape(1, 1), rtol=1e-4, atol=1e-5)
    batch = words.pad({"input_ids": asked(task, tokenizer, PASSAGES)}, return_tensors="pt")
    with torch.inference_mode():
        together = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(together[-1:], score, rtol=1e-4, atol=1e-5)


def test_a_long_passage_loses_its_end_and_the_question_stays_whole(saved: Path, words: PreTrainedTokenizerFast) -> None:
    task = Reranking(max_length=200, prompt=Prompt(template="Q: {query} D: {passage}<|im_end|>\nanswer:"))
    task.fit_tokenizer(words, AutoConfig.from_pretrained(saved))
    short, long = asked(task, words, [PASSAGES[0], PASSAGES[0] + " and more" * 99])
    tail = words("<|im_end|>\nanswer:")["input_ids"]
    assert len(long) == 200
    assert long[-len(tail) :] == tail == short[-len(tail) :]
    assert long[: len(short) - len(tail)] == short[: -len(tail)]


def test_a_chat_template_of_a_chat_is_dropped_and_one_of_pairs_is_kept(
    saved: Path, words: PreTrainedTokenizerFast
) -> None:
    config = AutoConfig.from_pretrained(saved)
    config.architectures = ["Qwen3ForSequenceClassification"]
    words.chat_template = "{{ messages[0]['content'] }}"
    Reranking().fit_tokenizer(words, config)
    assert words.chat_template is None
    words.chat_template = pairs = Prompt(template="{query}|{passage}").chat_template()
    Reranking().fit_tokenizer(words, config)
    assert words.chat_template == pairs


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt(yes="certainly not one token"), r"task\.prompt\.yes: 'certainly not one token' is \d+ tokens"),
        (Prompt(no=""), r"task\.prompt\.no: '' is 0 tokens"),
    ],
)
def test_an_answer_is_one_token(words: PreTrainedTokenizerFast, prompt: Prompt, said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_causal(causal(), words, prompt)


def test_a_prompt_that_leaves_no_room_is_refused(saved: Path, words: PreTrainedTokenizerFast) -> None:
    task = Reranking(max_length=100, prompt=Prompt())
    task.fit_tokenizer(words, AutoConfig.from_pretrained(saved))
    with pytest.raises(InputError, match=r"task\.max_length: the prompt alone has \d+ of 100 tokens; raise it"):
        asked(task, words, PASSAGES)


def test_a_template_may_hold_any_sign() -> None:
    said = Prompt(template="\N{BANK} {query} {passage} \u20ac").chat_template()
    assert "\N{BANK} " in said
    assert "\u20ac" in said
    said.encode()


@pytest.mark.parametrize("template", ["{query} alone", "{passage} then {query}", "{query} {passage} {passage}"])
def test_a_template_has_a_place_for_both(template: str) -> None:
    with pytest.raises(InputError, match=r"task\.prompt\.template"):
        Prompt(template=template)


def test_logits_that_are_bent_are_refused(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="not a linear function of its hidden states"):
        from_causal(causal("gemma2", final_logit_softcapping=0.5), words, Prompt())


def test_cross_encoder_asks_and_scores_as_we_do(saved: Path, tmp_path: Path) -> None:
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    task = Reranking(max_length=260)
    model = task.auto_class.from_pretrained(str(saved), dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(saved)
    task.fit_tokenizer(tokenizer, AutoConfig.from_pretrained(saved))
    model.save_pretrained(tmp_path / "reranker")
    tokenizer.save_pretrained(tmp_path / "reranker")
    passages = [*PASSAGES, "the levy, and " * 99]
    with torch.inference_mode():
        own = torch.cat([model(torch.tensor([ids])).logits[0] for ids in asked(task, tokenizer, passages)])
    theirs = cross_encoder(str(tmp_path / "reranker"), device="cpu").predict([(QUERY, passage) for passage in passages])
    torch.testing.assert_close(torch.tensor(theirs), own.sigmoid(), rtol=1e-4, atol=1e-5)


def test_a_smaller_vocabulary_keeps_the_tokens_of_the_question(saved: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {saved}
task: {{name: reranking, dataset: {write_set(tmp_path / "set")}, max_length: 400, negatives: 2, candidates: 4}}
vocabulary: {{min_count: 2}}
dense: {{checkpoint: {saved}}}
pruning: {{rules: [{{target: mlp, structure: neuron, sparsity: 0.5}}]}}
training: {{max_steps: 1, per_device_train_batch_size: 4, report_to: none, use_cpu: true}}
output: {tmp_path / "out"}
""")
    ready = read(Recipe.load(recipe))
    trimmed, whole = ready.tokenizer, PreTrainedTokenizerFast.from_pretrained(saved)
    task = ready.recipe.task
    task.fit_tokenizer(whole, AutoConfig.from_pretrained(saved))
    passages = ["the lease is tested once a year"]
    told = [each.convert_ids_to_tokens(asked(task, each, passages)[0]) for each in (trimmed, whole)]
    frame = len(asked(task, whole, [""])[0]) // 2
    assert len(trimmed) < len(whole)
    assert told[0][:frame] == told[1][:frame]


@pytest.mark.slow
def test_a_run_prunes_a_decoder_that_was_asked(saved: Path, tmp_path: Path, call) -> None:
    write_set(tmp_path / "set")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
model: {saved}
task:
  {{name: reranking, dataset: {tmp_path / "set"}, max_length: 90, negatives: 2, candidates: 4,
    prompt: {{template: 'Q: {{query}} D: {{passage}} yes or no?'}}}}
dense: {{checkpoint: {saved}}}
pruning: {{rules: [{{target: mlp, structure: neuron, sparsity: 0.5}}]}}
training: {{max_steps: 3, per_device_train_batch_size: 4, report_to: none, disable_tqdm: true, use_cpu: true}}
output: {tmp_path / "out"}
""")
    assert call("run", recipe) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out" / "compact")
    assert config.architectures == ["Qwen3ForSequenceClassification"]
    assert config.intermediate_size == 32
