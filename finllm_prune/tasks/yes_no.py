"""Rerankers that are causal language models: asked about a query and a passage, they answer yes or no (Zhang et al. 2025).

What ranks is the log-odds of yes, ``logit(yes) - logit(no)`` at the last token. That is one linear function of the last hidden
state, so a classifier with one output says the same: https://arxiv.org/abs/2506.05176.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.families import is_causal

_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n'
    "<Query>: {query}\n<Document>: {passage}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


@dataclass(frozen=True)
class Prompt:
    """How a causal language model is asked; by default as Qwen3-Reranker was taught.

    Args:
        instruction: what the passages are wanted for.
        template: the whole question, with ``{query}`` and ``{passage}`` in this order, and maybe ``{instruction}``.
        yes, no: the tokens of the answers.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    template: str = _QWEN3
    yes: str = "yes"
    no: str = "no"

    def __post_init__(self) -> None:
        names = re.findall(r"\{(query|passage)\}", self.template)
        if names != ["query", "passage"]:
            raise InputError("task.prompt.template: it holds {query} once, and after it {passage} once")

    def chat_template(self) -> str:
        """The same as a chat template of the roles ``query`` and ``document``, which sentence-transformers fills too."""
        text = self.template.replace("{instruction}", self.instruction)
        parts = re.split(r"\{query\}|\{passage\}", text)
        said = [
            f"{{{{ messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first }}}}"
            for role in ("query", "document")
        ]
        before, between, after = (f"{{{{ {json.dumps(part, ensure_ascii=False)} }}}}" for part in parts)
        return before + said[0] + between + said[1] + after


def asks_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own chat template puts a query and a passage into words."""
    template = tokenizer.chat_template
    return isinstance(template, str) and "query" in template and "document" in template


def question(tokenizer: PreTrainedTokenizerBase, query: str, passage: str) -> str:
    """A query and a passage in the words of the tokenizer's chat template."""
    turns = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def asked(tokenizer: PreTrainedTokenizerBase, queries: list[str], passages: list[str], limit: int) -> list[list[int]]:
    """The token ids of each question; where one is too long the passage loses its end, and what follows it stays.

    Raises:
        InputError: the prompt leaves no room for a query and a passage.
    """

    def whole(pairs: list[tuple[str, str]]) -> list[list[int]]:
        texts = [question(tokenizer, query, passage) for query, passage in pairs]
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    one, other = whole([("0", "0"), ("0", "1 2 3 4")])
    if len(one) + 8 > limit:
        raise InputError(f"task.max_length: the prompt alone has {len(one) - 2} of {limit} tokens; raise it")
    tail = 0
    while one[-1 - tail] == other[-1 - tail]:
        tail += 1
    return [
        ids if len(ids) <= limit else ids[: limit - tail] + ids[len(ids) - tail :]
        for ids in whole(list(zip(queries, passages, strict=True)))
    ]


@dataclass(frozen=True)
class OneOutput:
    """What loads a reranker: a classifier as it is, a causal language model as the classifier that says the same."""

    prompt: Prompt

    def from_pretrained(self, location: str, **options: Any) -> PreTrainedModel:
        """As ``AutoModelForSequenceClassification.from_pretrained``."""
        if not is_causal(AutoConfig.from_pretrained(location)):
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(location, **options)
            return model
        causal = AutoModelForCausalLM.from_pretrained(location, dtype=options.get("dtype"))
        return from_causal(causal, AutoTokenizer.from_pretrained(location), self.prompt, location)


def from_causal(
    causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, name: str = "the model"
) -> PreTrainedModel:
    """A classifier whose one logit is the log-odds of yes against no; it takes over the weights of ``causal``.

    Raises:
        InputError: an answer is no single token, or the language model's logits are more than a linear head (as Gemma 2's).
    """
    yes, no = (_token(tokenizer, answer, key) for key, answer in (("yes", prompt.yes), ("no", prompt.no)))
    config = causal.config
    ids = torch.arange(16)[None] % config.vocab_size
    with torch.inference_mode():
        answers = causal.eval()(input_ids=ids).logits[:, -1]
    head = causal.get_output_embeddings().weight.detach()
    config.num_labels = 1
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config)
    model.score = nn.Linear(head.shape[1], 1, bias=False, dtype=head.dtype)
    model.score.weight = nn.Parameter((head[yes] - head[no])[None].clone())
    setattr(model, model.base_model_prefix, causal.base_model)
    with torch.inference_mode():
        hidden = causal.base_model(input_ids=ids).last_hidden_state[:, -1]
        difference = (model.score(hidden)[:, 0] - (answers[:, yes] - answers[:, no])).abs().max()
    if difference > 1e-3:
        raise InputError(
            f"model: the answers of {name} are not a linear function of its hidden states, so it cannot become a reranker "
            "with one output; name another model"
        )
    return model


def _token(tokenizer: PreTrainedTokenizerBase, answer: str, key: str) -> int:
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(f"task.prompt.{key}: '{answer}' is {len(ids)} tokens or unknown to the model; name one token")
    return int(ids[0])
