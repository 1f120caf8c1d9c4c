"""A pruned base and its adapter, each in a folder of its own: ``PeftModel.from_pretrained(base, "adapter")``, by peft alone."""

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints import masked
from finllm_prune.checkpoints.proof import compare_logits, logits_of, probe_of, read_model, tolerance_of
from finllm_prune.staging import staged

if TYPE_CHECKING:
    from peft import PeftModel


def save_apart(adapted: "PeftModel", tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write ``base``, whose zeros are proved as those of ``masked``, and ``adapter``; returns the two merged (fp32).

    Raises:
        ProofError: what was written does not say what the merged model says (``tolerance_of``); then no folder is left behind.
    """
    from peft import PeftModel

    device = adapted.device
    nn.Module.to(adapted, device="cpu", dtype=torch.float32)
    with staged(folder) as partial:
        masked.save(copy.deepcopy(adapted).unload(), tokenizer, partial / "base")
        adapted.save_pretrained(str(partial / "adapter"), save_embedding_layers=False)
        (partial / "adapter" / "README.md").unlink(missing_ok=True)  # an empty form; the card lies in the run's output
        merged: PreTrainedModel = adapted.merge_and_unload()
        base = read_model(partial / "base")
        base.name_or_path = ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers 5.23 has renamed
            read = PeftModel.from_pretrained(base, str(partial / "adapter")).get_base_model()
        probe = probe_of(merged)
        expected = logits_of(merged, probe)
        compare_logits(logits_of(read, probe), expected, folder, tolerance_of(expected, torch.float32))
    nn.Module.to(merged, device=device)
    return merged
