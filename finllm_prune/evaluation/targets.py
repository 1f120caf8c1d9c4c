"""A target relative to the dense model, in milliseconds, FLOPs or bytes: what each width costs, and whether it was met."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from finllm_prune.errors import InputError
from finllm_prune.evaluation.latency import Engine, cpu_threads, measure, on_cpu
from finllm_prune.evaluation.latency_table import equal_blocks, measured_table
from finllm_prune.families import Family, find_family, narrow, shrink, without_effect
from finllm_prune.families.shrinking import PARTS
from finllm_prune.pruning import Costs, Group

KINDS = ("latency", "size", "flops")
RUNTIMES = ("torch", "onnx", "onnx-int8")
TOLERANCE = 0.05
_AIM = 0.98  # of a latency: of the tolerance two fifths
_OF = {
    "latency": "milliseconds",
    "size": "bytes of all parameters in fp32, those of a trimmed vocabulary's missing tokens among them",
    "flops": "FLOPs",
}


@dataclass(frozen=True)
class Target:
    """What the pruned model is to cost, as a part of what the dense one does; one of the first three is set.

    Args:
        latency: CPU milliseconds of a forward pass, measured on this machine.
        size: bytes of all parameters in fp32, embeddings included, as in compact or ragged; of the dense model with all its
            tokens, so that a trimmed vocabulary counts towards it.
        flops: of the matrix products of a forward pass.
        batch, tokens: the shape of the input.
        threads: of the CPU; None takes torch's default.
        runtime: what runs both models: "torch", or onnxruntime with graphs as the formats "onnx" and "onnx-int8" write them.
    """

    latency: float | None = None
    size: float | None = None
    flops: float | None = None
    batch: int = 1
    tokens: int = 128
    threads: int | None = None
    runtime: str = "torch"

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"pruning.target: one of {', '.join(KINDS)} is needed, and {len(given)} are given")
        if not 0 < self.ratio < 1:
            raise InputError(
                f"pruning.target.{self.kind}: {self.ratio} is no part of the dense model's; set it between 0 and 1"
            )
        if min(self.batch, self.tokens, self.threads or 1) < 1:
            raise InputError("pruning.target: batch, tokens and threads must be at least 1")
        if self.runtime not in RUNTIMES:
            raise InputError(f"pruning.target.runtime: unknown '{self.runtime}'; known: {', '.join(RUNTIMES)}")
        if self.runtime != "torch" and self.kind != "latency":
            raise InputError(f"pruning.target.runtime: {self.kind} is the same in each runtime; remove the key")

    @property
    def kind(self) -> str:
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def ratio(self) -> float:
        return float(getattr(self, self.kind))

    def admits(self, kept: float) -> bool:
        """Whether a measured ratio is within the tolerance."""
        return abs(kept / self.ratio - 1.0) <= TOLERANCE


def price(
    target: Target, dense: PreTrainedModel, model: PreTrainedModel, groups: list[Group], engine: Engine = on_cpu,
    share: float = 1.0,
) -> Costs:  # fmt: skip
    """The costs of all groups that have no sparsity of their own, as parts of the dense model's cost.

    Args:
        dense: what the target is relative to.
        model: what is pruned; it may have fewer blocks.
        groups: of all rules, on ``model``.
        engine: what makes of a model what the target's runtime runs.
        share: which part of the untrimmed dense model's bytes ``dense`` has.

    Raises:
        InputError: the target cannot be reached, with the lowest that can.
    """
    open_groups = [group for group in groups if group.rule.sparsity is None]
    family = find_family(model.config.model_type)
    if target.kind == "latency":
        costs = _by_latency(target, dense, model, family, open_groups, engine)
    else:
        costs = _by_count(target, _whole(target, dense, share), model, family, open_groups)
    refuse_out_of_reach(target, costs)
    return costs


def refuse_out_of_reach(target: Target, costs: Costs) -> None:
    """Raise InputError where these costs come down too little for the target, or are below it from the start."""
    if not costs.tables or costs.lowest > target.ratio:
        raise InputError(
            f"pruning.target.{target.kind}: {target.ratio:g} cannot be reached: with one unit left in each block these rules "
            f"come down to {costs.lowest:.3f} of the dense model's {_OF[target.kind]}; raise the target, add the missing rule "
            "of mlp (neuron) and attention (head), or drop blocks by model.keep_layers"
            + (" or tokens by vocabulary" if target.kind == "size" else "")
        )
    if costs.start <= target.ratio:
        raise InputError(
            f"pruning.target.{target.kind}: {target.ratio:g} is met before anything is cut ({costs.start:.3f} of the dense "
            f"model's {_OF[target.kind]}); lower it"
        )


def check_target(
    target: Target, costs: Costs, dense: PreTrainedModel, pruned: PreTrainedModel, kept: dict[str, int],
    engine: Engine = on_cpu, share: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """The model without what has no effect, held against the target: asked, predicted, measured, met.

    Args:
        kept: units per group, for the prediction.
        engine, share: as in ``price``.
    """
    small = shrink(pruned, without_effect(pruned))
    if target.kind == "latency":
        with cpu_threads(target.threads):
            found = measure(dense, small, target.batch, target.tokens, rounds=40, engine=engine)
        measured, shape = found.ratio, {"batch": found.batch, "tokens": found.tokens, "threads": found.threads}
        shape |= {"runtime": target.runtime}  # type: ignore[dict-item]
    else:
        measured = _counter(target)(small) / _whole(target, dense, share)
        shape = {"tokens": target.tokens} if target.kind == "flops" else {}
    return {
        "kind": target.kind, **shape, "asked": target.ratio, "predicted": costs.total(kept), "measured": measured,
        "tolerance": TOLERANCE, "met": target.admits(measured),
    }  # fmt: skip


def parameter_bytes(model: PreTrainedModel) -> float:
    """The bytes of all parameters; tied ones are counted once."""
    return float(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))


def flops(model: PreTrainedModel, tokens: int) -> float:
    """The floating-point operations of all matrix products of one text's forward pass: two for each multiplication."""
    model = nn.Module.to(copy.deepcopy(model), device="cpu", dtype=torch.float32).eval().requires_grad_(False)
    ids = torch.full((1, tokens), min(5, model.config.vocab_size - 1))
    # The fused kernels of the CPU are unknown to the counter.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return float(counter.get_total_flops())


def _counter(target: Target) -> Callable[[PreTrainedModel], float]:
    return parameter_bytes if target.kind == "size" else lambda model: flops(model, target.tokens)


def _whole(target: Target, dense: PreTrainedModel, share: float) -> float:
    """What the target is a part of: bytes are those of the model with all its tokens."""
    return _counter(target)(dense) / (share if target.kind == "size" else 1.0)


def _by_count(target: Target, whole: float, model: PreTrainedModel, family: Family, groups: list[Group]) -> Costs:
    """Each unit costs the same, whatever else is there: counted with all of a part's units, and with one in each block."""
    count = _counter(target)
    rest = full = count(model)
    blocks = len(family.layers(model))
    tables: dict[str, Tensor] = {}
    for part in {str(group.rule.structure.couples) for group in groups}:
        members = [group for group in groups if group.rule.structure.couples == part]
        units = members[0].mask.numel()
        unit = (full - count(narrow(model, {part: [1] * blocks}))) / (blocks * (units - 1))
        rest -= blocks * units * unit
        steps = torch.arange(units + 1, dtype=torch.float64) * (unit / whole)
        tables |= {group.name: steps for group in members}
    return Costs(tables, rest / whole, target.ratio)


def _by_latency(
    target: Target, dense: PreTrainedModel, model: PreTrainedModel, family: Family, groups: list[Group], engine: Engine
) -> Costs:
    """The measured table, and two slices of it through the widths at which equal blocks meet the target.

    The slices steer the choice; what the chosen widths cost together is read from the table. Both aim a little lower than
    asked: a model that is measured on its own is a few hundredths slower than the table tells.
    """
    limit = _AIM * target.ratio
    parts = {str(group.rule.structure.couples) for group in groups}
    with cpu_threads(target.threads):
        table = measured_table(dense, model, target.batch, target.tokens, parts, target.runtime, engine)
    surface = table.surface()
    heads, neurons = equal_blocks(surface, limit)
    rest = surface[heads, neurons]
    tables: dict[str, Tensor] = {}
    for part, curve, place in (("attention", surface[:, neurons], heads), ("mlp", surface[heads], neurons)):
        if part in parts:
            rest -= curve[place] - curve[1]
            # A model takes the mean time of its blocks: one block weighs one part in so many.
            steps = torch.from_numpy((curve - curve[1]) / len(family.layers(model)))
            tables |= {group.name: steps for group in groups if group.rule.structure.couples == part}
    if len(parts) == 1:
        return Costs(tables, float(rest), limit)
    names = [group.name for group in groups]
    attention, mlp = ([name for name in names if name.endswith(part)] for part in PARTS)
    pairs = tuple(zip(attention, mlp, strict=True))
    return Costs(tables, float(rest), limit, torch.from_numpy(surface), pairs)
