"""How ``from_pretrained`` reads ragged and packed checkpoints: a transformers quantizer, here only a load path.

It makes the linear layers narrow while the model has no weights yet, and unpacks matrices on their way in. What comes out
is a plain model: no quantizer stays attached, so that it trains, resumes, moves and takes adapters like any other. Where its
blocks have several widths, its config keeps them, and ``save_pretrained`` alone writes a checkpoint that loads again.

The weights lie in a file that transformers alone does not look for. Its config names another one instead, which does not
exist and whose name is the remedy: without this package there is an error, never a model with random weights.

Not covered: what ``save_pretrained`` and the Trainer write of a loaded model with blocks of several widths. Their config cannot
name a missing file, for transformers deletes that key when it saves, and only an attached quantizer would be asked. Without
this package such a folder is an error about shapes, and with ``ignore_mismatched_sizes=True`` a model with random weights;
``finllm-prune export FOLDER OUT --to ragged`` gives it the missing file again.
"""

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finllm_prune.checkpoints.manifest import refuse_damaged
from finllm_prune.checkpoints.packing import Memory, Packed, unpack
from finllm_prune.errors import InputError, one_line
from finllm_prune.families import Cut, Family, cut_in_place, find_architecture, find_family, keep, tell_heads

METHOD, VERSION = "finllm_prune", 1
WEIGHTS = "finllm_prune.safetensors"
_REMEDIES = "first_pip_install_finllm-prune_and_import_finllm_prune"
LURE, REMOTE_LURE = f"{_REMEDIES}.safetensors", f"{_REMEDIES}_or_set_trust_remote_code.safetensors"
NARROWED = "narrowed"  # the config's key for the code of ragged-remote
PARTS = ("bitmask", "values")


class PrunedConfig(QuantizationConfigMixin):
    """``quantization_config`` in config.json.

    Args:
        format_version: 1.
        per_layer_config: block -> the widths it has, {"0": {"num_attention_heads": 8, "intermediate_size": 512}}, in the
            schema and by the names of transformers' own ``per_layer_config``; empty where all are the config's.
        packed: the number of packed matrices.

    Raises:
        InputError: it is of another version, or damaged.
    """

    def __init__(
        self, format_version: Any = None, per_layer_config: Any = None, packed: Any = 0, quant_method: str = METHOD, **more: Any
    ) -> None:  # fmt: skip
        if format_version != VERSION or isinstance(format_version, bool):
            raise InputError(
                f"quantization_config.format_version: {format_version!r} is not {VERSION}, the one that this finllm_prune "
                "reads; update it with pip install -U finllm-prune"
            )
        if more or type(packed) is not int or packed < 0 or not isinstance(per_layer_config or {}, dict):
            raise InputError(
                "quantization_config: per_layer_config (a mapping) and packed (a number) are expected here; "
                "config.json is damaged, so export or download it anew"
            )
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers lists its own methods only
        self.format_version = format_version
        self.per_layer_config: dict[str, dict[str, int]] = per_layer_config or {}
        self.packed = packed


class PrunedQuantizer(HfQuantizer):
    """Builds the narrow model and unpacks its matrices."""

    requires_calibration = True  # so that a dense checkpoint cannot be "quantized" with it
    quantization_config: PrunedConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The hook that sees the config before any file is looked for."""
        if self.quantization_config.per_layer_config:
            find_family(config.model_type)
        if getattr(config, "transformers_weights", None) is not None:  # a lure, of whatever version
            config.transformers_weights = WEIGHTS
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.quantization_config.per_layer_config:
            build(model, self.quantization_config.per_layer_config)
        _check_files(checkpoint_files or [], self.quantization_config.packed)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Packed parts -> the matrix."""
        if not self.quantization_config.packed:
            return []
        return [Unpacking([f"weight_{part}" for part in PARTS], "weight", [Unpack()], force_cpu=True)]

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing to do: parameters keep their names."""

    def postprocess_model(self, model: PreTrainedModel, **_: Any) -> None:
        """Leave a plain model; of this format only the widths stay in its config."""
        self.remove_quantization_config(model)
        for key in ("transformers_weights", *(("auto_map", NARROWED) if hasattr(model.config, NARROWED) else ())):
            vars(model.config).pop(key, None)
        if per_layer := self.quantization_config.per_layer_config:
            model.config.quantization_config = PrunedConfig(VERSION, per_layer).to_dict()
        # Else save_pretrained would try to pack every weight.
        ours = model.__dict__.get("_weight_conversions") or []
        model.__dict__["_weight_conversions"] = [each for each in ours if not isinstance(each, Unpacking)]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Unpacking(WeightConverter):
    """Of one matrix."""

    def convert(self, layer_name: str, model: Any = None, *_: Any, **__: Any) -> dict[str, list[Tensor]]:
        """Past what collects the errors of operations, and reports them at length."""
        (unpacking,) = self.operations
        return unpacking.convert(self.materialize_tensors(), [], [], full_layer_name=layer_name, model=model)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpacking":
        """transformers copies its conversions for each matrix, deeply, which a profile of a load shows first."""
        new = copy.copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new


class Unpack(ConversionOps):
    """Bitmask and values of one matrix -> the matrix. transformers leaves the dtypes of its inputs alone."""

    hf_quantizer = True  # by which transformers knows not to cast

    def __init__(self) -> None:
        self.memory = Memory()

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[Tensor]]:
        """Raises InputError where the parts are not those of the matrix."""
        name: str = kwargs["full_layer_name"]
        parameter = kwargs["model"].get_parameter(name)
        parts = {pattern.rpartition("_")[2]: tensors[0] for pattern, tensors in input_dict.items()}
        if parts.keys() != set(PARTS):
            raise InputError(f"{name}: a part of this packed matrix is missing; export or download it anew")
        shape = tuple(parameter.shape)
        return {name: [unpack(Packed.of(**parts, shape=shape), shape, parameter.dtype, name, self.memory)]}


def widths(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """Block -> its widths by the config's names for them; empty where each is what the config says."""
    family = find_architecture(model.config.model_type)
    if not isinstance(family, Family):
        return {}
    found = {str(block): _widths(model, family, block) for block in range(len(family.layers(model)))}
    own = {name: getattr(model.config, name) for entry in found.values() for name in entry}
    return found if any(entry != own for entry in found.values()) else {}


def tell_widths(model: PreTrainedModel) -> None:
    """Write the widths of a model with blocks of several widths into its config, for its ``save_pretrained``."""
    if per_layer := widths(model):
        model.config.quantization_config = PrunedConfig(VERSION, per_layer).to_dict()


def build(model: PreTrainedModel, per_layer: dict[str, dict[str, int]]) -> None:
    """Make the layers of a model without weights as narrow as that, in place.

    Raises:
        InputError: the widths are not those of such a model.
    """
    family = find_family(model.config.model_type)
    blocks = len(family.layers(model))
    if sorted(per_layer) != sorted(map(str, range(blocks))):
        raise InputError(f"{_at()}: it names blocks {', '.join(per_layer)}, but the model has {blocks}; {_REMEDY}")
    with torch.device("cpu"):  # indices are no weights
        cuts: dict[str, Cut] = {}
        for block in range(blocks):
            full, given = _widths(model, family, block), per_layer[str(block)]
            if not isinstance(given, dict) or given.keys() != full.keys():
                raise InputError(f"{_at(block)}: {', '.join(full)} are expected, not {given!r}; {_REMEDY}")
            for name, most in full.items():
                if type(given[name]) is not int or not 1 <= given[name] <= most:
                    raise InputError(f"{_at(block)}.{name}: {given[name]!r} is no number from 1 to {most}; {_REMEDY}")
            if given != _named(model, family, given[family.heads], given[family.width]):
                raise InputError(f"{_at(block)}: {given!r} has other query heads than key heads; {_REMEDY}")
            for part, name in (("attention", family.heads), ("mlp", family.width)):
                if given[name] < full[name]:
                    cuts |= keep(model, family, part, block, torch.arange(given[name]))
        cut_in_place(model, cuts)
        tell_heads(model)


def write(model: PreTrainedModel, folder: Path, state: dict[str, Tensor] | None = None, packed: int = 0) -> None:
    """Config and weights of a model into a folder that only this package opens."""
    model.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = PrunedConfig(VERSION, widths(model), packed).to_dict()
    config["transformers_weights"] = LURE
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


_REMEDY = "config.json is damaged, so export or download it anew"


def _at(block: int | None = None) -> str:
    return "quantization_config.per_layer_config" + ("" if block is None else f".{block}")


def _widths(model: PreTrainedModel, family: Family, block: int) -> dict[str, int]:
    attention, mlp = (family.sites(model, part, block)[-1] for part in ("attention", "mlp"))
    return _named(model, family, attention.heads, model.get_parameter(f"{mlp.path}.weight").shape[1])


def _named(model: PreTrainedModel, family: Family, heads: int, neurons: int) -> dict[str, int]:
    named = {family.heads: heads, family.width: neurons}
    if family.heads == "num_key_value_heads":  # a group takes its query heads along
        named["num_attention_heads"] = heads * (model.config.num_attention_heads // model.config.num_key_value_heads)
    return named


def _check_files(files: list[str], packed: int) -> None:
    """Raise InputError where a file is cut off, is not the one that was proved, or a matrix lost all its parts."""
    found = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found += sum(name.endswith("weight_bitmask") for name in file.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is missing or damaged ({one_line(error)}); export or download it anew") from error
        refuse_damaged(Path(path))
    if files and found != packed:
        raise InputError(
            f"{files[0]} holds {found} packed matrices, but config.json tells of {packed}; export or download it anew"
        )
