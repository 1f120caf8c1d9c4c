"""A causal language model on disk: one block at a time has weights, and what lies around the blocks when it is asked.

Never more than one block is held, on the host or on the device, nor a block beside the embeddings. Not covered: mixtures of
experts and models without a family, which ``open_model`` refuses.
"""

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from finllm_prune.errors import InputError, one_line
from finllm_prune.families import Family, find_family, is_causal
from finllm_prune.hub.pull import pull
from finllm_prune.loading import load_config
from finllm_prune.training import Pass, record

INDEX = "model.safetensors.index.json"
_ROWS = 512  # hidden states that go through the head at a time: a vocabulary of 150,000 makes 0.3 GB of logits of them


@dataclass(frozen=True)
class Memory:
    """Where what lies, and how much of it at a time.

    Args:
        device: where blocks run; ``auto`` is the GPU where there is one.
        dtype: of the weights; ``auto`` is the checkpoint's own.
        states: where the hidden states of all texts wait between two blocks: the ``cpu``, or the ``device``.
        tokens: of one forward pass.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    states: Literal["cpu", "device"] = "cpu"
    tokens: int = 16384

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise InputError(f"memory.tokens: a forward pass takes at least 1 token, not {self.tokens}")

    def place(self) -> torch.device:
        """The device that is meant; raises InputError where there is none of that name."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"memory.device: there is no '{name}' here ({one_line(error)}); use auto or cpu"
            ) from error


class Through(nn.Module):
    """Stands for a block: returns its input, or what is given."""

    def __init__(self, given: Tensor | None = None):
        super().__init__()
        self.given = given

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden if self.given is None else self.given


class Streamed:
    """A model without weights, which come from a folder as they are needed.

    Args:
        folder: a checkpoint of safetensors whose tensors are named as the model's parameters are.
        memory: where it runs.

    Raises:
        InputError: it is no such checkpoint.
    """

    def __init__(self, folder: Path, memory: Memory):
        self.folder, self.memory, self.device = folder, memory, memory.place()
        config = load_config(str(folder))
        self.family: Family = find_family(config.model_type)
        own = getattr(config, "dtype", None) or torch.float32
        dtype: torch.dtype = own if memory.dtype == "auto" else getattr(torch, memory.dtype)
        with init_empty_weights(include_buffers=False):  # rotary frequencies lie in no file
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.model.requires_grad_(False)  # or hidden states would hold all blocks that they came through
        for name, _ in self.model.named_buffers():
            set_module_tensor_to_device(self.model, name, self.device)
        self.layers = self.family.layers(self.model)
        self._files = _files(folder)
        self._around = _around(self.model, f"{self.family.root(self.model)}.")
        if missing := sorted(set(self._names()) - self._files.keys()):
            raise InputError(
                f"model: {folder} holds no {missing[0]} ({len(missing)} tensors are missing); name the checkpoint of a "
                f"{type(self.model).__name__} that save_pretrained wrote"
            )

    def names(self, block: int) -> list[str]:
        """The parameters of a block."""
        prefix = f"{self.family.root(self.model)}.{block}."
        return [f"{prefix}{name}" for name, _ in self.layers[block].named_parameters()]

    @property
    def around(self) -> list[str]:
        """The tensors beside the blocks: embeddings, last norm, and a head that is not tied to the embeddings."""
        return sorted(set(self._around.values()))

    @property
    def parameters(self) -> int:
        """How many numbers the model has; a tied head is counted once."""
        return sum(self.model.get_parameter(name).numel() for name in self._names())

    @property
    def bytes(self) -> int:
        """Of all these, in the model's dtype."""
        return self.parameters * self.model.dtype.itemsize

    def _names(self) -> list[str]:
        return [*self.around, *(name for block in range(len(self.layers)) for name in self.names(block))]

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint, in the model's dtype, on the CPU."""
        try:
            with safe_open(self._files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"model: {self._files[name]} is damaged ({one_line(error)}); download it anew") from error
        return tensor.to(self.model.dtype)

    def blocks(self, what: str) -> Iterator[tuple[int, nn.Module]]:
        """One block after the other, each with weights until the next one is asked for; ``what`` is done with them."""
        gc.collect()  # what an earlier pass left in cycles
        for index, layer in enumerate(tqdm(self.layers, desc=what)):
            with self._weights({name: name for name in self.names(index)}):
                yield index, layer

    def begin(self, batches: Iterable[dict[str, Tensor]]) -> list[Pass]:
        """Batches of ``input_ids`` and ``attention_mask`` on their way to the first block."""
        head, waits = self._head(), torch.device("cpu") if self.memory.states == "cpu" else self.device
        with self._weights({name: tensor for name, tensor in self._around.items() if name != head}):
            stubs, base = nn.ModuleList(Through() for _ in self.layers), self.model.base_model
            assert isinstance(base, PreTrainedModel)
            with self._in_place_of_blocks(stubs):
                return [step.to(waits) for batch in batches for step in record(base, stubs, [batch])]

    def logits(self, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
        """The logits (n, vocabulary), fp32, of what left the last block, (n, width); the head stays until all is asked for."""
        embedding = self._embedding()
        head = {name: tensor for name, tensor in self._around.items() if name != embedding}
        with self._weights(head):
            for states in hidden:
                for part in states.to(self.device).split(_ROWS):
                    with self._in_place_of_blocks(nn.ModuleList([Through(part[None])])):
                        yield self.model(inputs_embeds=part[None], use_cache=False).logits[0].float()

    @contextmanager
    def _weights(self, names: dict[str, str]) -> Iterator[None]:
        """Parameters (with the tensors that they are) have weights for a while."""
        try:
            for parameter, tensor in names.items():
                set_module_tensor_to_device(self.model, parameter, self.device, self.read(tensor))
            yield
        finally:
            for parameter in names:
                set_module_tensor_to_device(self.model, parameter, "meta")

    @contextmanager
    def _in_place_of_blocks(self, stubs: nn.ModuleList) -> Iterator[None]:
        parent, _, name = self.family.root(self.model).rpartition(".")
        holder = self.model.get_submodule(parent)
        setattr(holder, name, stubs)
        try:
            yield
        finally:
            setattr(holder, name, self.layers)

    def _embedding(self) -> str:
        return _path(self.model, self.model.get_input_embeddings())

    def _head(self) -> str:
        return _path(self.model, self.model.get_output_embeddings())


def open_model(location: str, memory: Memory) -> Streamed:
    """The language model in a folder or of a Hub id, which is downloaded.

    Raises:
        InputError: it is no causal language model of a known family, or a mixture of experts.
    """
    config = load_config(location)
    _refuse(config, location)
    return Streamed(pull(location, only=["*.json", "*.safetensors"]), memory)


def _refuse(config: PreTrainedConfig, location: str) -> None:
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise InputError(
            f"model: {location} is a mixture of experts ({config.model_type}), of which oneshot cannot see what each expert "
            "gets; name a dense model"
        )
    if not is_causal(config):
        raise InputError(
            f"model: {location} is no causal language model but a {', '.join(config.architectures or [config.model_type])}; "
            "use `finllm-prune run`, whose pruning.oneshot prunes it"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(
            f"model: {location} is quantized or packed, and blocks are read as they lie; name its plain checkpoint"
        )
    find_family(config.model_type)


def _around(model: PreTrainedModel, blocks: str) -> dict[str, str]:
    """Parameter beside the blocks -> the tensor that it is; a tied head is the embeddings."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(blocks)]
    tied = {}
    if model.config.tie_word_embeddings:
        tied = {_path(model, model.get_output_embeddings()): _path(model, model.get_input_embeddings())}
    return {name: tied.get(name, name) for name in names}


def _path(model: PreTrainedModel, wanted: nn.Module) -> str:
    """The name of a module's weight."""
    return next(f"{path}.weight" for path, module in model.named_modules() if module is wanted)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it."""
    single, index = folder / "model.safetensors", folder / INDEX
    try:
        if index.is_file():
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (FileNotFoundError, SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model: {folder} holds no readable safetensors ({one_line(error)}); save the model anew with save_pretrained"
        ) from error
