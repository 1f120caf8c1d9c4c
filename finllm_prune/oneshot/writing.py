"""Checkpoints of several files, written block by block: plain ``from_pretrained`` loads them."""

import copy
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from finllm_prune.checkpoints.compact import fill_up
from finllm_prune.errors import InputError
from finllm_prune.families import alive, keep
from finllm_prune.families.shrinking import PARTS
from finllm_prune.oneshot.blocks import tensors_of
from finllm_prune.oneshot.streamed import INDEX, Streamed


class Writer:
    """Adds one file after the other to a folder.

    Args:
        folder: exists.
        files: how many there will be.
    """

    def __init__(self, folder: Path, files: int):
        self.folder, self.files = folder, files
        self.weight_map: dict[str, str] = {}
        self.bytes = self.written = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """One file of these tensors."""
        self.written += 1
        name = f"model-{self.written:05d}-of-{self.files:05d}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, self.folder / name, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
        """The index, the config, the tokenizer, and how the source generates text."""
        index = {"metadata": {"total_size": self.bytes}, "weight_map": self.weight_map}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2))
        config.save_pretrained(self.folder)
        tokenizer.save_pretrained(self.folder)
        if (source / "generation_config.json").is_file():
            shutil.copy(source / "generation_config.json", self.folder)


def start(model: Streamed, folder: Path, blocks: int | None = None) -> Writer:
    """A folder with what lies around the blocks; so many blocks will follow."""
    folder.mkdir(parents=True)
    writer = Writer(folder, len(model.around) + (len(model.layers) if blocks is None else blocks))
    for name in model.around:
        writer.add({name: model.read(name)})
    return writer


def config_of(model: Streamed) -> PreTrainedConfig:
    """Its own, as a checkpoint of it has it."""
    config = copy.deepcopy(model.model.config)
    config.architectures = [type(model.model).__name__]
    config.dtype = model.model.dtype
    return config


def write_compact(model: Streamed, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """As ``finllm_prune.checkpoints.compact``, in two passes: which units have an effect, then a model of those alone.

    Raises:
        InputError: nothing can be left out.
    """
    family, plain = model.family, model.model
    used: dict[int, dict[str, Tensor]] = {}
    for index, _ in model.blocks("compact: widths"):
        if not family.idle(plain, index):
            used[index] = {part: alive(plain, family, part, index) for part in PARTS}
    used = used or {0: {part: alive(plain, family, part, 0) for part in PARTS}}
    config = config_of(model)
    widths = {part: family.resize(config, part, max(int(u[part].sum()) for u in used.values())) for part in PARTS}
    if len(used) == len(model.layers) and all(widths[part] == len(used[0][part]) for part in PARTS):
        raise InputError("export: compact can leave out nothing of what these rules cut; drop it from export")
    setattr(config, family.depth, len(used))
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in used]
    writer = start(model, folder, len(used))
    for index, _ in model.blocks("compact: write"):
        if index in used:
            writer.add(_narrowed(model, index, list(used).index(index), used[index], widths))
    writer.finish(config, tokenizer, model.folder)


def _narrowed(
    model: Streamed, block: int, number: int, used: dict[str, Tensor], widths: dict[str, int]
) -> dict[str, Tensor]:  # fmt: skip
    """What stays of a block that has weights now, by the names of the block of that number."""
    state, root = tensors_of(model, block), model.family.root(model.model)
    for part, units in used.items():
        for name, cut in keep(model.model, model.family, part, block, fill_up(units, widths[part])).items():
            state[name] = cut.take(state[name])
    return {name.replace(f"{root}.{block}.", f"{root}.{number}.", 1): tensor for name, tensor in state.items()}
