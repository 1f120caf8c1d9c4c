"""What a reranker learns beside the labels: how a sentence encoder orders the passages of a query by itself."""

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import TrainingArguments

from finllm_prune.errors import InputError, optional
from finllm_prune.training.logit_losses import centred_mse

COSINES = "cosines"  # a column of the training rows


@dataclass(frozen=True)
class Cosines:
    """``alpha * M + (1 - alpha) * task loss``, in place of the task's loss, of the dense reranker and of the pruned one.

    M is the mean squared difference between scores and ``scale * cosine``, each less its mean over the passages of a list
    (``centred_mse``). A sentence encoder knows meanings but reads a query and a passage apart; a cross-encoder that starts from
    its weights has to learn to compare, which labels teach slowly, and the encoder's own cosines fast (Trans-Encoder, Liu et
    al. 2022, https://arxiv.org/abs/2109.13059).

    Args:
        encoder: a local folder or Hub id that sentence-transformers reads; the model's own base is a good one.
        alpha: the weight of the cosines against the labels, 0..1.
        scale: what cosines are multiplied by; above 0. How far apart the scores of a list come to lie.
    """

    encoder: str
    alpha: float = 0.7
    scale: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.scale <= 0:
            raise InputError("cosines: alpha must lie in 0..1, and scale above 0")

    def loss(self, logits: Tensor, task_loss: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """What scores (lists, passages) are trained by; the batch carries ``labels`` and ``cosines``, of the same shape."""
        distance = centred_mse(logits, self.scale * inputs[COSINES], inputs["labels"])
        return self.alpha * distance + (1.0 - self.alpha) * task_loss

    def fingerprint(self, rows: datasets.Dataset, tokens: int) -> str:
        """sha256 over what the cosines come of."""
        digest = hashlib.sha256(json.dumps([self.encoder, tokens]).encode())
        for row in rows:
            digest.update(json.dumps([row["text"], row["passages"]]).encode())
        return digest.hexdigest()

    def of(
        self, rows: datasets.Dataset, location: str, tokens: int, width: int, arguments: TrainingArguments
    ) -> Tensor:
        """The cosines of each list, (lists, width); a short list is filled up with 0.

        Args:
            rows: ``text`` (a query) and ``passages``.
            location: what ``from_pretrained`` takes for the encoder.
            tokens: texts are cut to these, as the reranker sees no more of them.
            width: passages of the longest list.
            arguments: where the encoder runs, and whether in bf16.
        """
        encoder = sentence_transformers().SentenceTransformer(
            location, device=str(arguments.device), trust_remote_code=False
        )
        encoder.max_seq_length = min(tokens, encoder.max_seq_length or tokens)
        queries = list(dict.fromkeys(rows["text"]))
        passages = list(dict.fromkeys(chain.from_iterable(rows["passages"])))
        options: dict[str, Any] = {"normalize_embeddings": True, "convert_to_tensor": True}
        with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
            asked = dict(zip(queries, encoder.encode_query(queries, **options).float().cpu(), strict=True))
            told = dict(zip(passages, encoder.encode_document(passages, **options).float().cpu(), strict=True))
        found = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            of_list = torch.stack([told[each] for each in row["passages"]])
            found[i, : len(of_list)] = of_list @ asked[row["text"]]
        return found


def sentence_transformers() -> Any:
    """The package, which only this needs."""
    return optional("sentence_transformers", key="cosines", extra="cosines")
