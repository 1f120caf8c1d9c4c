"""The logits of a model on many rows."""

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel


def logits_of(model: PreTrainedModel, rows: datasets.Dataset, collator: DataCollator, batch_size: int = 64) -> Tensor:
    """The logits (fp32, on the CPU) of each row, in order. The model's device and mode are as before afterwards.

    Args:
        model: on the device where it is to run.
        rows: tokenized; the columns that the collator takes.
        collator: makes a batch of rows.
        batch_size: rows at a time; rows of like length lie together.
    """
    was_training = model.training
    model.eval()
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    loader = DataLoader(rows.select(by_length), batch_size=batch_size, collate_fn=collator)
    found = []
    with torch.inference_mode():
        for batch in tqdm(loader, desc="predict", leave=False, disable=None):
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            found.append(model(**inputs).logits.float().cpu())
    model.train(was_training)
    logits = torch.cat(found)
    return torch.empty_like(logits).index_copy_(0, torch.tensor(by_length), logits)
