"""ragged-remote: ragged for people without this package, by a few lines of code that lie in the folder.

``AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)``, and ``pipeline`` with that argument,
give a subclass of the plain class whose linear layers are as narrow as the config says; the logits are the same. After ``import
finllm_prune`` the folder loads as ragged does, without that argument. Without either there is an error whose missing file
says what to do, never a model with random weights. Not covered: ``AutoModel`` without the head, packed matrices, and places
that forbid code from the Hub, as many do.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finllm_prune.checkpoints.proof import logits_of, probe_of, save_proved
from finllm_prune.checkpoints.quantizer import NARROWED, REMOTE_LURE, WEIGHTS, write
from finllm_prune.checkpoints.ragged import ragged
from finllm_prune.errors import ProofError
from finllm_prune.families import Family, find_family

CODE = "modeling_ragged.py"
_SOURCE = '''"""Written by finllm-prune: {plain} with linear layers as narrow as config.json says under "{narrowed}"."""

from torch import nn
from transformers import AutoConfig, {plain}


class Ragged{plain}({plain}):
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for path, (rows, columns) in config.{narrowed}["linears"].items():
            parent, _, name = path.rpartition(".")
            whole = self.get_submodule(path)
            setattr(self.get_submodule(parent), name, nn.Linear(columns, rows, whole.bias is not None))
        for path, heads in config.{narrowed}["heads"].items():
            self.get_submodule(path).num_attention_heads = heads

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, **kwargs):
        config = config or AutoConfig.from_pretrained(folder)
        vars(config).pop("quantization_config", None)  # for finllm-prune, which is not needed here
        if getattr(config, "transformers_weights", None) == "{lure}":
            config.transformers_weights = "{weights}"
        loaded = super().from_pretrained(folder, *args, config=config, **kwargs)
        vars(loaded[0].config if isinstance(loaded, tuple) else loaded.config).pop("transformers_weights", None)
        return loaded
'''


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedModel:
    """Write and prove the smaller model, by the code in the folder too; returns the model."""
    smaller = ragged(model)
    save_proved(model, tokenizer, folder, "ragged-remote", smaller, lambda m, place: _write(m, model, place))
    return smaller


def _write(smaller: PreTrainedModel, model: PreTrainedModel, folder: Path) -> None:
    write(smaller, folder)
    plain, head = type(smaller).__name__, "CausalLM" if smaller.can_generate() else "SequenceClassification"
    source = _SOURCE.format(plain=plain, narrowed=NARROWED, lure=REMOTE_LURE, weights=WEIGHTS)
    (folder / CODE).write_text(source)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "auto_map": {f"AutoModelFor{head}": f"{Path(CODE).stem}.Ragged{plain}"},
        "transformers_weights": REMOTE_LURE,
        NARROWED: _narrowed(smaller, find_family(model.config.model_type)),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    remote = _remote(folder, f"Ragged{plain}").from_pretrained(folder)
    probe = probe_of(model)
    if not torch.equal(logits_of(remote, probe), logits_of(smaller, probe)):
        raise ProofError(f"{folder}: its own code gives another model; export ragged instead")


def _narrowed(smaller: PreTrainedModel, family: Family) -> dict[str, Any]:
    """The shapes of the linear layers, and how many heads a module has that counts them."""
    linears = {path: list(linear.weight.shape) for path, linear in family.linears(smaller).items()}
    heads = {}
    if family.counts_heads is not None:
        for block, layer in enumerate(family.layers(smaller)):
            attention: Any = layer.get_submodule(family.counts_heads)
            heads[f"{family.root(smaller)}.{block}.{family.counts_heads}"] = attention.num_attention_heads
    return {"linears": linears, "heads": heads}


def _remote(folder: Path, name: str) -> Any:
    """The class in the folder, without transformers' cache of such code, or Python's, which would lie in the folder."""
    module = ModuleType("finllm_prune_written")
    exec(compile((folder / CODE).read_text(encoding="utf-8"), str(folder / CODE), "exec"), module.__dict__)
    return getattr(module, name)
