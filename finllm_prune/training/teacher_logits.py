"""A teacher's logits, computed once and kept on disk, as a column of the training rows."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor
from transformers import DataCollator, PreTrainedModel

from finllm_prune.inference import logits_of
from finllm_prune.staging import save_tensors

logger = logging.getLogger(__name__)

TEACHER_LOGITS = "teacher_logits"


def with_teacher_logits(
    model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, folder: Path, batch_size: int = 64
) -> datasets.Dataset:
    """The rows with a column ``teacher_logits``, which each batch then carries, whatever order the rows come in.

    The logits lie in ``folder`` in a file that is named by the teacher's weights and the rows' tokens, so that a resumed
    run reads them and another teacher or other rows never do. They differ from those of a teacher that runs beside the
    student by about 1e-6, because here a text lies among other texts and is padded to another length. The first rank alone
    computes them while the others wait, no longer than ``training.ddp_timeout``.

    Args:
        model: the teacher, on the device where it is to run.
        rows: tokenized; the columns that the collator takes.
        collator: makes a batch of rows.
        folder: where the file is written, by the first rank.
        batch_size: sequences at a time.
    """
    return with_kept_logits(
        rows, folder, fingerprint_of(model, rows), lambda: logits_of(model, rows, collator, batch_size)
    )


def with_kept_logits(
    rows: datasets.Dataset, folder: Path, fingerprint: str, compute: Callable[[], Tensor], column: str = TEACHER_LOGITS
) -> datasets.Dataset:  # fmt: skip
    """The same, of whatever ``compute`` brings (rows, outputs), once for each ``fingerprint``."""
    path = folder / f"{column}-{fingerprint[:16]}.safetensors"
    with PartialState().main_process_first():
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors({column: compute()}, path)
            logger.info("The %s of %d rows are kept in %s.", column.replace("_", " "), len(rows), path.name)
    values = load_file(path)[column].tolist()
    return rows.add_column(column, values, feature=datasets.List(datasets.Value("float32")))


def fingerprint_of(model: PreTrainedModel, rows: datasets.Dataset, blocks: Sequence[int] = ()) -> str:
    """sha256 over the weights of a model, the tokens of rows, in order, and which blocks are asked."""
    digest = hashlib.sha256(json.dumps(list(blocks)).encode())
    for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True):
        digest.update(json.dumps([ids, mask]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
