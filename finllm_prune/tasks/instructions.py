"""Instructions: a language model is asked, and learns what to answer; its prompts it does not learn."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollator,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finllm_prune.errors import InputError
from finllm_prune.families import is_causal
from finllm_prune.inference import PARTS
from finllm_prune.judges import CompletionJudge, Judge
from finllm_prune.tasks.asking import TEXT, Asking
from finllm_prune.tasks.batchwise import Batch, rewritten
from finllm_prune.tasks.classification import Classification
from finllm_prune.tasks.completions import CompletionCollator, completion_loss
from finllm_prune.tasks.instruction_rows import Completions, InstructionExamples, in_two
from finllm_prune.tasks.label_column import LabelColumn
from finllm_prune.tasks.task import Examples, Loss

_QUESTION = f"What is the sentiment of this news?\n{TEXT}\nAnswer:"
_OF_CLASSES = ("scores", "label_sets", "class_weights", "focal_gamma", "pair_column", "unlabelled")


@dataclass(frozen=True)
class Instructions(Classification):
    """A causal language model fine-tuned on prompts and completions in TRL's forms, or made of a classification set.

    Rows have the columns ``prompt`` and ``completion`` (texts, or lists of ``{role, content}``), or ``messages``, whose
    last one is the completion; with a ``template`` they have a text and a label. Where the completion is one of a closed set
    (``labels``), the likeliest one is the answer and is judged as a class; else completions are judged by their perplexity.

    Args:
        template: how a classification set is asked, with ``{text}``; the label is the completion. The sentences that
            finllm-prune embeds are asked for their sentiment.
        labels: the closed set of completions; None takes the labels of a classification set, and leaves others open.
        chat_template: put prompts into the tokenizer's chat template, where it has one.
        chat_template_kwargs: what this template takes, as ``enable_thinking: false``.
        packing: training rows of a batch lie in one sequence without padding and do not see one another; hidden states are
            then compared over all of its tokens alike.
    """

    pipeline_tag: ClassVar[str] = "text-generation"
    builtin: ClassVar[str] = "sentiment"

    max_length: int = 512
    template: str | None = None
    chat_template: bool = True
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    packing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template is not None and self.template.count(TEXT) != 1:
            raise InputError(f"task.template: it holds {TEXT} once, where the text of a row goes")
        for key in _OF_CLASSES:
            if getattr(self, key):
                raise InputError(f"task.{key}: a completion is a text; remove the key, or use the task sentiment")

    @property
    def auto_class(self) -> type["LanguageModel"]:  # type: ignore[override]
        return LanguageModel

    def load(self) -> "InstructionExamples":
        own = self._asked is None
        names = {"text_column": "prompt", "label_column": "completion"} if own else {}
        examples = super(Instructions, dataclasses.replace(self, **names)).load()  # type: ignore[arg-type]
        choices = [] if own and self.labels is None else examples.labels

        def complete(batch: Batch, _: Sequence[int]) -> Batch:
            return batch | {"completion": [choices[label] if choices else label for label in batch["label"]]}

        def choose(batch: Batch, _: Sequence[int]) -> Batch:
            return batch | {"choices": [choices or [label] for label in batch["label"]]}

        splits = {
            name: rewritten(rows, complete if name == "train" else choose) for name, rows in examples.splits.items()
        }
        facts = examples.facts | {"template": self._asked}
        return InstructionExamples(splits, ["completion"], examples.source, facts, examples.left_out, choices=choices)

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """It writes prompts as they were learned, and can pad."""
        if not self.chat_template:
            tokenizer.chat_template = None
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token

    def tokenize(self, rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Rows to learn from as transformers has them, those with ``choices`` as ``CompletionCollator`` takes them."""
        asking = Asking(tokenizer, self._limit(tokenizer), self._asked, self.chat_template_kwargs)

        def learned(batch: Batch, _: Sequence[int]) -> Batch:
            found = [one for (one,) in asking.encode(batch["text"], [[text] for text in batch["completion"]])]
            ids = [one.ids for one in found]
            return {"input_ids": ids, "attention_mask": [[1] * len(each) for each in ids]} | {
                "labels": [one.labels for one in found]
            }

        def evaluated(batch: Batch, _: Sequence[int]) -> Batch:
            found = asking.encode(batch["text"], batch["choices"])
            return {
                "input_ids": [[one.ids for one in some] for some in found],
                "attention_mask": [[[1] * len(one.ids) for one in some] for some in found],
                PARTS: [[one.labels for one in some] for some in found],
                "labels": [label if isinstance(label, int) else 0 for label in batch["label"]],
            }

        return rewritten(rows, evaluated if "choices" in rows.column_names else learned)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollator:
        return CompletionCollator(tokenizer, self._limit(tokenizer), self.packing)

    def loss(self, examples: Examples) -> Loss:
        """Of the completions' tokens; of rows that are evaluated, that of a class among its closed set."""
        assert isinstance(examples, InstructionExamples)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            if labels.ndim == 2:
                return completion_loss(logits, labels)
            return F.cross_entropy(logits, labels) if examples.choices else -logits[:, 0].sum() / logits[:, 1].sum()

        return loss

    def head_config(self, labels: list[str]) -> dict[str, Any]:
        """Its vocabulary is all that it says."""
        return {}

    def judge(self, examples: Examples, split: str = "test") -> Judge:
        assert isinstance(examples, InstructionExamples)
        if not examples.choices:
            return CompletionJudge(len(examples.splits[split]))
        return super().judge(dataclasses.replace(examples, labels=examples.choices), split)

    @property
    def _asked(self) -> str | None:
        """The template; None where rows have prompts of their own."""
        return _QUESTION if self.template is None and self.dataset == "builtin" else self.template

    @property
    def _label_column(self) -> LabelColumn:
        if self._asked is None and self.labels is None:
            return Completions(self.label_column, None, None, None, None)
        return super()._label_column

    def _limit(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return min(self.max_length, tokenizer.model_max_length)

    def _raw(self, left_out: dict[str, list[int]] | None) -> tuple[datasets.DatasetDict, str]:
        raw, source = super()._raw(left_out)
        if self._asked is None:
            raw = datasets.DatasetDict({name: in_two(rows) for name, rows in raw.items()})
        return raw, source


class LanguageModel:
    """What loads a causal language model."""

    @staticmethod
    def from_pretrained(location: str, **options: Any) -> PreTrainedModel:
        """As ``AutoModelForCausalLM.from_pretrained``, for checkpoints that are one."""
        if not is_causal(AutoConfig.from_pretrained(location)):
            raise InputError("it is no causal language model; name one (Llama, Mistral, Qwen, Gemma), or another task")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(location, **options)
        return model


TASK = Instructions
