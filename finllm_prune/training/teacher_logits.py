"""A teacher's logits, computed once and kept on disk, as a column of the training rows."""

import hashlib
import json
import logging
import os
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollator, PreTrainedModel

logger = logging.getLogger(__name__)

TEACHER_LOGITS = "teacher_logits"


def with_teacher_logits(
    model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, folder: Path, batch_size: int = 64
) -> datasets.Dataset:
    """The rows with a column ``teacher_logits``, which each batch then carries, whatever order the rows come in.

    The logits lie in ``folder`` in a file that is named by the teacher's weights and the rows' tokens, so that a resumed
    run reads them and another teacher or other rows never do. They differ from those of a teacher that runs beside the
    student by about 1e-6, because here a text lies among other texts and is padded to another length.

    Args:
        model: the teacher, on the device where it is to run.
        rows: tokenized; the columns that the collator takes.
        collator: makes a batch of rows.
        folder: where the file is written, by the first rank.
        batch_size: rows at a time.
    """
    path = folder / f"teacher_logits-{_fingerprint(model, rows)[:16]}.safetensors"
    with PartialState().main_process_first():
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({TEACHER_LOGITS: _logits(model, rows, collator, batch_size)}, partial)
            os.replace(partial, path)
            logger.info("The teacher's logits of %d rows are kept in %s.", len(rows), path.name)
    column = load_file(path)[TEACHER_LOGITS].tolist()
    return rows.add_column(TEACHER_LOGITS, column, feature=datasets.List(datasets.Value("float32")))


def _logits(model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, batch_size: int) -> Tensor:
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    found = []
    with torch.inference_mode():
        for batch in DataLoader(rows.select(by_length), batch_size=batch_size, collate_fn=collator):
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            found.append(model(**inputs).logits.float().cpu())
    logits = torch.cat(found)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(by_length), logits)


def _fingerprint(model: PreTrainedModel, rows: datasets.Dataset) -> str:
    """sha256 over the weights of a model and the tokens of rows, in order."""
    digest = hashlib.sha256(json.dumps([rows["input_ids"][:], rows["attention_mask"][:]]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
